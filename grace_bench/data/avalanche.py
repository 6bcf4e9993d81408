"""The only file that imports Avalanche; all other files import Avalanche's names from here."""

import gc
import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

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


class _AtFirstUse(ModuleType):
    """Stands for a module that is imported once something of it is used."""

    def __getattr__(self, name: str) -> Any:
        # Whoever looks through all modules asks for these.
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


# One plugin of Avalanche's needs this package, which imports every solver it finds, one of them with all of JAX.
sys.modules.setdefault("qpsolvers", _AtFirstUse("qpsolvers"))

# Else a sixth of the time of these imports goes into a search for garbage among what stays.
_collects = gc.isenabled()
gc.disable()
try:
    from avalanche.benchmarks.scenarios.generic_scenario import CLExperience, CLScenario, CLStream, EagerCLStream
    from avalanche.core import BasePlugin, BaseSGDPlugin, SupervisedPlugin
    from avalanche.evaluation import PluginMetric
    from avalanche.evaluation.metric_results import MetricValue
    from avalanche.logging import BaseLogger
    from avalanche.training.plugins import SupervisedPlugin as TrainingPlugin
    from avalanche.training.plugins.evaluation import EvaluationPlugin
    from avalanche.training.templates.base import BaseTemplate
    from avalanche.training.utils import trigger_plugins
finally:
    if _collects:
        gc.enable()

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
