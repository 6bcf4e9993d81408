"""A corpus of broken input: streams, settings, run folders, checkpoints, editors and models, each broken in one way.

Everything is made from something valid by a seeded generator, so that a case is the same wherever it is made. What a
case does to its input is known, not what becomes of it: that is for whoever carries it out.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tree = Any
"""What JSON can hold."""


@dataclass(frozen=True)
class Ask:
    """A command on broken input.

    Attributes:
        command: What `grace-bench` is given.
        given: The folder that holds the input, which no refusal may change.
        names: What a message must name.
        goes_on: Whether the command may write there when it is not a refusal, as `resume` does.
    """

    command: tuple[str, ...]
    given: Path
    names: tuple[str, ...]
    goes_on: bool = False


@dataclass(frozen=True)
class Case:
    """One broken input.

    Attributes:
        kind: What is broken.
        damage: How.
        arrange: Makes the input in an empty folder, and says what is done with it.
        may_be_valid: Whether the damage may by chance leave something valid, as a cut between two lines does.
        number: Tells cases of one kind and damage apart.
    """

    kind: str
    damage: str
    arrange: Callable[[Path], Ask]
    may_be_valid: bool = False
    number: int = 0

    @property
    def name(self) -> str:
        """Unique in the corpus."""
        return f"{self.kind}: {self.damage} ({self.number})"

    @property
    def group(self) -> str:
        """What is broken, in few words: kinds that are told of together."""
        return self.kind.partition(":")[0].partition(",")[0]


@dataclass(frozen=True)
class Bases:
    """What is valid.

    Attributes:
        runs: A folder with finished runs of two editors and two seeds.
        stopped: The folder of a run that was interrupted, with its checkpoints.
        models: Folders of models by name.
        data: A folder with slices of real data sets; None where they are not.
    """

    runs: Path
    stopped: Path
    models: Mapping[str, Path]
    data: Path | None = None


# --- Files, whatever is in them ---------------------------------------------------------------------------------------

Damage = Callable[[Path, random.Random], None]


def _rewriting(change: Callable[[bytes, random.Random], bytes]) -> Damage:
    def damage(path: Path, choice: random.Random) -> None:
        path.write_bytes(change(path.read_bytes(), choice))

    return damage


def _replacing(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path, choice: random.Random) -> None:
        path.unlink()
        make(path)

    return damage


def _cut(content: bytes, choice: random.Random) -> bytes:
    return content[: choice.randrange(1, len(content))]


def _without_a_part(content: bytes, choice: random.Random) -> bytes:
    start, end = sorted(choice.sample(range(len(content)), 2))
    return content[:start] + content[end:]


def _with_a_byte_changed(content: bytes, choice: random.Random) -> bytes:
    place = choice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << choice.randrange(8))]) + content[place + 1 :]


def _with(inserted: bytes) -> Callable[[bytes, random.Random], bytes]:
    def insert(content: bytes, choice: random.Random) -> bytes:
        place = choice.randrange(len(content))
        return content[:place] + inserted + content[place:]

    return insert


WHOLE: Mapping[str, Damage] = {
    "empty": _rewriting(lambda content, choice: b""),
    "zeros, as after a power cut": _rewriting(lambda content, choice: bytes(len(content))),
    "random bytes": _rewriting(lambda content, choice: choice.randbytes(len(content))),
    "UTF-16": _rewriting(lambda content, choice: content.decode("latin-1").encode("utf-16")),
    "a folder in its place": _replacing(Path.mkdir),
    "a link to nothing": _replacing(lambda path: path.symlink_to("nothing")),
    "a link to itself": _replacing(lambda path: path.symlink_to(path.name)),
    "a pipe in its place": _replacing(os.mkfifo),
    "missing": lambda path, choice: path.unlink(),
}
"""What spoils a file as a whole."""
if os.geteuid():
    # Who may do everything may read everything.
    WHOLE = {**WHOLE, "no permission to read": lambda path, choice: path.chmod(0)}

PARTLY: Mapping[str, Damage] = {
    "cut": _rewriting(_cut),
    "a part left out": _rewriting(_without_a_part),
    "one bit changed": _rewriting(_with_a_byte_changed),
    "a byte that is not UTF-8": _rewriting(_with(b"\xff")),
    "a NUL byte": _rewriting(_with(b"\0")),
}
"""What spoils a place in a file, and may by chance leave it valid."""


# --- JSON -------------------------------------------------------------------------------------------------------------

_DEEP = 100_000
_MARK = "\ue000"

ODD_JSON: Mapping[str, str] = {
    "nested 100,000 deep": "[" * _DEEP + "]" * _DEEP,
    "a number of 5,000 digits": "9" * 5000,
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "half a surrogate pair": r'"\ud800"',
    "a NUL character": r'"a\u0000b"',
    "a bare word": "undefined",
    "single quotes": "'text'",
}
"""JSON text, or nearly so, that stands in for a value."""

WRONG_VALUES: Mapping[str, Tree] = {
    "null": None,
    "true": True,
    "a list": [],
    "an object": {"unknown": 1},
    "text": "not what it should be",
    "a negative number": -7,
    "a fraction": 0.5,
    "a huge number": 10**400,
}
"""Values that stand in for one of another type."""


def paths_in(tree: Tree, *, but: Sequence[str] = ()) -> list[tuple[str | int, ...]]:
    """Returns the paths to all that is in a tree, save what lies under some names at its top."""
    found: list[tuple[str | int, ...]] = []

    def walk(part: Tree, path: tuple[str | int, ...]) -> None:
        items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for name, inner in items:
            if not path and name in but:
                continue
            found.append((*path, name))
            walk(inner, (*path, name))

    walk(tree, ())
    return found


def changed(tree: Tree, path: Sequence[str | int], value: Tree) -> Tree:
    """Returns a copy of a tree with a value put at a path."""
    tree = json.loads(json.dumps(tree))
    part = tree
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    return tree


def without(tree: Tree, path: Sequence[str | int]) -> Tree:
    """Returns a copy of a tree without what is at a path."""
    tree = json.loads(json.dumps(tree))
    part = tree
    for step in path[:-1]:
        part = part[step]
    del part[path[-1]]
    return tree


def with_text(tree: Tree, path: Sequence[str | int], text: str) -> str:
    """Returns a tree as JSON with some text, which need not be JSON, at a path."""
    return json.dumps(changed(tree, path, _MARK), ensure_ascii=False).replace(f'"{_MARK}"', text)


def _type(value: Tree) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def broken_json(tree: Tree, choice: random.Random, *, but: Sequence[str] = ()) -> Iterator[tuple[str, str, bool]]:
    """Yields ways to break a JSON object: what was done, the text, and whether that may be valid by chance."""
    paths = paths_in(tree, but=but)

    def at(path: Sequence[str | int]) -> Tree:
        part = tree
        for step in path:
            part = part[step]
        return part

    yield "the last bracket missing", json.dumps(tree)[:-1], False
    yield "a trailing comma", json.dumps(tree)[:-1] + ",}", False
    yield "a list instead", json.dumps([tree, tree]), True
    yield "a number instead", "3", False
    yield "null instead", "null", False
    yield "text instead", '"text"', False
    for damage, text in ODD_JSON.items():
        yield (
            damage,
            with_text(tree, choice.choice(paths), text),
            damage in ("half a surrogate pair", "a NUL character"),
        )
    for damage, value in WRONG_VALUES.items():
        others = [path for path in paths if _type(at(path)) != _type(value)]
        if not others:
            continue
        path = choice.choice(others)
        yield f"{damage} for {_type(at(path))}", json.dumps(changed(tree, path, value)), True
    top = [path for path in paths if len(path) == 1]
    yield "a field missing", json.dumps(without(tree, choice.choice(top))), True
    name = choice.choice(top)[0]
    yield "a field twice", json.dumps(tree)[:-1] + f", {json.dumps(name)}: 1}}", True
    yield "an unknown field", json.dumps({**tree, "unknown": 1}), True


# --- Streams ----------------------------------------------------------------------------------------------------------

SMALL = ("max_edits=1", "max_upstream=5", "wandb.mode=disabled")


def _stream_command(stream: str, path: Path, folder: Path, *more: str) -> tuple[str, ...]:
    task = ("stream.task=classification",) if stream == "jsonl" else ()
    model = {"jsonl": "toy", "zsre": "atlas-qa", "scotus": "atlas-drift"}.get(stream, "atlas-text")
    return (
        "run",
        f"stream={stream}",
        f"stream.path={path}",
        *task,
        f"model={model}",
        "editor=none",
        *SMALL,
        f"out={folder / 'out'}",
        *more,
    )


def points(n: int) -> list[Tree]:
    """Requests for the toy model, with every field that a request may have."""
    choice = random.Random("points")
    made = []
    for number in range(n):
        prompts = [f"({choice.uniform(-3, 3):.4f}, {choice.uniform(-3, 3):.4f})" for _ in range(3)]
        made.append(
            {
                "id": f"point/{number}",
                "prompt": prompts[0],
                "target": choice.randrange(2),
                "subject": prompts[0],
                "rephrases": [prompts[1]],
                "locality": [{"prompt": prompts[2], "target": choice.randrange(2), "metadata": {}}],
                "portability": [],
                "metadata": {"fact": f"fact {number}"},
            }
        )
    return made


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def stream_cases(bases: Bases) -> Iterator[Case]:
    """Yields broken files of requests, each read to fail at the first broken record and to skip it."""
    own = [json.dumps(record) for record in points(12)]
    yield from _lines_cases("stream jsonl", "jsonl", own, n_records=3)
    real = {
        "counterfact": "counterfact_edit.jsonl",
        "zsre": "zsre_mend.jsonl",
        "scotus": "scotus_1991_2009.jsonl",
        "hallucination": "wikibio_hallucination_edit.jsonl",
        "wikibigedit": "wikibigedit_locft.json",
        "qaedit": "qaedit.json",
        "mquake": "mquake_cf.json",
    }
    for stream, file in real.items() if bases.data is not None else ():
        content = (bases.data / file).read_text(encoding="utf-8")
        is_array = file.endswith(".json")
        some = [json.dumps(record) for record in json.loads(content)] if is_array else content.rstrip("\n").split("\n")
        # Of decisions some must be of the years that are edited.
        some = some[:6] + some[-6:]
        yield from _lines_cases(f"stream {stream}", stream, some, n_records=1)
    if bases.data is not None:
        rows = (bases.data / "halluedit_geography_volcano.csv").read_text(encoding="utf-8").split("\n")[:13]
        yield from _whole_cases("stream halluedit", "halluedit", rows)


def _whole_cases(kind: str, stream: str, lines: Sequence[str]) -> Iterator[Case]:
    for damage, spoil in WHOLE.items():
        yield Case(kind, damage, _spoilt_lines(stream, lines, damage, spoil, 0))
    for damage, spoil in PARTLY.items():
        for number in range(3):
            yield Case(kind, damage, _spoilt_lines(stream, lines, damage, spoil, number), True, number)


def _lines_cases(kind: str, stream: str, lines: Sequence[str], *, n_records: int) -> Iterator[Case]:
    yield from _whole_cases(kind, stream, lines)
    choice = random.Random(kind)
    for number in range(n_records):
        place = choice.randrange(1, len(lines))
        for damage, text, may_be_valid in broken_json(json.loads(lines[place]), choice):
            some = [*lines[:place], text, *lines[place + 1 :]]
            for skip in (False, True):
                yield Case(
                    f"{kind}, a record" + (", on_error=skip" if skip else ""),
                    damage,
                    _broken_line(stream, some, place + 1, skip=skip),
                    may_be_valid,
                    number,
                )
    some = [*lines, lines[0]]
    yield Case(f"{kind}, a record", "given twice", _broken_line(stream, some, len(some), skip=False), stream != "jsonl")
    array = f"[{', '.join(lines)}]"
    for number in range(2):
        cut = array[: choice.randrange(1, len(array))]
        yield Case(kind, "an array that is cut", _broken_line(stream, [cut], None, skip=False), False, number)


def _spoilt_lines(stream: str, lines: Sequence[str], damage: str, spoil: Damage, number: int) -> Callable[[Path], Ask]:
    def arrange(folder: Path) -> Ask:
        path = folder / "given" / "requests.jsonl"
        _write_lines(path, lines)
        spoil(path, random.Random(f"{stream} {damage} {number}"))
        return Ask(_stream_command(stream, path, folder), path.parent, (str(path),))

    return arrange


def _broken_line(stream: str, lines: Sequence[str], place: int | None, *, skip: bool) -> Callable[[Path], Ask]:
    def arrange(folder: Path) -> Ask:
        path = folder / "given" / "requests.jsonl"
        _write_lines(path, lines)
        more = ("stream.on_error=skip",) if skip else ()
        where = str(path) if place is None else f"{path}:{place}"
        return Ask(_stream_command(stream, path, folder, *more), path.parent, (where,))

    return arrange


# --- Settings ---------------------------------------------------------------------------------------------------------

_NO_NUMBERS = ("text", "[]", "{a: 1}", "''", "nan", "-1", "1e999", "9" * 400, "1_0x")
_NO_NAMES = ("nonsense", "[]", "{a: 1}", "''", "3", "null", "GRACE", "../grace")
_WRONG_NAMES = tuple(name for name in _NO_NAMES if name != "null")
_WRONG_OPTIONS: Mapping[str, Sequence[str]] = {
    "seed": (*_NO_NUMBERS, "0.5", "true", "null"),
    "max_edits": (*_NO_NUMBERS, "0.5", "0", "true"),
    "eval_every": (*_NO_NUMBERS, "0.5", "0", "true", "null"),
    "max_upstream": (*_NO_NUMBERS, "0.5", "0"),
    "batch_size": (*_NO_NUMBERS, "0.5", "0", "null"),
    "batch_tokens": (*_NO_NUMBERS, "0", "null"),
    "engine_memory_mb": ("text", "[]", "{a: 1}", "-1", "0.5"),
    "threads": (*_NO_NUMBERS, "0", "null"),
    "checkpoint_every": (*_NO_NUMBERS, "0", "null"),
    "protocol.prefix_length": (*_NO_NUMBERS, "0", "null"),
    "stream": _NO_NAMES,
    "editor": _NO_NAMES,
    "split": _NO_NAMES,
    "order": _WRONG_NAMES,
    "engine": _NO_NAMES,
    "protocol.query": _NO_NAMES,
    "protocol.normalise": _WRONG_NAMES,
    "existing": _NO_NAMES,
    "wandb.mode": _NO_NAMES,
    "paper": _NO_NAMES,
    "sweep": _NO_NAMES,
    "tuned": ("nonsense", "[]", "'a b'", "nowhere/at/all", "/dev/null"),
    "dtype": ("nonsense", "[]", "{a: 1}", "''", "3", "null", "int8"),
    "device": ("nonsense", "[]", "''", "null", "cuda:99", "cpu:x"),
    "device_map": ("[]", "3", "nonsense", "''"),
    "load_in": ("[]", "8", "2bit", "''"),
    "layer": ("nonsense", "[]", "3", "second.weight", "''", "second[0]", "."),
    "model": ("nowhere/at/all", "[]", "''", "3", "/dev/null", "~nobody-of-that-name/x"),
    "out": ("[]", "''", "3", "null", "/dev/null", "/dev/null/below", "a" * 300),
    "wandb.project": ("[]", "''", "3", "null"),
    "wandb.group": ("[]", "3", "''"),
    "protocol": ("3", "[]", "text"),
    "wandb": ("3", "[]"),
    "stream.path": ("x",),
    "editor.eps_init": (*_NO_NUMBERS, "0", "null", "true", "inf"),
    "editor.n_iter": (*_NO_NUMBERS, "0.5", "null", "true"),
    "editor.lr": (*_NO_NUMBERS, "0", "null", "inf"),
    "editor.replacement": _NO_NAMES,
    "editor.value_init": _NO_NAMES,
    "editor.distance": _NO_NAMES,
    "editor.fidelity": _NO_NAMES,
    "editor.overlap": _NO_NAMES,
    "editor.seed": ("text", "[]", "nan", "0.5", "null"),
}
"""Values that no option of these may have, as they are typed."""

_ODD_SYNTAX = (
    "seed",
    "=3",
    "=",
    "",
    " ",
    "seed==",
    "seed=[",
    "seed={a",
    "seed='",
    "seed=${nope}",
    "seed=${seed}",
    "seed=${oc.env:NO_SUCH_VARIABLE}",
    "seed=${oc.decode:x",
    "seed=$(ls)",
    "seed=0,1",
    "seed=range(0,3)",
    "editor=grace,ft",
    "editor=[grace,ft]",
    "+seed=1",
    "++seed=1",
    "~seed",
    "~editor",
    "seed@x=1",
    "editor@other=ft",
    "--seed=1",
    "--cfg",
    "--config-dir=/tmp",
    "--config-name=x",
    "-x",
    "sed=1",
    "editor.eps=1",
    "editor.model=1",
    "editor.plugins=[]",
    "editor._target_=os.system",
    "editor.eps_init.x=1",
    "seed.x=1",
    "stream.nothing=1",
    "protocol.nothing=1",
    "wandb.nothing=1",
    "nothing.at.all=1",
    "hydra.run.dir",
    "hydra/launcher=nonsense",
    "seed=1\n2",
    "seed=\x00",
    "seed=\udc80",
    "out=a\x00b",
    "model=a\x00b",
    "stream.x\x00=1",
    "seed=" + "(" * 500,
    "seed=" + "[" * 500 + "]" * 500,
)


def setting_cases(bases: Bases) -> Iterator[Case]:
    """Yields settings that a run cannot have, syntax that is none, and broken files of settings."""
    for option, values in _WRONG_OPTIONS.items():
        for number, value in enumerate(values):
            yield Case(f"setting: {option}", f"{value[:20]!r}", _setting(f"{option}={value}", option), True, number)
    for number, typed in enumerate(_ODD_SYNTAX):
        yield Case("setting: odd syntax", repr(typed[:40]), _setting(typed, ""), True, number)
        yield Case("setting: odd syntax, of a sweep", repr(typed[:40]), _setting(typed, "", "-m"), True, number)
    for stream in ("jsonl", "counterfact", "zsre", "scotus", "hallucination"):
        for number, value in enumerate(("null", "''", "3", "[a]", "nowhere", "~nobody-of-that-name/x", "a\x00b")):
            command = (f"stream={stream}", "model=atlas-text", f"stream.path={value}")
            yield Case(f"setting: stream.path of {stream}", repr(value), _setting(*command, names=""), False, number)
        for option in ("on_error", "upstream_path", "task", "max_new_tokens"):
            yield Case(
                f"setting: stream.{option} of {stream}",
                "'nonsense'",
                _setting(
                    f"stream={stream}", "model=atlas-text", "stream.path=x", f"stream.{option}=nonsense", names=""
                ),
            )
    yield from _preset_cases()


def _setting(*typed: str, names: str | None = None) -> Callable[[Path], Ask]:
    *overrides, last = typed if names is not None else (*typed[:1], *typed[2:], typed[1])
    if names is None:
        names = last
    else:
        overrides.append(last)

    def arrange(folder: Path) -> Ask:
        given = folder / "given"
        given.mkdir()
        return Ask(("run", "stream=toy", *SMALL, f"out={given / 'out'}", *overrides), given, (names,), goes_on=True)

    return arrange


PRESET = """tuning_budget: 6 runs
layer: second
editor:
  eps_init: 0.5
  n_iter: 5
