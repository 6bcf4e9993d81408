"""States of editors, metrics and checkpoints: tensors and JSON values, nested in dicts and lists."""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from grace_bench.errors import first_error

T = TypeVar("T")

_PLAIN = frozenset({str, int, float, bool, type(None)})


def copied(state: Any) -> Any:
    """Returns a deep copy of a state; over long lists five times as fast as `copy.deepcopy`."""
    if hasattr(state, "clone"):
        return state.clone()
    if isinstance(state, Mapping):
        return {name: value if type(value) in _PLAIN else copied(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [value if type(value) in _PLAIN else copied(value) for value in state]
    return state


def restored(cls: type[T], state: Mapping[str, Any]) -> T:
    """Returns a dataclass made from its state, with every field validated.

    Raises:
        ValueError: If a field is missing or has a value of another type.
    """
    try:
        made: T = _adapter(cast(Any, cls)).validate_python(state)
    except ValidationError as error:
        raise ValueError(f"{cls.__name__}: {first_error(error)}") from error
    return made


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)
