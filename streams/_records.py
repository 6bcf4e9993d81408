"""Streams that make their requests from the records of a data set, in files or on the hub.

A data set may come in several formats; the first valid record of a file decides the format of the file. Every record is
validated and converted. A broken record ends the load with an error that names its place, or is left out and counted
(`on_error`). The requests are cached by the content of the sources and the settings of the stream.
"""

import hashlib
import inspect
import json
import socket
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel

from grace_bench.common.files import readable, write_atomically
from grace_bench.common.options import check_choice
from grace_bench.common.progress import Progress
from grace_bench.data.requests import DerivedRequest, EditRequest
from grace_bench.data.stream import ROLES, EditStream, StreamData
from grace_bench.errors import UserError, reason_of
from grace_bench.streams._lines import Parse, Record, read_lines, validate

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_REPORTED_BYTES = 1 << 20
_REPORTED_ROWS = 1000


@dataclass(frozen=True)
class Format(Generic[M]):
    """A format in which the records of a data set come.

    Attributes:
        name: The name of the format in messages.
        schema: The pydantic model that validates every record.
        signature: The fields that distinguish this format from the others.
    """

    name: str
    schema: type[M]
    signature: frozenset[str]


class Unread(NamedTuple):
    """A record that is not parsed yet.

    Attributes:
        file: The file or table that holds the record; all records of one file have the same format.
        place: The place of the record, as error messages name it.
        parse: Returns the record's JSON value.
    """

    file: str
    place: str
    parse: Parse


class Source(Protocol):
    """A source of records."""

    @property
    def name(self) -> str:
        """The name of the source in errors and progress."""
        ...

    @property
    def digest(self) -> str:
        """A digest of the content: sources with equal content have equal digests."""
        ...

    def records(self, progress: Progress | None) -> Iterator[Unread]:
        """Yields every record."""
        ...