"""

_BROKEN_PRESETS: Mapping[str, str] = {
    "not a mapping": "- a\n- b\n",
    "a bare word": "word\n",
    "an unknown option": "sed: 3\n",
    "an option the editor has not": "editor:\n  eps: 3\n",
    "an editor that is text": "editor: grace\n",
    "an editor that is a list": "editor: [1, 2]\n",
    "a value of another type": "editor:\n  eps_init: [1]\n",
    "a key that is a number": "3: 4\n",
    "a tab": "editor:\n\teps_init: 1\n",
    "an open bracket": "editor: [1, 2\n",
    "a Python object": "editor: !!python/object/apply:os.system ['true']\n",
    "an unknown tag": "editor: !thing 3\n",
    "an unknown alias": "editor: *nothing\n",
    "an alias of itself": "editor: &a\n  eps_init: *a\n",
    "two documents": "layer: second\n---\nlayer: second\n",
    "a broken interpolation": "layer: ${nothing.at.all}\n",
    "an open interpolation": "layer: ${\n",
    "an interpolation of itself": "layer: ${layer}\n",
    "nested 1,000 deep": "editor: " + "[" * 1000 + "]" * 1000 + "\n",
    "a number of 5,000 digits": "editor:\n  eps_init: " + "9" * 5000 + "\n",
    "NaN": "editor:\n  eps_init: .nan\n",
    "a date": "editor:\n  eps_init: 2020-13-45\n",
    "aliases by the billion": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
    "a control character": "layer: \x01\n",
}


def _preset_cases() -> Iterator[Case]:
    def spoilt(damage: str, spoil: Damage, number: int) -> Callable[[Path], Ask]:
        def arrange(folder: Path) -> Ask:
            path = folder / "given" / "toy" / "grace.yaml"
            path.parent.mkdir(parents=True)
            path.write_text(PRESET)
            spoil(path, random.Random(f"preset {damage} {number}"))
            command = (
                "run",
                "stream=toy",
                "editor=grace",
                f"tuned={folder / 'given'}",
                *SMALL,
                f"out={folder / 'out'}",
            )
            return Ask(command, folder / "given", ("",))

        return arrange

    for damage, spoil in WHOLE.items():
        yield Case("settings file", damage, spoilt(damage, spoil, 0), damage == "empty")
    for damage, spoil in PARTLY.items():
        for number in range(4):
            yield Case("settings file", damage, spoilt(damage, spoil, number), True, number)
    for damage, text in _BROKEN_PRESETS.items():
        yield Case("settings file", damage, spoilt(damage, lambda path, choice, text=text: _put(path, text), 0))


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


# --- Run folders ------------------------------------------------------------------------------------------------------

_READ_BY: Mapping[str, Sequence[str]] = {
    "result.json": ("leaderboard", "report", "curves", "overlap", "compare", "resume", "reuse"),
    "metrics.jsonl": ("report", "curves"),
    "edits.jsonl": ("report", "show"),
    "predictions.parquet": ("report", "show", "compare", "leaderboard"),
    "config.yaml": ("resume", "report"),
}


def _reading(how: str, given: Path, run: Path, folder: Path) -> tuple[str, ...]:
    request = json.loads((_first(given, run) / "edits.jsonl").read_text().splitlines()[0])["id"]
    return {
        "leaderboard": ("leaderboard", str(given)),
        "report": ("report", str(given), "--out", str(folder / "page")),
        "curves": ("figure", "curves", str(given), "--out", str(folder / "figures")),
        "overlap": ("figure", "overlap", str(given), "--out", str(folder / "figures")),
        "compare": ("leaderboard", str(given), "--compare", "grace,ft"),
        "resume": ("resume", str(run)),
        "reuse": (),
        "show": ("show", str(run), request),
    }[how]


def _first(given: Path, but: Path) -> Path:
    return next(path.parent for path in sorted(given.rglob("result.json")) if path.parent != but)


def _a_run(bases: Bases, folder: Path) -> tuple[Path, Path]:
    """Copies the finished runs; returns where they are, and one of GRACE's."""
    given = folder / "given"
    shutil.copytree(bases.runs, given)
    return given, sorted(path.parent for path in given.rglob("result.json") if "grace" in path.parts)[0]


