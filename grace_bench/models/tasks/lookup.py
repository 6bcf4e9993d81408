"""Tasks by name."""

from typing import Any

from grace_bench.errors import UserError, did_you_mean
from grace_bench.models.tasks.base import Task
from grace_bench.models.tasks.classification import Classification
from grace_bench.models.tasks.generation import Completion, QuestionAnswering
from grace_bench.models.tasks.language_modelling import LanguageModelling

_TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, QuestionAnswering, Completion, LanguageModelling)
}


def all_tasks() -> tuple[type[Task], ...]:
    """Returns the class of every task."""
    return tuple(_TASKS.values())


def get_task(name: str, **settings: Any) -> Task:
    """Returns the task of a name, made with the given settings.

    >>> get_task("qa", max_new_tokens=4).main_score
    'f1'

    Raises:
        UserError: If there is none; names the closest one.
    """
    if name not in _TASKS:
        raise UserError(f"no task {name!r}{did_you_mean(name, _TASKS)} (there are: {', '.join(_TASKS)})")
    return _TASKS[name](**settings)
