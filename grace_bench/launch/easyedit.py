"""`grace-bench import-easyedit`: the settings of EasyEdit's hyperparameter files under the names that they have here.

Which field is which option stands in `published/easyedit.yaml`.
"""

import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from grace_bench.common.files import readable
from grace_bench.common.untrusted import refuse_references
from grace_bench.errors import UserError, did_you_mean, reason_of
from grace_bench.launch.run_config import OPTIONS, SHORT
from grace_bench.registry import EDITORS

_EDITOR = "editor."
_ALGORITHM = "alg_name"
_TAG = "tag:yaml.org,2002:"
_LAYERS = "layers"
_BUDGET = "EasyEdit"
"""How the hyperparameters of an imported file were chosen, as the leaderboard shows it."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Settings that were read from a file of EasyEdit's.

    Attributes:
        path: The file.
        editor: The editor's registered name.
        settings: The values by the option as it is typed, such as `editor.n_iter`.
        remarks: A line on each field that has no counterpart, or means something else here.
    """

    path: Path
    editor: str
    settings: Mapping[str, Any]
    remarks: Sequence[str]

    def option_lines(self) -> list[str]:
        """Returns the settings as they are typed after `grace-bench run`, one a line."""
        return [f"editor={self.editor}", *(f"{name}={_typed(value)}" for name, value in self.settings.items())]

    def write(self, path: Path) -> None:
        """Writes the settings as a file for `tuned=FILE`.

        Raises:
            UserError: If something of that name exists already, or the file cannot be written.
        """
        node: dict[str, Any] = {"editor": {"name": self.editor}, "tuning_budget": _BUDGET}
        for name, value in self.settings.items():
            group, _, option = name.rpartition(".")
            (node[group] if group else node)[option] = value
        content = yaml.safe_dump(node, sort_keys=False, allow_unicode=True, default_flow_style=None)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(
                    f"# From EasyEdit's {self.path.name}, for tuned=FILE.yaml (docs/from-easyedit.md).\n{content}"
                )
        except FileExistsError as error:
            raise UserError(f"{path}: exists already, and nothing is overwritten: name another file") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or type(error).__name__})") from error


@dataclass(frozen=True)
class _Field:
    """A field of a file.

    Attributes:
        name: Its name, dotted if it is nested.
        value: Its value.
        place: The file and line, as messages name it.
    """

    name: str
    value: Any
    place: str

    def says(self, text: str) -> str:
        return f"{self.place}: field '{self.name}': {text}"


@dataclass
class _Translation:
    """The fields of a file as they are turned into settings."""

    editor: str
    settings: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def set(self, option: str, value: Any, given: _Field) -> None:
        """Takes a value for an option, after checking its type."""
        if option.startswith(_EDITOR):
            value = _checked(value, _parameters(self.editor)[option.removeprefix(_EDITOR)].default, given)
        else:
            try:
                OPTIONS[SHORT.get(option, option)].check(option, value)
            except UserError as error:
                raise UserError(given.says(str(error))) from error
        self.settings[option] = value


def import_easyedit(path: Path) -> Imported:
    """Reads a hyperparameter file of EasyEdit's; nothing that it holds is executed.

    Raises:
        UserError: If the file cannot be read, names no algorithm that has an editor here, or gives a field a value that
            it cannot have; names file, line and field.
    """
    given = _read(path)
    algorithm, name = _algorithm(path, given)
    translation = _Translation(algorithm["editor"])
    known = {**_table()["of_every_algorithm"], **algorithm["fields"]}
    used = _set_layers(translation, algorithm.get(_LAYERS), given, path)
    for one in given.values():
        if one.name in used or one.name == name:
            continue
        _translate(translation, one, known)
    order = ["model", "layer"]
    settings = {option: translation.settings.pop(option) for option in order if option in translation.settings}
    return Imported(
        path=path,
        editor=translation.editor,
        settings={**settings, **translation.settings},
        remarks=tuple(translation.remarks),
    )


