"""Reads hand-written records, from JSON lines or a JSON array, and reports any fault in one line."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Annotated, Any, BinaryIO, Generic, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from grace_bench.common.files import readable
from grace_bench.errors import UserError, did_you_mean

M = TypeVar("M", bound=BaseModel)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "is empty")
    return text


Filled = Annotated[str, AfterValidator(_not_blank)]
"""Text with at least one character that is not white space."""

BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
NO_UTF8 = re.compile("[\udc80-\udcff]")
"""The characters that `surrogateescape` puts in place of invalid bytes; valid UTF-8 never decodes to them."""
_SHOWN = 60


@dataclass(frozen=True)
class Record(Generic[M]):
    """A validated record and where it was found.

    Attributes:
        place: `file:LINE` for JSON lines, `file:LINE: record N` for an array, `file: record N` for a table; lines and
            records are counted from one.
        number: The position of the record in its source, counted from one.
        value: The validated record.
        file: The file or table that holds the record.
    """

    place: str
    number: int
    value: M
    file: str

    def fail(self, field: str, message: str) -> NoReturn:
        """Raises the one-line error for a field of this record."""
        raise UserError(f"{self.place}: field '{field}': {message}")


Parse = Callable[[], Any]
"""Returns a record's JSON value, or raises a one-line `UserError` that says what is wrong with it."""


def read_lines(path: str) -> Iterator[tuple[str, int, Parse]]:
    """Yields for every record of a file its place, the byte offset of its end, and a function that parses it.

    A byte-order mark, Windows line endings and blank lines are accepted. Instead of one object per line, a file may
    hold one JSON array, or one object that spans several lines.

    Args:
        path: The file, in UTF-8.

    Raises:
        UserError: If the file as a whole cannot be read.
    """
    # Binary mode splits at \n alone; str.splitlines would also split at U+2028 and other characters inside text.
    with opened(path) as file:
        is_empty = True
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(BOM) if number == 1 else line
            opening = content.lstrip()[:1] if is_empty else b""
            if opening == b"[":
                for place, parse in _Text(path, content + file.read(), number).items():
                    yield place, file.tell(), parse
                return
            if opening == b"{" and _is_cut(content):
                # Either the file is one object that spans several lines, or its first line is broken.
                after = file.tell()
                try:
                    parse = _Text(path, content + file.read(), number).value()
                except UserError:
                    file.seek(after)
                else:
                    yield f"{path}:{number}", file.tell(), parse
                    return
            if content.strip():
                yield f"{path}:{number}", file.tell(), partial(_parse_line, path, content, number)
            is_empty = is_empty and not content.strip()


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Opens a file; inside the context, what the operating system refuses becomes a one-line `UserError`."""
    try:
        with readable(path).open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder, not a file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error


def _parse_line(path: str, content: bytes, number: int) -> Any:
    return _Text(path, content, number).value()()


def _is_cut(line: bytes) -> bool:
    """Returns whether a line is valid JSON up to its end, where it breaks off."""
    text = line.decode(errors="surrogateescape").strip()
    try:
        _Decoder().decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except RecursionError:
        return False
    return False


class _Decoder(json.JSONDecoder):
    """A decoder that notes invalid content instead of stopping at it, so that the next record can still be found.

    Invalid content means duplicate keys, numbers such as `NaN`, and integers that are too long. Broken syntax raises as
    usual.

    Attributes:
        wrong: The first fault in the content of the last value; empty if there was none.
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._unique_keys, parse_constant=self._no_constant, parse_int=self._whole)
        self.wrong = ""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.wrong = ""
        return super().raw_decode(s, idx)

    def _unique_keys(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                self._note(f"field '{one_line(key)}': is given twice in one object")
            found[key] = value
        return found

    def _no_constant(self, name: str) -> None:
        self._note(f"is not JSON ({name} is no JSON number)")

    def _whole(self, digits: str) -> int | None:
        try:
            return int(digits)
        except ValueError as error:
            self._note(f"is not JSON ({error})")
            return None

    def _note(self, wrong: str) -> None:
        self.wrong = self.wrong or wrong


@dataclass
class _Cursor:
    """Tracks line and byte numbers in a text; it only moves forward, so naming many places takes one pass in all."""

    content: str
    line: int
    byte: int = 1
    position: int = 0

    def move(self, position: int) -> None:
        """Moves to a position at or after the current one."""
        n_lines = self.content.count("\n", self.position, position)
        if n_lines:
            self.line += n_lines
            self.byte = 1
            self.position = self.content.rindex("\n", self.position, position) + 1
        self.byte += len(self.content[self.position : position].encode(errors="surrogateescape"))
        self.position = position


class _Text:
    """JSON text from a file: either a single value, or an array that is read item by item.

    Args:
        path: The file.
        content: The text.
        first_line: The line number in the file at which the text starts.
    """

    def __init__(self, path: str, content: bytes, first_line: int) -> None:
        self._path = path
        # An error at the end of truncated JSON should name the last line with text, not a blank line after it.
        content = content.rstrip(b" \t\r\n")
        try:
            self._content = content.decode()
            self._is_utf8 = True
        except UnicodeDecodeError:
            self._content = content.decode(errors="surrogateescape")
            self._is_utf8 = False
        self._cursor = _Cursor(self._content, first_line)
        self._decoder = _Decoder()

    def value(self) -> Parse:
        """Returns a function that gives the value of the whole text.

        Raises:
            UserError: If the text is not valid JSON.
        """
        self._refuse_nul()
        parse, end = self._read(self._skip(0))
        if end < len(self._content):
            raise self._no_json("Extra data", end, end)
        return parse

    def items(self) -> Iterator[tuple[str, Parse]]:
        """Yields the place of every item of the array, and a function that gives its value.

        Raises:
            UserError: If the text is not valid JSON, after the items before the error were yielded.
        """
        self._refuse_nul()
        content = self._content
        end = self._skip(0)
        if not content.startswith("[", end):
            raise self._no_json("Expecting value", end, end)
        end = self._skip(end + 1)
        is_over = content.startswith("]", end)
        for number in count(1):
            if is_over:
                break
            self._cursor.move(end)
            place = f"{self._path}:{self._cursor.line}: record {number}"
            parse, end = self._read(end, f": record {number}")
            yield place, parse
            is_over = content.startswith("]", end)
            if not is_over:
                if not content.startswith(",", end):
                    raise self._no_json("Expecting ',' delimiter", end, end)
                end = self._skip(end + 1)
        end = self._skip(end + 1)
        if end < len(content):
            raise self._no_json("Extra data", end, end)

    def _read(self, start: int, record: str = "") -> tuple[Parse, int]:
        """Returns a function that gives the value at a position, and the position of the next token."""
        try:
            item, end = self._decoder.raw_decode(self._content, start)
        except json.JSONDecodeError as error:
            raise self._no_json(error.msg, start, error.pos) from error
        except RecursionError as error:
            self._cursor.move(start)
            raise UserError(f"{self._path}:{self._cursor.line}{record}: is nested too deeply") from error
        wrong = self._no_utf8(start, end, record, item)
        if not wrong and self._decoder.wrong:
            self._cursor.move(start)
            wrong = f"{self._path}:{self._cursor.line}{record}: {self._decoder.wrong}"
        return partial(_given, item, wrong), self._skip(end)

    def _skip(self, position: int) -> int:
        """Returns the first position, from `position` on, that is not white space."""
        space = _SPACE.match(self._content, position)
        assert space is not None
        return space.end()

    def _refuse_nul(self) -> None:
        position = self._content.find("\0")
        if position >= 0:
            self._cursor.move(position)
            raise UserError(f"{self._path}:{self._cursor.line}: holds a NUL character, so it is not JSON")

    def _no_json(self, message: str, start: int, position: int) -> UserError:
        """Returns a syntax error, or an encoding error if a byte up to the end of the faulty line is not UTF-8."""
        line_end = self._content.find("\n", position)
        wrong = self._no_utf8(start, line_end if line_end >= 0 else len(self._content))
        if not wrong:
            self._cursor.move(position)
            column = position - self._content.rfind("\n", 0, position)
            wrong = f"{self._path}:{self._cursor.line}: is not JSON ({message}, column {column})"
        return UserError(wrong)

    def _no_utf8(self, start: int, end: int, record: str = "", item: Any = None) -> str:
        """Returns a message that names the first byte in a span that is not UTF-8; empty if all of them are."""
        found = None if self._is_utf8 else NO_UTF8.search(self._content, start, end)
        if found is None:
            return ""
        self._cursor.move(found.start())
        field = _field_without_utf8(item)
        where = f"{self._path}:{self._cursor.line}{record}: " + (f"field '{field}': " if field else "")
        return f"{where}is not UTF-8 (byte {self._cursor.byte} is 0x{ord(found[0]) - 0xDC00:02x})"


def _given(item: Any, wrong: str) -> Any:
    if wrong:
        raise UserError(wrong)
    return item


def _field_without_utf8(item: Any) -> str:
    try:
        return next((_dotted(path) for path, text in _texts(item, ()) if NO_UTF8.search(text)), "")
    except RecursionError:
        return ""


def _texts(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yields every string in a JSON value, keys included, with the path to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key), key
            yield from _texts(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*path, index))
    elif isinstance(value, str):
        yield path, value