def run_cases(bases: Bases) -> Iterator[Case]:
    """Yields finished runs with one file broken, with each command that reads that file."""
    run = sorted(path.parent for path in bases.runs.rglob("result.json") if "grace" in path.parts)[0]
    for file, readers in _READ_BY.items():
        for how in readers:
            kind = f"finished run: {file.rpartition('/')[2]}, {how}"
            for damage, spoil in WHOLE.items():
                yield Case(kind, damage, _spoilt_run(bases, file, how, damage, spoil, 0), True)
            for damage, spoil in PARTLY.items():
                for number in range(1 if how in ("overlap", "compare", "leaderboard") else 2):
                    yield Case(kind, damage, _spoilt_run(bases, file, how, damage, spoil, number), True, number)
            if file.endswith("parquet"):
                for damage, spoil in _OTHER_TABLES.items():
                    yield Case(kind, damage, _spoilt_run(bases, file, how, damage, spoil, 0), True)
            elif "json" in file:
                content = (run / file).read_text(encoding="utf-8").splitlines()
                place = len(content) - 1 if file.endswith("jsonl") else None
                tree = json.loads(content[place] if place is not None else "\n".join(content))
                choice = random.Random(f"{file} {how}")
                but = ("environment",)
                for damage, text, may_be_valid in broken_json(tree, choice, but=but):
                    # Of a score that is no number both are what one expects.
                    may_be_valid |= damage in ("NaN", "Infinity")
                    if place is not None:
                        text = "\n".join([*content[:place], text, *content[place + 1 :]]) + "\n"
                    put = _putting(text)
                    yield Case(kind, damage, _spoilt_run(bases, file, how, damage, put, 1), may_be_valid, 1)
                version = _putting(json.dumps({**tree, "schema_version": 99}))
                if file == "result.json":
                    yield Case(kind, "another version", _spoilt_run(bases, file, how, "version", version, 0))