def _translate(translation: _Translation, given: _Field, known: Mapping[str, Any]) -> None:
    """Adds what a field says to the settings, or a remark."""
    rule = known.get(given.name)
    rule = {"option": rule} if isinstance(rule, str) else rule or {"why": ""}
    value, option = given.value, rule.get("option")
    if "only" in rule:
        needs = "and needs none:" if _same(value, rule["only"]) else f"here it is always {_typed(rule['only'])}:"
        translation.remarks.append(given.says(f"{_typed(value)} has no counterpart, {needs} {rule['why']}"))
        return
    if option is None:
        why = f": {rule['why']}" if rule["why"] else f"{did_you_mean(given.name, known)}"
        translation.remarks.append(given.says(f"has no counterpart{why}"))
        return
    if "lengths" in rule:
        pairs = _pairs(given)
        counts = {count for _, count in pairs}
        if len(counts) > 1:
            text = f"has no counterpart: {rule['lengths']} is one number for prefixes of every length"
            translation.remarks.append(given.says(text))
            return
        translation.set(rule["lengths"], counts.pop(), given)
        value = [length for length, _ in pairs]
    elif "values" in rule:
        found = [ours for theirs, ours in rule["values"].items() if _same(value, theirs)]
        # A value that is none of the named ones is taken as it is where the option takes numbers.
        if not found and (isinstance(value, bool) or not isinstance(_number(value), int | float)):
            translation.remarks.append(given.says(_unmatched(value, rule["values"])))
            return
        value = found[0] if found else value
        if value is None:
            return
    elif option == "layer":
        value = _path(value, given)
    choices = _choices(translation.editor, option)
    if choices and value not in choices:
        translation.remarks.append(given.says(_unmatched(value, choices)))
        return
    translation.set(option, value, given)
    if "note" in rule:
        translation.remarks.append(given.says(f"is {option}={_typed(translation.settings[option])}; {rule['note']}"))


def _unmatched(value: Any, known: Iterable[Any]) -> str:
    return f"{_typed(value)} has no counterpart; these have: {', '.join(map(_typed, known))}"


def _choices(editor: str, option: str) -> tuple[Any, ...]:
    """The only values that an option of the editor may have; empty for an option without such a list."""
    parameter = _parameters(editor).get(option.removeprefix(_EDITOR)) if option.startswith(_EDITOR) else None
    if parameter is None or get_origin(parameter.annotation) is not Literal:
        return ()
    return get_args(parameter.annotation)


def _set_layers(
    translation: _Translation, rule: Mapping[str, str] | None, given: Mapping[str, _Field], path: Path
) -> set[str]:
    """Takes the layers, and returns the names of the fields that say which these are."""
    names = set((rule or {}).values())
    missing = [name for name in sorted(names) if name not in given]
    if rule is None or missing:
        if missing:
            text = "is missing, so the layer is the model's own, or that of preset=auto"
            translation.remarks.append(f"{path}: field '{missing[0]}': {text}")
        return set()
    if "paths" in rule:
        named = given[rule["paths"]]
        layers = [_path(value, named) for value in _list(named)]
    else:
        named, template = given[rule["numbers"]], given[rule["template"]]
        if not isinstance(template.value, str) or template.value.count("{}") != 1:
            raise UserError(template.says("should be a path with {} once, where the number of a block goes"))
        numbers = _list(named)
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise UserError(named.says(f"should be a list of block numbers, not {_typed(named.value)}"))
        layers = [_path(template.value.replace("{}", str(number)), template) for number in numbers]
    layers = list(dict.fromkeys(layers))
    if not layers:
        translation.remarks.append(named.says("names no layer, so it is the model's own, or that of preset=auto"))
        return names
    translation.set("layer", layers[-1], named)
    if _LAYERS in _parameters(translation.editor):
        translation.set(f"{_EDITOR}{_LAYERS}", layers, named)
    elif len(layers) > 1:
        text = f"{translation.editor} edits one layer here, and it is the last of the {len(layers)}"
        translation.remarks.append(named.says(text))
    return names


def _algorithm(path: Path, given: Mapping[str, _Field]) -> tuple[Mapping[str, Any], str]:
    """What the table says of the file's algorithm, and the field that names it."""
    known: Mapping[str, Any] = _table()["algorithms"]
    name = next((name for name in (_ALGORITHM, "alg") if name in given), None)
    there = f"(there are: {', '.join(algorithm for algorithm, rule in known.items() if rule)})"
    if name is None:
        raise UserError(f"{path}: field '{_ALGORITHM}': is missing {there}")
    typed = given[name].value
    found = next(
        (algorithm for algorithm in known if isinstance(typed, str) and _plain(algorithm) == _plain(typed)), ""
    )
    if not found:
        text = f"no algorithm {_typed(typed)} is known{did_you_mean(str(typed), known)} {there}"
        raise UserError(given[name].says(text))
    if known[found] is None:
        raise UserError(given[name].says(f"no editor here does what {found} does {there}"))
    return known[found], name


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


@cache
def _table() -> Mapping[str, Any]:
    text = (files("grace_bench.launch") / "published" / "easyedit.yaml").read_text(encoding="utf-8")
    table: Mapping[str, Any] = yaml.safe_load(text)
    return table


