"""Which runs may stand side by side."""

import json
from collections.abc import Sequence
from typing import Any

from grace_bench.common.text import visible
from grace_bench.errors import UserError
from grace_bench.results.schema import Protocol, RunResult


def refuse_mixtures(results: Sequence[RunResult]) -> None:
    """Makes sure that runs on one stream were measured alike.

    They share the stream's content and task, the protocol, tuning budget aside, and, for each model name, dtype and
    weights.

    Raises:
        UserError: If they do not, naming both runs and the first field that differs.
    """
    first_on_stream: dict[str, RunResult] = {}
    first_of_model: dict[tuple[str, str], RunResult] = {}
    for result in results:
        first = first_on_stream.setdefault(result.stream.name, result)
        _refuse_difference(first, result, "stream", {"fingerprint", "task"})
        _refuse_difference(first, result, "protocol", set(Protocol.model_fields) - {"tuning_budget"})
        first = first_of_model.setdefault((result.stream.name, result.model.name), result)
        _refuse_difference(first, result, "model", {"dtype"})
        _refuse_difference(first, result, "model", {"fingerprint"})


def value_text(value: Any) -> str:
    """Returns a field's value as JSON on one line."""
    return visible(json.dumps(value, ensure_ascii=False))


def _refuse_difference(first: RunResult, second: RunResult, part: str, fields: set[str]) -> None:
    one, two = (getattr(run, part).model_dump(mode="json", include=fields) for run in (first, second))
    name = next((name for name in one if one[name] != two[name]), None)
    if name is not None:
        raise UserError(
            f"runs {visible(first.run_id)} and {visible(second.run_id)} cannot stand in one table: {part}.{name} is "
            f"{value_text(one[name])} in the first and {value_text(two[name])} in the second"
        )