def _putting(text: str) -> Damage:
    return lambda path, choice: _put(path, text)


def _spoilt_run(bases: Bases, file: str, how: str, damage: str, spoil: Damage, number: int) -> Callable[[Path], Ask]:
    def arrange(folder: Path) -> Ask:
        given, run = _a_run(bases, folder)
        spoil(run / file, random.Random(f"{file} {how} {damage} {number}"))
        command = _reading(how, given, run, folder)
        if how == "reuse":
            options = json.loads((given / "command.json").read_text())
            command = ("run", *options, f"out={given}", "editor=grace", "seed=0")
        return Ask(command, given, (run.name,), goes_on=how in ("resume", "reuse"))

    return arrange


def _table(change: Callable[[Any], Any]) -> Damage:
    def damage(path: Path, choice: random.Random) -> None:
        import pyarrow.parquet as pq

        pq.write_table(change(pq.read_table(path)), path)

    return damage


def _cast(name: str, kind: str) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        import pyarrow as pa

        place = table.schema.get_field_index(name)
        column = pa.array([None] * len(table), kind) if kind == "null" else table[name].cast(kind)
        return table.set_column(place, name, column)

    return change


def _emptied(name: str) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        import pyarrow as pa

        place = table.schema.get_field_index(name)
        return table.set_column(place, name, pa.nulls(len(table), table.schema.field(name).type))

    return change


