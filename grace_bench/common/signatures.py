"""Checks of registered classes, from the class alone; each fault is reported in one line that says what to do."""

import dis
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from types import CodeType
from typing import Any

from grace_bench.errors import did_you_mean

_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def class_fault(cls: type) -> str | None:
    """Returns what is wrong with a class's docstring or abstract methods; None if nothing.

    >>> class Bare:
    ...     pass
    >>> class_fault(Bare)
    'Bare has no docstring: write one, its first line describes the class in listings'
    """
    if not (cls.__doc__ or "").strip():
        return f"{cls.__name__} has no docstring: write one, its first line describes the class in listings"
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        return f"{cls.__name__} is abstract: implement {', '.join(missing)}"
    return None


def constructor_fault(cls: type, *, base: type, given: Sequence[str] = ()) -> str | None:
    """Returns what is wrong with a constructor whose arguments are to become options; None if nothing.

    An option is a keyword-only argument, stored in an attribute of its own name by the `__init__` of a class below
    `base`, or found there as a property or class attribute.

    Args:
        cls: The class.
        base: The class that its kind is derived from.
        given: Arguments that the harness passes. They must exist and are not options.
    """
    parameters = inspect.signature(cls).parameters
    name_of_init = f"{cls.__name__}.__init__"
    many = next((p.replace(annotation=p.empty) for p in parameters.values() if p.kind in _ANY_NUMBER), None)
    if many is not None:
        return f"{name_of_init} takes {many}: name every argument, each becomes an option with its default"
    lacking = [name for name in given if name not in parameters]
    if lacking:
        return f"{name_of_init} lacks {', '.join(lacking)}: take them and pass them on to super().__init__"
    options = [parameter for parameter in parameters.values() if parameter.name not in given]
    positional = [option.name for option in options if option.kind is not inspect.Parameter.KEYWORD_ONLY]
    if positional:
        return f"{name_of_init} takes {', '.join(positional)} by position: put `*` in front to make it keyword-only"
    kept = set(stored_attributes(cls, base=base)) | set(_class_attributes(cls, base=base))
    lost = next((option.name for option in options if option.name not in kept), None)
    if lost is not None:
        return f"{name_of_init} does not keep its argument {lost!r}: set `self.{lost} = {lost}`"
    return None


def hide_argument(function: Callable[..., Any], name: str) -> None:
    """Leaves an argument out of the signature that a function shows; it still takes it."""
    shown = inspect.signature(function)
    parameters = [parameter for parameter in shown.parameters.values() if parameter.name != name]
    function.__signature__ = shown.replace(parameters=parameters)  # type: ignore[attr-defined]


def required_argument(cls: type) -> str | None:
    """Returns the name of the first constructor argument without a default; None if there is none.

    >>> required_argument(object)
    >>> class Named:
    ...     def __init__(self, *, name):
    ...         self.name = name
    >>> required_argument(Named)
    'name'
    """
    required = (
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in _ANY_NUMBER
    )
    return next(required, None)


def choice_fault(what: str, value: str, choices: Sequence[str]) -> str | None:
    """Returns that a name is unknown, with the closest known one; None if it is known.

    >>> choice_fault("task of Points", "clasification", ["classification", "qa"])
    "task of Points is 'clasification'; did you mean 'classification'? (there are: classification, qa)"
    """
    if value in choices:
        return None
    return f"{what} is {value!r}{did_you_mean(str(value), choices)} (there are: {', '.join(choices)})"


def stored_attributes(cls: type, *, base: type) -> Iterator[str]:
    """Yields the names of the attributes that the `__init__` methods of a class and its bases below `base` assign."""
    for part in takewhile(lambda part: part is not base, cls.__mro__):
        init = inspect.unwrap(vars(part).get("__init__", object.__init__))
        yield from _stored(getattr(init, "__code__", None))


def _stored(code: CodeType | None) -> Iterator[str]:
    if code is None:
        return
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR":
            yield str(instruction.argval)


def _class_attributes(cls: type, *, base: type) -> Iterator[str]:
    for part in takewhile(lambda part: part is not base, cls.__mro__):
        yield from (name for name, value in vars(part).items() if isinstance(value, property) or not callable(value))
