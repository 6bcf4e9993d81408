"""The one file that imports Avalanche: what the harness uses of it is imported from here."""

import sys
import warnings
from types import ModuleType

# A solver package that Avalanche imports warns that it has no solver; nothing here needs one.
warnings.filterwarnings("ignore", message="no QP solver found")

try:
    import wandb  # noqa: F401
except Exception:
    # Avalanche imports wandb for charts that nothing here draws, so it must work without it.
    sys.modules["wandb"] = ModuleType("wandb")
    try:
        import avalanche.evaluation.metrics
        import avalanche.logging  # noqa: F401
    finally:
        # Whoever else imports wandb gets the real error.
        del sys.modules["wandb"]

from avalanche.benchmarks.scenarios.generic_scenario import CLExperience, CLScenario, CLStream, EagerCLStream
from avalanche.core import BasePlugin, BaseSGDPlugin, SupervisedPlugin
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import BaseLogger
from avalanche.training.plugins import SupervisedPlugin as TrainingPlugin
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.templates.base import BaseTemplate
from avalanche.training.utils import trigger_plugins

__all__ = [
    "BaseLogger",
    "BasePlugin",
    "BaseSGDPlugin",
    "BaseTemplate",
    "CLExperience",
    "CLScenario",
    "CLStream",
    "EagerCLStream",
    "EvaluationPlugin",
    "MetricValue",
    "PluginMetric",
    "SupervisedPlugin",
    "TrainingPlugin",
    "trigger_plugins",
]
