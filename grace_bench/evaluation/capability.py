"""Capability: what a model can still do that no stream asks, measured by lm-evaluation-harness."""

import io
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from grace_bench.common.state import restored
from grace_bench.errors import UserError, did_you_mean, reason_of
from grace_bench.models.editable import EditableModel
from grace_bench.results.schema import CapabilityScores


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The score of a model on one task.

    Attributes:
        value: The first metric that the task declares, aggregated by lm-eval.
        higher_is_better: The direction of that metric.
        items: Its value on each document, in the order of the task, if `value` is their mean; else empty.
    """

    value: float
    higher_is_better: bool
    items: Sequence[float] = field(default=())


class CapabilityTasks:
    """Tasks of lm-evaluation-harness, loaded once.

    Args:
        tasks: Names of tasks, groups or tags. A group or tag stands for its tasks.
        limit: Use only so many documents of each task; None for all.
        folders: Folders of task files (YAML), searched before the tasks that lm-eval ships.

    Raises:
        UserError: If lm-eval is not installed, a task is unknown, or its data cannot be loaded.
    """

    def __init__(self, tasks: Sequence[str], *, limit: int | None = None, folders: Sequence[Path] = ()) -> None:
        if find_spec("lm_eval") is None:
            raise UserError("capability.tasks needs lm-eval: pip install 'grace-bench[capability]'")
        from lm_eval.tasks import TaskManager

        self._limit = limit
        paths: list[str | Path] = [str(folder) for folder in folders]
        with _quietly():
            # To index the thousands of tasks that lm-eval ships takes longer than most runs of a tiny model.
            manager = TaskManager(include_path=paths, include_defaults=False)
            if not set(tasks) <= set(manager.all_tasks):
                manager = TaskManager(include_path=paths)
        for name in tasks:
            if name not in manager.all_tasks:
                raise UserError(
                    f"capability.tasks: lm-eval knows no task {name!r}{did_you_mean(name, manager.all_tasks)}"
                )
        with _quietly():
            try:
                self._tasks = dict(manager.load(list(tasks))["tasks"])
            except Exception as error:
                raise UserError(f"capability.tasks=[{','.join(tasks)}] cannot be loaded: {reason_of(error)}") from error
        for task in self._tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    @property
    def names(self) -> list[str]:
        """The names of all single tasks."""
        return list(self._tasks)

    def measure(self, model: EditableModel) -> dict[str, TaskScore]:
        """Returns the scores of a model as edited so far, by the name of the task.

        Seeds the generators of Python, NumPy and torch, as lm-eval's `simple_evaluate` does.

        Args:
            model: A causal or encoder-decoder model of transformers.

        Raises:
            UserError: If the model is of another kind or has no tokenizer, or a task needs what it cannot do.
        """
        check_model(model)
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.evaluator import evaluate
        from lm_eval.utils import set_torch_seed

        from grace_bench.evaluation.language_model import EditedLM

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        set_torch_seed(DEFAULT_OTHER_SEED)
        for task in self._tasks.values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        with _quietly():
            try:
                # `simple_evaluate` would run pip, every time, to describe the machine.
                found = evaluate(
                    EditedLM(model, batch_size=model.task.batch_size, batch_tokens=model.task.batch_tokens),
                    {"tasks": self._tasks, "groups": {}, "group_map": {}},
                    limit=self._limit,
                    # The standard error of a drop is computed from the documents, which are the same before and after.
                    bootstrap_iters=0,
                )
            except (ValueError, AssertionError, NotImplementedError) as error:
                raise UserError(f"capability.tasks=[{','.join(self.names)}]: {reason_of(error)}") from error
        return {name: _task_score(name, found) for name in self.names}


class CapabilityMeter:
    """Measures capability during a run, and the drop since its start.

    Args:
        tasks: The tasks.
        every: Measure at the first evaluation after every so many edits, besides the first and the last; None for
            these two only.
    """

    def __init__(self, tasks: CapabilityTasks, *, every: int | None = None) -> None:
        self._tasks = tasks
        self._every = every
        self._before: dict[str, TaskScore] = {}
        self._last: int | None = None

    def is_due(self, n_edits: int, *, at_the_end: bool) -> bool:
        """Returns whether an evaluation after `n_edits` edits measures capability.

        Args:
            n_edits: The number of edits.
            at_the_end: Whether the run makes no more edits.
        """
        if self._last is None or self._last == n_edits:
            return self._last is None
        return at_the_end or (self._every is not None and n_edits // self._every > self._last // self._every)

    def measure(self, model: EditableModel, n_edits: int) -> CapabilityScores:
        """Returns the capability of a model after `n_edits` edits; the first call is the state before."""
        scores = self._tasks.measure(model)
        is_first = self._last is None
        self._last = n_edits
        if is_first:
            self._before = scores
        drop, stderr = (None, None) if is_first else mean_drop(self._before, scores)
        return CapabilityScores(
            scores={name: score.value for name, score in scores.items()},
            mean=_mean([score.value for score in scores.values() if score.higher_is_better]),
            drop=drop,
            drop_stderr=stderr,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON values."""
        return {"before": {name: vars(score) for name, score in self._before.items()}, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self._before = {name: restored(TaskScore, score) for name, score in state["before"].items()}
        self._last = state["last"]


def mean_drop(before: Mapping[str, TaskScore], after: Mapping[str, TaskScore]) -> tuple[float | None, float | None]:
    """Returns the mean over tasks of how far their scores fell, and its standard error.

    The documents of a task are the same before and after, so the error is that of the mean of paired differences;
    tasks are independent of each other. Tasks whose score is better when it is lower do not count.

    Args:
        before: The scores before the first edit.
        after: The scores of the same tasks.

    Returns:
        The drop, None if no task counts; and the error, None if a score is no mean over documents, or a task has one
        document.

    >>> before = TaskScore(value=1.0, higher_is_better=True, items=[1.0, 1.0, 1.0, 1.0])
    >>> after = TaskScore(value=0.5, higher_is_better=True, items=[1.0, 0.0, 1.0, 0.0])
    >>> drop, stderr = mean_drop({"a": before}, {"a": after})
    >>> drop, round(stderr, 3)
    (0.5, 0.289)
    """
    pairs = [(score, after[name]) for name, score in before.items() if score.higher_is_better]
    drop = _mean([first.value - second.value for first, second in pairs])
    if drop is None or any(len(first.items) != len(second.items) or len(first.items) < 2 for first, second in pairs):
        return drop, None
    variances = [
        stdev([one - two for one, two in zip(first.items, second.items, strict=True)]) ** 2 / len(first.items)
        for first, second in pairs
    ]
    return drop, math.sqrt(sum(variances)) / len(pairs)


def check_model(model: EditableModel) -> None:
    """Makes sure that lm-eval can ask a model.

    Raises:
        UserError: If it is no causal or encoder-decoder model of transformers, or has no tokenizer.
    """
    if model.task.auto_class not in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM") or model.config is None:
        raise UserError(
            f"capability.tasks needs a causal or encoder-decoder model of transformers, which {model.name} is not"
        )
    if model.tokenizer is None:
        raise UserError(f"capability.tasks needs a tokenizer, which model {model.name} does not have")


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _task_score(name: str, found: Mapping[str, Any]) -> TaskScore:
    """The score of a task in the results of lm-eval, where metrics are named `metric,filter`."""
    key = next(key for key in found["results"][name] if "," in key and not key.partition(",")[0].endswith("_stderr"))
    metric, _, filter_name = key.partition(",")
    value = float(found["results"][name][key])
    values = [sample[metric] for sample in found["samples"][name] if sample["filter"] == filter_name]
    is_mean = all(isinstance(value, bool | int | float) for value in values) and math.isclose(
        fmean(values), value, rel_tol=1e-9, abs_tol=1e-12
    )
    return TaskScore(
        value=value,
        higher_is_better=bool(found["higher_is_better"][name].get(metric)),
        items=[float(value) for value in values] if is_mean else [],
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences lm-eval, which prints and draws bars of its own, inside the context."""
    logger = logging.getLogger("lm_eval")
    own = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(own)
