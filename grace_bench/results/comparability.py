"""Which runs may share a table."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grace_bench.common.text import visible
from grace_bench.errors import UserError
from grace_bench.results.schema import Protocol, RunResult

Condition = tuple[str, str | None]
"""A field of a result; for a field of the model, with the model's name."""

_HASH_DIGITS = 12


def conditions(result: RunResult) -> dict[Condition, Any]:
    """Returns the values that every run in one table must share with this run.

    These are the stream's task and content, the protocol except for the tuning budget and for what is scored besides
    the main scores, and for each model name its dtype and weights. Runs that measured capability share its tasks; one
    that did not may stand beside any of them.
    """
    shared = set(Protocol.model_fields) - {"tuning_budget", "scores", "score_after"}
    if result.protocol.capability_tasks is None:
        shared -= {"capability_tasks", "capability_limit"}
    protocol = result.protocol.model_dump(mode="json", include=shared)
    return {
        ("stream.fingerprint", None): result.stream.fingerprint,
        ("stream.task", None): result.stream.task,
        **{(f"protocol.{name}", None): value for name, value in protocol.items()},
        ("model.dtype", result.model.name): result.model.dtype,
        ("model.fingerprint", result.model.name): result.model.fingerprint,
    }


def group_comparable(results: Sequence[RunResult]) -> list[list[RunResult]]:
    """Groups runs on one stream by how they were measured, the largest group first.

    A run joins the first group that agrees with it in every condition that both have.
    """
    groups: list[tuple[dict[Condition, Any], list[RunResult]]] = []
    for result in results:
        own = conditions(result)
        for shared, group in groups:
            if not _differing(shared, own):
                shared.update(own)
                group.append(result)
                break
        else:
            groups.append((own, [result]))
    return [group for _, group in sorted(groups, key=lambda group: -len(group[1]))]


def differences(groups: Sequence[Sequence[RunResult]]) -> list[dict[str, str]]:
    """Returns for each group the conditions in which the groups differ, with the group's own values as text."""
    shared = [{name: value for result in group for name, value in conditions(result).items()} for group in groups]
    pairs = ((one, two) for index, two in enumerate(shared) for one in shared[:index])
    fields = list(dict.fromkeys(name for one, two in pairs for name in _differing(one, two)))
    # Another dtype makes other weights.
    differing = [
        (field, model)
        for field, model in fields
        if field != "model.fingerprint" or ("model.dtype", model) not in fields
    ]
    several = len({result.model.name for group in groups for result in group}) > 1
    return [
        {
            f"{field} of {model}" if several and model is not None else field: value_text(found[field, model])
            for field, model in differing
            if (field, model) in found
        }
        for found in shared
    ]


def refuse_mixtures(results: Iterable[RunResult]) -> None:
    """Makes sure that runs on one stream were measured in the same way.

    Raises:
        UserError: If two were not; names both and the first field that differs.
    """
    on_stream: dict[str, list[RunResult]] = {}
    for result in results:
        earlier = on_stream.setdefault(result.stream.name, [])
        for first in earlier:
            one, two = conditions(first), conditions(result)
            for name in _differing(one, two)[:1]:
                names = f"{visible(first.run_id)} and {visible(result.run_id)}"
                raise UserError(
                    f"runs {names} cannot stand in one table: {name[0]} is {value_text(one[name])} in the first and "
                    f"{value_text(two[name])} in the second"
                )
        earlier.append(result)


def value_text(value: Any) -> str:
    """Returns a field's value as JSON on one line; a hash is cut to its first digits.

    >>> value_text(50), value_text("0123456789abcdef" * 4)
    ('50', '"0123456789ab…"')
    """
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,64}", value):
        value = f"{value[:_HASH_DIGITS]}…"
    return visible(json.dumps(value, ensure_ascii=False))


def _differing(one: Mapping[Condition, Any], two: Mapping[Condition, Any]) -> list[Condition]:
    return [name for name in one if name in two and one[name] != two[name]]
