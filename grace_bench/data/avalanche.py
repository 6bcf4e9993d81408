"""The only file that imports Avalanche; all other files import Avalanche's names from here."""

import sys
import warnings
from types import ModuleType

# Avalanche imports a package that warns about a missing QP solver, which this project does not need.
warnings.filterwarnings("ignore", message="no QP solver found")

try:
    import wandb  # noqa: F401
except Exception:
    # Avalanche imports wandb for charts that are not used here, so a missing or broken wandb must not fail its import.
    sys.modules["wandb"] = ModuleType("wandb")
    try:
        import avalanche.evaluation.metrics
        import avalanche.logging  # noqa: F401
    finally:
        # Later imports of wandb raise the real error.
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