def _parameters(editor: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(EDITORS.get(editor)).parameters


def _read(path: Path) -> dict[str, _Field]:
    """The fields of a file by name."""
    lines: list[str] = []
    try:
        text = readable(path).read_text(encoding="utf-8")
        lines = text.splitlines()
        refuse_references(path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: should hold settings, as field: value")
        return {one.name: one for one in _fields(path, node)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{_place(path, mark, lines)}is not YAML ({error.problem or reason_of(error)})") from error
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not YAML ({reason_of(error)})") from error


def _place(path: Path, mark: yaml.Mark | None, lines: Sequence[str]) -> str:
    """The file, line and field of a fault in the syntax; the field is the last that begins no later."""
    if mark is None:
        return f"{path}: "
    # A parser that misses an end finds that out on the line after the last.
    number = min(mark.line + 1, max(len(lines), 1))
    names = (re.match(r"\s*-?\s*([\w.-]+)\s*:", line) for line in reversed(lines[:number]))
    name = next((found[1] for found in names if found), None)
    return f"{path}:{number}: " + (f"field '{name}': " if name else "")


def _fields(path: Path, node: yaml.MappingNode, prefix: str = "") -> Iterator[_Field]:
    seen: set[str] = set()
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{place}: the name of a field should be text")
        name = f"{prefix}{key.value}"
        if name in seen:
            raise UserError(f"{place}: field '{name}': is given twice")
        seen.add(name)
        if isinstance(value, yaml.MappingNode):
            yield from _fields(path, value, f"{name}.")
        else:
            yield _Field(name, _value(value, place, name), place)


def _value(node: yaml.Node, place: str, name: str) -> Any:
    """The value of a node that holds nothing but plain values."""
    pending = [node]
    while pending:
        inner = pending.pop()
        if not inner.tag.startswith(_TAG) or inner.tag.startswith(f"{_TAG}python"):
            raise UserError(
                f"{place}: field '{name}': is a {inner.tag!r}, which is not read; it should be a plain value"
            )
        if isinstance(inner, yaml.MappingNode):
            raise UserError(f"{place}: field '{name}': should be a list of plain values")
        pending += inner.value if isinstance(inner, yaml.SequenceNode) else []
    try:
        return yaml.constructor.SafeConstructor().construct_document(node)
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f"{place}: field '{name}': cannot be read ({reason_of(error)})") from error


def _number(value: Any) -> Any:
    """A number that YAML takes for text, such as 5e-4, as one; everything else as it is."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        return float(value)
    return value


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return bool(_number(value) == other)


_KINDS: tuple[tuple[type | tuple[type, ...], str, Callable[[Any], bool]], ...] = (
    (bool, "true or false", lambda value: isinstance(value, bool)),
    (int, "a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    (float, "a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    (str, "text", lambda value: isinstance(value, str)),
    ((tuple, list), "a list", lambda value: isinstance(value, list)),
)
"""For the type of an option's default: what a value should be, and whether it is."""


def _checked(value: Any, default: Any, given: _Field) -> Any:
    """A value for an option with a default, as its type."""
    if not isinstance(default, str):
        value = _number(value)
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    kind = next((kind for kind in _KINDS if isinstance(default, kind[0])), None)
    if kind is not None and not kind[2](value):
        raise UserError(given.says(f"should be {kind[1]}, not {_typed(value)}"))
    return value


def _list(given: _Field) -> list[Any]:
    if not isinstance(given.value, list):
        raise UserError(given.says(f"should be a list, not {_typed(given.value)}"))
    return given.value


def _pairs(given: _Field) -> list[tuple[int, int]]:
    pairs = _list(given)
    if not pairs or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(number, int) for number in pair) for pair in pairs
    ):
        raise UserError(given.says(f"should be a list of pairs [length, number], not {_typed(given.value)}"))
    return [(length, number) for length, number in pairs]


def _path(value: Any, given: _Field) -> str:
    """The dotted path of a module: `model.layers[27].mlp.down_proj.weight` is `model.layers.27.mlp.down_proj`."""
    path = re.sub(r"\[(\d+)\]", r".\1", value) if isinstance(value, str) else ""
    path = path.removesuffix(".weight")
    if not re.fullmatch(r"\w+(\.\w+)*", path):
        raise UserError(given.says(f"should be the path of a layer, not {_typed(value)}"))
    return path


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{','.join(map(_typed, value))}]"
        case str():
            return shlex.quote(value) if re.search(r"[^\w@%+=:,./~-]", value) else value
        case _:
            return str(value)