_OTHER_TABLES: Mapping[str, Damage] = {
    "no rows": _table(lambda table: table.slice(0, 0)),
    "a column missing": _table(lambda table: table.drop_columns(["score"])),
    "other columns": _table(lambda table: table.select(["n_edits"]).rename_columns(["a"])),
    "numbers as text": _table(_cast("n_edits", "string")),
    "scores as text": _table(_cast("score", "string")),
    "ids as nothing": _table(_cast("request_id", "null")),
    "every score null": _table(_emptied("score")),
    "every id null": _table(_emptied("request_id")),
    "every clock null": _table(_emptied("n_edits")),
    "every stream null": _table(_emptied("stream")),
    "every probe null": _table(_emptied("probe")),
    "half the rows": _table(lambda table: table.slice(0, len(table) // 2)),
    "every row twice": _table(lambda table: __import__("pyarrow").concat_tables([table, table])),
}


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_cases(bases: Bases) -> Iterator[Case]:
    """Yields interrupted runs with a file broken by accident, and with checkpoints whose digests are right."""
    files = sorted(path.relative_to(bases.stopped).as_posix() for path in bases.stopped.rglob("*") if path.is_file())
    for file in files:
        kind = f"stopped run: {file}"
        for damage, spoil in {**WHOLE, **PARTLY}.items():
            yield Case(kind, damage, _spoilt_stop(bases, [file], damage, spoil), True, files.index(file))
    newest = max(path.name for path in (bases.stopped / "checkpoint").glob("0*"))
    for name in ("state.json", "manifest.json", "tensors.safetensors"):
        both = [f"checkpoint/{path.name}/{name}" for path in (bases.stopped / "checkpoint").glob("0*")]
        for damage, spoil in {**WHOLE, **PARTLY}.items():
            yield Case(f"stopped run: both {name}", damage, _spoilt_stop(bases, both, damage, spoil), True)
    manifest = f"checkpoint/{newest}/manifest.json"
    tree = json.loads((bases.stopped / manifest).read_text())
    for damage, text, may_be_valid in broken_json(tree, random.Random("manifest")):
        put = _putting(text)
        yield Case("stopped run: manifest.json, as JSON", damage, _spoilt_stop(bases, [manifest], damage, put), True)
        del may_be_valid
    state = json.loads((bases.stopped / f"checkpoint/{newest}/state.json").read_text())
    choice = random.Random("state")
    for number in range(4):
        for damage, text, _ in broken_json(state["run"], choice, but=("environment",)):
            whole = json.dumps({**state, "run": _MARK}, ensure_ascii=False).replace(f'"{_MARK}"', text)
            change = _resealing("state.json", lambda content, text=whole: text.encode("utf-8", "surrogatepass"))
            spoilt = _spoilt_stop(bases, [newest], damage, change)
            yield Case("checkpoint with right digests: state.json", damage, spoilt, True, number)
    for damage, tensors in _OTHER_TENSORS.items():
        change = _resealing("tensors.safetensors", tensors)
        yield Case(
            "checkpoint with right digests: tensors", damage, _spoilt_stop(bases, [newest], damage, change), True
        )


def _spoilt_stop(bases: Bases, files: Sequence[str], damage: str, spoil: Damage) -> Callable[[Path], Ask]:
    def arrange(folder: Path) -> Ask:
        given = folder / "given" / bases.stopped.name
        shutil.copytree(bases.stopped, given)
        for file in files:
            path = given / file if "/" in file or (given / file).exists() else given / "checkpoint" / file
            spoil(path, random.Random(f"{file} {damage}"))
        return Ask(("resume", str(given)), given, (str(given),), goes_on=True)

    return arrange


def _resealing(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Changes a file of a checkpoint and gives the manifest the digests that then hold."""

    def damage(path: Path, choice: random.Random) -> None:
        from grace_bench.run.checkpoint import _Manifest, digest

        content = change((path / name).read_bytes())
        (path / name).write_bytes(content)
        manifest = _Manifest.model_validate_json((path / "manifest.json").read_bytes())
        manifest.files[name] = digest(content)
        (path / "manifest.json").write_text(manifest.sealed().model_dump_json())

    return damage


def _tensors(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    def rewrite(content: bytes) -> bytes:
        from safetensors.torch import load, save

        return save({name: change(tensor).contiguous() for name, tensor in load(content).items()})

    return rewrite


def _header(content: bytes, change: Callable[[Tree], Tree]) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _each(**fields: Tree) -> Callable[[Tree], Tree]:
    return lambda header: {name: {**of, **fields} if name != "__metadata__" else of for name, of in header.items()}


_OTHER_TENSORS: Mapping[str, Callable[[bytes], bytes]] = {
    "a header of 2^60 bytes": lambda content: (1 << 60).to_bytes(8, "little") + content[8:],
    "a header of no bytes": lambda content: bytes(8) + content[8:],
    "a header that is no JSON": lambda content: content[:8] + b"x" * (len(content) - 8),
    "offsets past the end": lambda content: _header(content, _each(data_offsets=[0, 1 << 50])),
    "negative offsets": lambda content: _header(content, _each(data_offsets=[-8, 8])),
    "a shape of 2^50 rows": lambda content: _header(content, _each(shape=[1 << 50])),
    "an unknown dtype": lambda content: _header(content, _each(dtype="F7")),
    "no tensors": lambda content: _header(content, lambda header: {}),
    "other names": lambda content: _header(content, lambda header: {f"x{n}": of for n, of in header.items()}),
    "other shapes": _tensors(lambda tensor: tensor.reshape(-1)[: tensor.numel() // 2 + 1]),
    "no rows": _tensors(lambda tensor: tensor.reshape(-1)[:0]),
    "another dtype": _tensors(lambda tensor: tensor.bool()),
    "one axis more": _tensors(lambda tensor: tensor[None]),
}
"""Files of tensors that are not what they should be."""


# --- Saved editors and models ----------------------------------------------------------------------------------------


def editor_damages(saved: Path) -> Iterator[tuple[str, str, Damage]]:
    """Yields what can be done to a saved editor: the file, how, and what does it. No file is valid afterwards."""
    for file in ("editor.json", "editor.safetensors"):
        for damage, spoil in WHOLE.items():
            yield file, damage, spoil
    # A value in the middle of a tensor is as good as another.
    yield "editor.safetensors", "cut", PARTLY["cut"]
    for damage, change in _OTHER_TENSORS.items():
        if damage != "another dtype":
            yield "editor.safetensors", damage, _rewriting(lambda content, choice, change=change: change(content))
    tree = json.loads((saved / "editor.json").read_text(encoding="utf-8"))
    for damage, text, may_be_valid in broken_json(tree, random.Random("editor")):
        if not may_be_valid:
            yield "editor.json", damage, _putting(text)
    for name in tree:
        yield "editor.json", f"no {name}", _putting(json.dumps(without(tree, (name,))))
        yield "editor.json", f"a list of lists for {name}", _putting(json.dumps(changed(tree, (name,), [[1]])))
    other = {"a": [1]}
    for part in ("settings", "state"):
        for name in tree[part]:
            changes = _putting(json.dumps(changed(tree, (part, name), other)))
            yield "editor.json", f"an object for {part}.{name}", changes
    for name in tree["state"]:
        yield "editor.json", f"no state.{name}", _putting(json.dumps(without(tree, ("state", name))))


def model_cases(bases: Bases) -> Iterator[Case]:
    """Yields folders of models with one file broken."""
    streams = {"toy": "toy", "atlas-drift": "atlas-drift", "atlas-text": "atlas-text"}
    for model, stream in streams.items():
        source = bases.models[model]
        for file in (
            "config.json",
            "model.safetensors",
            *(() if model == "toy" else ("tokenizer.json", "tokenizer_config.json")),
        ):
            kind = f"model folder: {file} of {model}"
            for damage, spoil in {**WHOLE, **PARTLY}.items():
                yield Case(kind, damage, _spoilt_model(source, stream, file, damage, spoil), True)
            if file == "config.json":
                tree = json.loads((source / file).read_text())
                for damage, text, may_be_valid in broken_json(tree, random.Random(kind)):
                    yield Case(kind, damage, _spoilt_model(source, stream, file, damage, _putting(text)), True, 1)
                    del may_be_valid
            if file == "model.safetensors":
                for damage, change in _OTHER_TENSORS.items():
                    spoil = _rewriting(lambda content, choice, change=change: change(content))
                    yield Case(kind, damage, _spoilt_model(source, stream, file, damage, spoil), True, 1)


def _spoilt_model(source: Path, stream: str, file: str, damage: str, spoil: Damage) -> Callable[[Path], Ask]:
    def arrange(folder: Path) -> Ask:
        given = folder / "given" / "model"
        shutil.copytree(source, given)
        given.chmod(0o700)
        for path in given.iterdir():
            path.chmod(0o600)
        spoil(given / file, random.Random(f"{source.name} {file} {damage}"))
        command = ("run", f"stream={stream}", f"model={given}", "editor=none", *SMALL, f"out={folder / 'out'}")
        return Ask(command, given, (f"{given}",))

    return arrange


def corpus(bases: Bases) -> list[Case]:
    """Returns the whole corpus, always in one order."""
    return [
        *stream_cases(bases),
        *setting_cases(bases),
        *run_cases(bases),
        *checkpoint_cases(bases),
        *model_cases(bases),
    ]
