"""Records that people wrote, as JSON lines or a JSON array; whatever is wrong with one is told in one line."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Annotated, Any, Generic, NoReturn, TypeVar

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
"""Text that is more than white space."""

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_NO_UTF8 = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of a byte that is no UTF-8; no UTF-8 holds it."""
_SHOWN = 60


@dataclass(frozen=True)
class Record(Generic[M]):
    """One record and its place.

    Attributes:
        place: `file:LINE` for JSON lines, `file:LINE: record N` for an array, `file: record N` for a table; counted
            from one.
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
                opening = content.lstrip()[:1] if is_empty else b""
                if opening == b"[":
                    for place, parse in _Text(path, content + file.read(), number).items():
                        yield place, file.tell(), parse
                    return
                if opening == b"{" and _is_cut(content):
                    # Either the file is one object over several lines, or its first line is broken.
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
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder, not a file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error


def _parse_line(path: str, content: bytes, number: int) -> Any:
    return _Text(path, content, number).value()()


def _is_cut(line: bytes) -> bool:
    """Whether a line is JSON as far as it goes."""
    text = line.decode(errors="surrogateescape").strip()
    try:
        _Decoder().decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except RecursionError:
        return False
    return False


class _Decoder(json.JSONDecoder):
    """Reads on to the end of a value whose syntax is JSON's and whose content is not, so that the next one is found.

    Attributes:
        wrong: What was wrong with the content of the last value; empty for nothing.
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
                self._note(f"field '{_one_line(key)}': is given twice in one object")
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
    """A place in a text that goes forward only, so that naming any number of places takes one pass."""

    content: str
    line: int
    byte: int = 1
    position: int = 0

    def move(self, position: int) -> None:
        """Goes to a position that is not before this one."""
        n_lines = self.content.count("\n", self.position, position)
        if n_lines:
            self.line += n_lines
            self.byte = 1
            self.position = self.content.rindex("\n", self.position, position) + 1
        self.byte += len(self.content[self.position : position].encode(errors="surrogateescape"))
        self.position = position


class _Text:
    """JSON text in a file: one value, or an array whose items are wanted one by one.

    Args:
        path: The file.
        content: The text.
        first_line: The number of its first line.
    """

    def __init__(self, path: str, content: bytes, first_line: int) -> None:
        self._path = path
        # What is cut ends on its own line.
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
        """Returns what gives the text's value.

        Raises:
            UserError: If its syntax is not JSON's.
        """
        self._refuse_nul()
        parse, end = self._read(self._skip(0))
        if end < len(self._content):
            raise self._no_json("Extra data", end, end)
        return parse

    def items(self) -> Iterator[tuple[str, Parse]]:
        """Yields the place of every item of the array and what gives it.

        Raises:
            UserError: If its syntax is not JSON's, once the items before are told.
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
        """Returns what gives the value at a position, and where the next thing is."""
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
        """Returns where white space ends."""
        space = _SPACE.match(self._content, position)
        assert space is not None
        return space.end()

    def _refuse_nul(self) -> None:
        position = self._content.find("\0")
        if position >= 0:
            self._cursor.move(position)
            raise UserError(f"{self._path}:{self._cursor.line}: holds a NUL character, so it is no JSON text")

    def _no_json(self, message: str, start: int, position: int) -> UserError:
        """Returns the error of broken syntax; that a byte before it, or on its line, is no UTF-8 says more."""
        line_end = self._content.find("\n", position)
        wrong = self._no_utf8(start, line_end if line_end >= 0 else len(self._content))
        if not wrong:
            self._cursor.move(position)
            column = position - self._content.rfind("\n", 0, position)
            wrong = f"{self._path}:{self._cursor.line}: is not JSON ({message}, column {column})"
        return UserError(wrong)

    def _no_utf8(self, start: int, end: int, record: str = "", item: Any = None) -> str:
        """Says which byte in a part of the text is no UTF-8, if one is."""
        found = None if self._is_utf8 else _NO_UTF8.search(self._content, start, end)
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
        return next((_dotted(path) for path, text in _texts(item, ()) if _NO_UTF8.search(text)), "")
    except RecursionError:
        return ""


def _texts(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yields every text in a JSON value, keys too, with the path to it."""
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
    """Returns a parsed record as its schema has it. Nothing is converted: `"3"` is no number.

    Raises:
        UserError: In one line with place and field: it is no JSON object, or a field is missing, unknown, empty or
            of another type.
    """
    if not isinstance(item, dict):
        raise UserError(f"{place}: should be a JSON object, not {_kind(item)}")
    try:
        _check_text(place, item)
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


def _check_text(place: str, item: Any) -> None:
    """Refuses what no tokenizer takes: NUL, and half of a surrogate pair."""
    for path, text in _texts(item, ()):
        if "\0" in text:
            raise UserError(f"{place}: field '{_dotted(path)}': holds a NUL character")
        if any("\ud800" <= character <= "\udfff" for character in text):
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