def validate(place: str, item: Any, schema: type[M]) -> M:
    """Validates a parsed record against its schema. Types are not converted: `"3"` is not accepted as a number.

    Raises:
        UserError: If the record is not a JSON object, or a field is missing, unknown, empty or of the wrong type; the
            one-line message names the place and the field.
    """
    if not isinstance(item, dict):
        raise UserError(f"{place}: should be a JSON object, not {_kind(item)}")
    try:
        _check_text(place, item)
        # Pydantic's strict mode accepts an array as a tuple only from JSON, not from a Python list.
        return schema.model_validate_json(json.dumps(item), strict=True)
    except RecursionError as error:
        raise UserError(f"{place}: is nested too deeply") from error
    except ValidationError as error:
        errors = error.errors(include_url=False)
    path = _resolve(item, errors[0])
    # A field with a union type gives one error for each type.
    messages = [_explain(error, schema) for error in errors if _resolve(item, error) == path]
    where = f"field '{_dotted(path)}': " if path else ""
    raise UserError(f"{place}: {where}{' or '.join(dict.fromkeys(messages))}")


def _check_text(place: str, item: Any) -> None:
    """Rejects characters that no tokenizer accepts: NUL and unpaired surrogates."""
    for path, text in _texts(item, ()):
        if "\0" in text:
            raise UserError(f"{place}: field '{_dotted(path)}': holds a NUL character")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{place}: field '{_dotted(path)}': holds half of a surrogate pair")


def _resolve(item: Any, error: Any) -> tuple[str | int, ...]:
    """Returns the part of an error's location that exists in the record; pydantic appends names of union branches."""
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
            return one_line(error["msg"])


def _dotted(path: tuple[str | int, ...]) -> str:
    """Writes a path as `locality[0].prompt`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{one_line(step)}" for step in path)
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
    text = one_line(repr(value))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
