"""Records that people wrote, as JSON lines or a JSON array; whatever is wrong with one is told in one line."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Generic, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from grace_bench.errors import UserError, did_you_mean
from grace_bench.files import readable

M = TypeVar("M", bound=BaseModel)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "is empty")
    return text


Filled = Annotated[str, AfterValidator(_not_blank)]
"""Text that is more than white space."""

_BOM = b"\xef\xbb\xbf"
_SHOWN = 60


@dataclass(frozen=True)
class Record(Generic[M]):
    """One record and its place.

    Attributes:
        place: `file:LINE` for JSON lines, `file: record N` for an array, counted from one.
        number: Its number among the records of the source, counted from one.
        value: The validated record.
    """

    place: str
    number: int
    value: M

    def fail(self, field: str, message: str) -> NoReturn:
        """Raises the one-line error for a field of this record."""
        raise UserError(f"{self.place}: field '{field}': {message}")


Parse = Callable[[], Any]
"""Gives a record's JSON value, or raises the one-line error of what is wrong with it."""


def read_lines(path: str) -> Iterator[tuple[str, int, Parse]]:
    """Yields the place of every record of a file, the byte where it ends and what parses it.

    A byte-order mark, Windows line ends and blank lines do no harm. A file may hold one JSON array,
    or one object over several lines, instead of an object a line.

    Args:
        path: The file, UTF-8.

    Raises:
        UserError: If the file as a whole cannot be read.
    """
    try:
        # Binary lines end at \n alone; text may hold U+2028 and more that str.splitlines breaks at.
        with readable(path).open("rb") as file:
            is_empty = True
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(_BOM) if number == 1 else line
                if is_empty and content.lstrip().startswith(b"["):
                    content += file.read()
                    for place, item in _array(path, content, number):
                        yield place, file.tell(), partial(_given, item)
                    return
                if is_empty and content.strip() == b"{":
                    # Either the file is one object over several lines, or its first line is broken.
                    after = file.tell()
                    try:
                        whole = _parse(_decode(content + file.read(), path), path)
                    except UserError:
                        file.seek(after)
                    else:
                        yield f"{path}: record 1", file.tell(), partial(_given, whole)
                        return
                if content.strip():
                    yield f"{path}:{number}", file.tell(), partial(_parse_line, content, f"{path}:{number}")
                is_empty = is_empty and not content.strip()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder, not a file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error


def _given(item: Any) -> Any:
    return item


def _parse_line(content: bytes, place: str) -> Any:
    return _parse(_decode(content, place), place)


def _array(path: str, content: bytes, first_line: int) -> Iterator[tuple[str, Any]]:
    parsed = _parse(_decode(content, path), path, lines_before=first_line - 1)
    for number, item in enumerate(parsed, start=1):
        yield f"{path}: record {number}", item


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: is not UTF-8 (byte {error.start + 1} is 0x{content[error.start]:02x})") from error


class _RepeatedKeyError(ValueError):
    pass


def _parse(text: str, place: str, *, lines_before: int | None = None) -> Any:
    """Parses strict JSON; `lines_before` is given where `place` is a whole file, to name an error's line."""
    if "\0" in text:
        raise UserError(f"{place}: holds a NUL character, so it is no JSON text")
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if lines_before is not None:
            place = f"{place}:{lines_before + error.lineno}"
        raise UserError(f"{place}: is not JSON ({error.msg}, column {error.colno})") from error
    except _RepeatedKeyError as error:
        raise UserError(f"{place}: field '{error}': is given twice in one object") from error
    except ValueError as error:
        raise UserError(f"{place}: is not JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{place}: is nested too deeply") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(_one_line(key))
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def validate(place: str, item: Any, schema: type[M]) -> M:
    """Returns a parsed record as its schema has it. Nothing is converted: `"3"` is no number.

    Raises:
        UserError: In one line with place and field: it is no JSON object, or a field is missing, unknown, empty or
            of another type.
    """
    if not isinstance(item, dict):
        raise UserError(f"{place}: should be a JSON object, not {_kind(item)}")
    try:
        _check_text(place, item, ())
        # Through JSON, where arrays are the tuples of a strict schema.
        return schema.model_validate_json(json.dumps(item), strict=True)
    except RecursionError as error:
        raise UserError(f"{place}: is nested too deeply") from error
    except ValidationError as error:
        errors = error.errors(include_url=False)
    path = _resolve(item, errors[0])
    # A field that may be of two types has one error a type.
    messages = [_explain(error, schema) for error in errors if _resolve(item, error) == path]
    where = f"field '{_dotted(path)}': " if path else ""
    raise UserError(f"{place}: {where}{' or '.join(dict.fromkeys(messages))}")


def _check_text(place: str, value: Any, path: tuple[str | int, ...]) -> None:
    """Refuses what no tokenizer takes: NUL, and half of a surrogate pair."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_text(place, key, (*path, key))
            _check_text(place, inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_text(place, inner, (*path, index))
    elif isinstance(value, str):
        if "\0" in value:
            raise UserError(f"{place}: field '{_dotted(path)}': holds a NUL character")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{place}: field '{_dotted(path)}': holds half of a surrogate pair")


def _resolve(item: Any, error: Any) -> tuple[str | int, ...]:
    """Returns the part of an error's location that is in the record; the rest names branches of a union."""
    path: tuple[str | int, ...] = ()
    for step in error["loc"]:
        try:
            item = item[step]
        except (KeyError, IndexError, TypeError):
            return (*path, step) if error["type"] == "missing" else path
        path = (*path, step)
    return path


def _explain(error: Any, schema: type[BaseModel]) -> str:
    given = error["input"]
    match error["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            fields = schema.model_fields if len(error["loc"]) == 1 else ()
            return f"is not a known field{did_you_mean(str(error['loc'][-1]), fields)}"
        case "string_too_short" | "too_short":
            return "is empty"
        case "string_type":
            return f"should be text, not {_kind(given)}"
        case "int_type":
            return f"should be a whole number, not {_kind(given)}"
        case "tuple_type":
            return f"should be a list, not {_kind(given)}"
        case "dict_type" | "model_type":
            return f"should be an object, not {_kind(given)}"
        case _:
            return _one_line(error["msg"])


def _dotted(path: tuple[str | int, ...]) -> str:
    """Writes a path as `locality[0].prompt`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{_one_line(step)}" for step in path)
    return "".join(steps).removeprefix(".")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return f"the number {_shown(value)}"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"


def _shown(value: Any) -> str:
    text = _one_line(repr(value))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