@dataclass(frozen=True)
class Files:
    """A file, or all record files in a folder: JSON lines, JSON arrays or Parquet.

    Attributes:
        path: The file or folder.
        endings: Of a folder, the files whose names end so are read.
    """

    path: str
    endings: ClassVar[tuple[str, ...]] = (".json", ".jsonl", ".parquet")

    @property
    def name(self) -> str:
        return self.path

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """The files, sorted by name."""
        try:
            path = readable(self.path)
        except OSError:
            # Reading the file will raise the error that the user should see.
            return (Path(self.path),)
        if not path.is_dir():
            return (path,)
        found = sorted(file for file in path.iterdir() if file.suffix in self.endings)
        if not found:
            *others, last = self.endings
            endings = f"{', '.join(others)} or {last}" if others else last
            raise UserError(f"{self.path}: the folder holds no {endings} file")
        return tuple(found)

    @cached_property
    def digest(self) -> str:
        total = hashlib.sha256()
        for path in self.paths:
            try:
                with readable(path).open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError:
                # Reading the file will raise the error that the user should see.
                return ""
        return total.hexdigest()

    def records(self, progress: Progress | None) -> Iterator[Unread]:
        for path in self.paths:
            for place, parse in _parquet(path) if path.suffix == ".parquet" else _json(str(path), progress):
                yield Unread(str(path), place, parse)


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub, loaded and cached by `datasets`.

    Attributes:
        repo: The id of the data set, such as `tomh/grace-scotus`.
        split: The split to read.
        option: The option of the stream that takes a downloaded copy of the split instead.
        beside: The other splits that the stream reads, each with its option; named in the error message.
        revision: The commit or tag; None for the newest.
        config: The data set's configuration; None if it has only one.
    """

    repo: str
    split: str
    option: str
    beside: tuple[tuple[str, str], ...] = ()
    revision: str | None = None
    config: str | None = None

    @property
    def name(self) -> str:
        return f"{self.repo}/{self.split}"

    @property
    def digest(self) -> str:
        return f"{self.repo} {self.config} {self.split} {self._rows._fingerprint}"

    def records(self, progress: Progress | None) -> Iterator[Unread]:
        for number, row in enumerate(self._rows, start=1):
            # A table has every column in every row, with None where a record lacks the field.
            given = {name: value for name, value in row.items() if value is not None}
            yield Unread(self.name, f"{self.name}: record {number}", partial(dict, given))
            if progress is not None and (number % _REPORTED_ROWS == 0 or number == len(self._rows)):
                progress(f"reading {self.name}", number, len(self._rows))

    @cached_property
    def _rows(self) -> Any:
        import datasets

        was_offline = datasets.config.HF_HUB_OFFLINE
        # Without a network the hub's retries take half a minute; in offline mode, cached data is found at once.
        datasets.config.HF_HUB_OFFLINE = was_offline or not _hub_has_an_address()
        try:
            return datasets.load_dataset(self.repo, self.config, split=self.split, revision=self.revision)
        except Exception as error:  # Network, hub, disk and format errors come from different libraries.
            place = f"https://huggingface.co/datasets/{self.repo}/tree/refs%2Fconvert%2Fparquet"
            more = "".join(f", those of split {split} as {option}=" for split, option in self.beside)
            raise UserError(
                f"data set {self.repo} cannot be loaded ({reason_of(error)}); without a network, get the Parquet files "
                f"of split {self.split} from {place} and give their place as {self.option}={more}"
            ) from error
        finally:
            datasets.config.HF_HUB_OFFLINE = was_offline


class Reader:
    """Reads sources and counts the records that are left out.

    Args:
        on_error: `raise`, or `skip` to leave out broken records.
        progress: Called during long reads.

    Attributes:
        left_out: How many records were left out, by reason.
    """

    def __init__(self, *, on_error: str = "raise", progress: Progress | None = None) -> None:
        self.on_error = on_error
        self.progress = progress
        self.left_out: Counter[str] = Counter()

    def read(
        self,
        source: Source,
        formats: Sequence[Format[Any]],
        convert: Callable[[Record[Any]], T | None],
        *,
        id_fields: Sequence[str] = (),
    ) -> list[T]:
        """Returns the converted records of a source, in the order of the source.

        Args:
            source: The source to read.
            formats: The formats that the records may have; the first valid record of a file decides for the file.
            convert: Converts a validated record. Returns None to skip the record, after counting it with `leave_out`,
                and calls `Record.fail` to report a fault.
            id_fields: Fields whose values must be unique within the source; records without such a field are allowed.

        Raises:
            UserError: If the source cannot be read or holds no records or, with `on_error="raise"`, at the first broken
                record; the one-line message names its place and field.
        """
        chosen: dict[str, Format[Any]] = {}
        first_seen: dict[tuple[str, str], str] = {}
        made: list[T] = []
        number = 0
        for number, (file, place, parse) in enumerate(source.records(self.progress), start=1):
            try:
                item = parse()
                known = chosen.get(file) or recognised(place, item, formats)
                record = Record(place, number, validate(place, item, known.schema), file)
                chosen[file] = known
                for field in id_fields:
                    given = getattr(record.value, field, None)
                    if given is None:
                        continue
                    if (field, str(given)) in first_seen:
                        record.fail(field, f"{str(given)!r} was used before, at {first_seen[field, str(given)]}")
                    first_seen[field, str(given)] = place
                converted = convert(record)
            except UserError:
                if self.on_error == "raise":
                    raise
                self.leave_out("broken")
                continue
            if converted is not None:
                made.append(converted)
        if not number:
            raise UserError(f"{source.name}: holds no records")
        return made

    def leave_out(self, reason: str) -> None:
        """Counts a record that is left out of all roles, under its reason."""
        self.left_out[reason] += 1


class RecordStream(EditStream):
    """A stream made from records; a subclass names its sources and converts their records to requests.

    Attributes:
        on_error: `raise`, or `skip` to leave broken records out and count them; an option of every such stream.
    """

    on_error: str = "raise"

    @abstractmethod
    def sources(self) -> tuple[Source, ...]:
        """Returns all sources that `read` reads."""

    @abstractmethod
    def read(self, reader: Reader) -> StreamData:
        """Reads the sources and returns the requests; `load` fills in `left_out`."""

    def load(self) -> StreamData:
        """Returns the requests, from the cache if the same content was already read with the same settings."""
        check_choice("stream.on_error", self.on_error, ("raise", "skip"))
        path = self._cached()
        kept = _load(path)
        if kept is not None:
            return kept
        reader = Reader(on_error=self.on_error, progress=self.progress)
        made = self.read(reader)
        if not made.edits:
            raise UserError(
                f"stream '{self.registered_name}' has no requests left to edit in "
                f"{', '.join(source.name for source in self.sources())} ({_counts(reader.left_out)})"
            )
        data = StreamData(**{**vars(made), "left_out": dict(sorted(reader.left_out.items()))})
        _keep(path, data)
        return data

    def _cached(self) -> Path:
        from grace_bench.data.artifacts import cache_folder, content_key

        # A path enters the key only as given or not given: its content is in the digests, wherever the file is.
        settings = {
            name: getattr(self, name) is not None if name.endswith("path") else getattr(self, name)
            for name in (*inspect.signature(type(self)).parameters, "n_model_labels")
        }
        key = content_key(
            settings=settings,
            sources=[source.digest for source in self.sources()],
            code=_code(),
        )
        return cache_folder() / "streams" / self.registered_name / f"{key}.json"


def _hub_has_an_address() -> bool:
    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def recognised(place: str, item: Any, formats: Sequence[Format[Any]]) -> Format[Any]:
    """Returns the format whose signature fields best match a record's fields.

    Raises:
        UserError: If the record has no field of any format, or matches several formats equally well and none
            completely; the one-line message names the place.
    """
    if len(formats) == 1:
        return formats[0]
    fields = set(item) if isinstance(item, dict) else set()
    shares = [len(known.signature & fields) / len(known.signature) for known in formats]
    best = [known for known, share in zip(formats, shares, strict=True) if share == max(shares)]
    if not max(shares):
        wanted = "; ".join(f"{known.name}: {', '.join(sorted(known.signature))}" for known in formats)
        raise UserError(f"{place}: is a record of none of the formats read here ({wanted})")
    if max(shares) < 1 and len(best) > 1:
        missing = dict.fromkeys(name for known in best for name in sorted(known.signature - fields))
        raise UserError(f"{place}: field {' or '.join(map(repr, missing))}: is missing")
    return best[0]


def _json(path: str, progress: Progress | None) -> Iterator[tuple[str, Parse]]:
    reported = position = 0
    for place, position, parse in read_lines(path):
        yield place, parse
        if progress is not None and position - reported >= _REPORTED_BYTES:
            reported = position
            progress(f"reading {path}", position, Path(path).expanduser().stat().st_size)
    if progress is not None and reported:
        progress(f"reading {path}", position, position)


def _parquet(path: Path) -> Iterator[tuple[str, Parse]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(readable(path)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({reason_of(error)})") from error
    for number, row in enumerate(rows, start=1):
        given = {name: value for name, value in row.items() if value is not None}
        yield f"{path}: record {number}", partial(dict, given)


def _counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items())) or "the source holds none"


def _code() -> str:
    """Returns a digest of the code that makes requests from records, so that other versions do not share its cache."""
    digest = hashlib.sha256()
    for module in sorted(Path(str(files("grace_bench.streams"))).glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def _load(path: Path) -> StreamData | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        roles = {role: tuple(map(_request, kept[role])) for role in ROLES}
    except (OSError, ValueError, KeyError, TypeError):
        # The file is missing or incomplete: the requests are made again.
        return None
    return StreamData(**roles, label_names=tuple(kept["label_names"]), left_out=kept["left_out"])


def _request(kept: dict[str, Any]) -> EditRequest:
    return (DerivedRequest if "target_from_model" in kept else EditRequest).model_validate(kept)


def _keep(path: Path, data: StreamData) -> None:
    content: dict[str, Any] = {
        role: [request.model_dump(mode="json") for request in getattr(data, role)] for role in ROLES
    }
    content |= {"label_names": data.label_names, "left_out": dict(data.left_out)}
    try:
        write_atomically(path, json.dumps(content, ensure_ascii=False))
    except OSError:
        # A cache that cannot be written only means that the next run reads the sources again.
        return
