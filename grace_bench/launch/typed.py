"""Values as typed on the command line, and as Hydra's grammar takes them.

Hydra's grammar gives characters such as `=`, `#`, `'` and every letter beyond ASCII no meaning in a value, and refuses
them unless the value is quoted. Here a value that is plain text is quoted where that is needed.
"""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from grace_bench.errors import UserError

_REFUSED = object()
"""Stands for what Hydra's grammar makes of text that it refuses."""
_MARKS = re.compile(r"""['"\[{(]""")
"""What may enclose a comma that separates no values."""


def quote_plain_text(override: str) -> str:
    """Returns an override in which every value that is plain text, and that Hydra would refuse or strip, is quoted.

    Quoted text, lists, dictionaries, functions, interpolations and the commas of a sweep keep their meaning.

    >>> print(quote_plain_text("stream.path=/data/run=1.jsonl"))
    stream.path='/data/run=1.jsonl'
    >>> print(quote_plain_text("stream.path=/data/a.jsonl,/data/b#2.jsonl"))
    stream.path=/data/a.jsonl,'/data/b#2.jsonl'
    >>> print(quote_plain_text("editor.prefix_lengths=[3,5]"))
    editor.prefix_lengths=[3,5]

    Raises:
        UserError: If a value begins and ends like a list, a dictionary, a function or quoted text and is none,
            or is not UTF-8; says what to type.
    """
    name, equals, value = override.partition("=")
    if not equals:
        return override
    _refuse_undecodable(override)
    elements = _elements(value)
    for element in elements:
        if _read(element) is _REFUSED and _has_structure(element):
            raise UserError(
                f"{override}: cannot be read as a list, dictionary, function or quoted text: quote each text inside "
                f"it, or type {_as_typed(name, value)} for one text"
            )
    quoted = [_quoted(element) if _needs_quotes(element) else element for element in elements]
    return override if quoted == elements else f"{name}={','.join(quoted)}"


def refuse_several(override: str) -> None:
    """Raises `UserError` if the value of an override is several values, as in a sweep; says what to type."""
    name, _, value = override.partition("=")
    if len(_elements(value)) > 1:
        raise UserError(
            f"{override}: commas separate the values of a sweep: add -m, or type {_as_typed(name, value)} for one text"
        )


def texts_of(value: str) -> list[str]:
    """Returns the values that a typed value stands for, several in a sweep, without quotes.

    >>> texts_of("grace,ft"), texts_of("'a,b'"), texts_of("/data/run=1")
    (['grace', 'ft'], ['a,b'], ['/data/run=1'])
    """
    texts = []
    for element in _elements(value):
        read = _read(element)
        read = read.text if isinstance(read, QuotedString) else read
        texts.append(read if isinstance(read, str) else element)
    return texts


def _elements(value: str) -> list[str]:
    """The values that the commas of a value separate, as typed; one keeps the spaces around it."""
    elements = list(_split(value))
    return elements if len(elements) == 1 else [element.strip(" \t") for element in elements]


def _split(value: str) -> Iterator[str]:
    parts = value.split(",")
    while parts:
        # A comma inside quotes or brackets separates nothing: the shortest run of parts that Hydra reads is one value.
        runs = range(1, len(parts) + 1) if _MARKS.search(parts[0]) else (1,)
        n_parts = next((n for n in runs if _read(",".join(parts[:n])) is not _REFUSED), 1)
        yield ",".join(parts[:n_parts])
        parts = parts[n_parts:]


def _needs_quotes(element: str) -> bool:
    read = _read(element)
    # Hydra strips plain text.
    return read is _REFUSED or (isinstance(read, str) and read == element.strip(" \t") != element)


def _has_structure(element: str) -> bool:
    """Whether an element begins and ends like one that is no plain text."""
    text = element.strip(" \t")
    function = re.match(r"(\w+)\(.*\)$", text, re.DOTALL)
    return (text[:1] + text[-1:] in ("[]", "{}", "''", '""') and len(text) > 1) or (
        function is not None and function[1] in create_functions().functions
    )


@cache
def _read(element: str) -> Any:
    """What Hydra's grammar makes of one value; `_REFUSED` if that is an error."""
    try:
        return OverridesParser.create().parse_override(f"value={element}")._value
    except (HydraException, ArithmeticError, RecursionError, ValueError):
        return _REFUSED


def _quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _as_typed(name: str, text: str) -> str:
    """The argument of a shell's command line that gives an option a text."""
    return shlex.quote(f"{name}={QuotedString(text=text, quote=Quote.double).with_quotes()}")


def _refuse_undecodable(override: str) -> None:
    try:
        override.encode()
    except UnicodeEncodeError as error:
        shown = override.encode(errors="backslashreplace").decode()
        raise UserError(f"{shown}: is not UTF-8") from error
