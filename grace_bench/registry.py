"""One registry for editors, streams and metrics.

The names in a folder, and what its classes declare, are read from the source text, so listing them imports nothing. A
class is imported when it is asked for. Packages outside the repository register through entry points of the groups
`grace_bench.editors`, `grace_bench.streams` and `grace_bench.metrics`. A class that a user's own script registers
counts like any other in that process.
"""

import ast
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from grace_bench.errors import UserError, did_you_mean, reason_of

T = TypeVar("T")

# A name becomes a part of paths, of command lines and of file names on any system.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_OWN = "grace_bench"

_UNKNOWN: Any = object()
"""What `_declared` returns where the source alone does not tell."""


@dataclass(frozen=True)
class Entry:
    """A registered class before it is imported.

    Attributes:
        name: The registered name, as typed on the command line.
        module: The dotted module that defines the class.
        class_name: The class in that module.
        summary: The first line of the class's docstring, or the distribution's summary for an entry point.
        origin: `grace_bench`, the name of the distribution that brings the class, or the top-level module that
            registered it in this process.
    """

    name: str
    module: str
    class_name: str
    summary: str
    origin: str


@dataclass(frozen=True)
class _Scan:
    """What the source files of a package register.

    Attributes:
        entries: By name, in alphabetical order.
        problems: Why a file cannot be read, by the file's stem, each in one line.
    """

    entries: dict[str, Entry]
    problems: dict[str, str]


class Registry(Generic[T]):
    """Named classes of one kind.

    Args:
        kind: What the classes are, in the singular, for messages (`editor`).
        package: The package whose modules register classes; also the entry-point group.
        base: `module:Class` that every registered class must subclass.
    """

    def __init__(self, kind: str, package: str, base: str) -> None:
        self.kind = kind
        self.package = package
        self._base = base
        self._classes: dict[str, type[T]] = {}
        self._reported: set[str] = set()

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Returns a class decorator that registers the class as `name`.

        Raises:
            TypeError: If the class is not a subclass of the registry's base, has no docstring, or breaks the contract
                that its base class states in `check_class`.
            ValueError: If the name cannot be the name of a folder, or another class already has it.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{self.kind} {name!r}: a name has at most 64 letters, digits, hyphens and underscores, as in "
                f'@register_{self.kind}("my-{self.kind}")'
            )

        def decorate(cls: type[T]) -> type[T]:
            problem = self._problem_of(cls)
            if problem is not None:
                raise TypeError(f"{self.kind} {name!r} ({_file_of(cls)}): {problem}")
            known, entry = self._classes.get(name), self._scan().entries.get(name)
            places = [(known.__module__, known.__qualname__)] if known is not None else []
            places += [(entry.module, entry.class_name)] if entry is not None else []
            for module, class_name in places:
                if (module, class_name) != (cls.__module__, cls.__qualname__):
                    raise ValueError(f"{self.kind} {name!r} is already registered by {module}")
            cls.registered_name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return decorate

    def entries(self) -> dict[str, Entry]:
        """Returns every entry by name: the package's own, then entry points, then those of this process alone."""
        found = dict(self._scan().entries)
        for point in _entry_points(self.package, tuple(sys.path)):
            if point.name not in found and _NAME.fullmatch(point.name):
                found[point.name] = _entry_of(point)
        for name, cls in sorted(self._classes.items()):
            if name not in found:
                summary = (cls.__doc__ or "").strip().partition("\n")[0]
                found[name] = Entry(name, cls.__module__, cls.__qualname__, summary, cls.__module__.partition(".")[0])
        return found

    def classes(self) -> dict[str, type[T]]:
        """Imports and returns every class that can be imported, by name in the order of `entries`.

        A class or file that cannot be imported is reported on standard error, once in a process, in one line.
        """
        found = {}
        self.report_problems()
        for name in self.entries():
            try:
                found[name] = self.get(name)
            except UserError as error:
                self._report(str(error))
        return found

    def report_problems(self) -> None:
        """Prints one line on standard error for every source file that cannot be read, once in a process."""
        for problem in self._scan().problems.values():
            self._report(problem)

    def check(self, name: str) -> None:
        """Raises unless there is a class of that name; imports nothing.

        Raises:
            UserError: If there is none, with the closest one that exists, or if its source file cannot be read.
        """
        names = list(self.entries())
        if name in names:
            return
        problems = self._scan().problems
        own = problems.get(_stem_of(name))
        if own is not None:
            raise UserError(f"{self.kind} {name!r}: {own}")
        unread = "".join(f"; {problem}" for problem in problems.values())
        raise UserError(f"no {self.kind} {name!r}{did_you_mean(name, names)} (there are: {', '.join(names)}){unread}")

    def get(self, name: str) -> type[T]:
        """Imports and returns the class registered as `name`.

        Raises:
            UserError: If there is no such name, with the closest one that exists, or its module cannot be imported.
        """
        if name in self._classes:
            return self._classes[name]
        self.check(name)
        entry = self.entries()[name]
        try:
            cls = getattr(importlib.import_module(entry.module), entry.class_name)
            if name not in self._classes:
                self.register(name)(cls)
        except Exception as error:  # Importing a module runs it, and it may raise anything.
            brought = "" if entry.origin == _OWN else f" of the installed package {entry.origin}"
            raise UserError(
                f"{self.kind} {name!r}{brought} cannot be imported ({_reason_with_place(error)})"
            ) from error
        return self._classes[name]

    def attribute(self, name: str, attribute: str) -> Any:
        """Returns a class attribute of the class registered as `name`.

        A literal that one of the package's own classes declares is read from its source, so that nothing is imported.

        Raises:
            UserError: As `get` does.
        """
        own = self._scan().entries.get(name)
        declared = _UNKNOWN
        if own is not None and name not in self._classes:
            declared = _declared(own.module, own.class_name, attribute)
        return getattr(self.get(name), attribute) if declared is _UNKNOWN else declared

    def name_of(self, path: Any) -> str | None:
        """Returns the name under which the class at a dotted path is registered; None if it is not registered.

        Nothing is imported because a path names it.
        """
        for entry in self.entries().values():
            if entry.origin == _OWN:
                found = f"{entry.module}.{entry.class_name}"
            else:
                # An entry point may name another module than the one that defines the class.
                try:
                    cls = self.get(entry.name)
                except UserError:
                    continue
                found = f"{cls.__module__}.{cls.__qualname__}"
            if found == path:
                return entry.name
        return None

    def by_class_name(self, class_name: str) -> type[T]:
        """Imports and returns the package's own class of that name, for `from grace_bench.editors import Grace`.

        Raises:
            AttributeError: If the package registers no such class.
        """
        for entry in self._scan().entries.values():
            if entry.class_name == class_name:
                return self.get(entry.name)
        raise AttributeError(f"module {self.package!r} has no attribute {class_name!r}")

    def _scan(self) -> _Scan:
        return _scan_package(self.package, f"register_{self.kind}")

    def _problem_of(self, cls: type[T]) -> str | None:
        """What keeps a class from being registered, in one line."""
        base_module, base_name = self._base.split(":")
        base = getattr(importlib.import_module(base_module), base_name)
        if not issubclass(cls, base):
            return f"{cls.__qualname__} is not a subclass of {base_name}"
        if not cls.__doc__:
            return f"{cls.__qualname__} needs a docstring, whose first line `grace-bench list` shows"
        check: Callable[[], str | None] = getattr(cls, "check_class", lambda: None)
        return check()

    def _report(self, problem: str) -> None:
        if problem not in self._reported:
            self._reported.add(problem)
            print(f"grace-bench: {problem}", file=sys.stderr)


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group on `sys.path`, by name. Each search reads the metadata of every installed package."""
    return tuple(sorted(entry_points(group=group), key=lambda point: point.name))


def _entry_of(point: EntryPoint) -> Entry:
    module, _, class_name = point.value.partition(":")
    distribution = point.dist
    summary = (distribution.metadata["Summary"] or "") if distribution else ""
    return Entry(point.name, module, class_name, summary, distribution.name if distribution else "entry point")


def _file_of(cls: type) -> str:
    """The file that defines a class, or its module where there is none, as in an interactive session."""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None) or cls.__module__


def _reason_with_place(error: BaseException) -> str:
    """An error in one line, with the file and line that raised it if it is one of Python's own."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    if isinstance(error, UserError | ImportError) or not error.__traceback__:
        return reason_of(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    if last.filename == __file__:
        # Raised here, by `register`: the message names the class and its file.
        return reason_of(error)
    return f"{last.filename}:{last.lineno}: {type(error).__name__}: {reason_of(error)}"


@cache
def _scan_package(package: str, decorator: str) -> _Scan:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return _Scan({}, {})
    registered: list[tuple[Path, Entry]] = []
    problems: dict[str, str] = {}
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).glob("*.py")):
            try:
                tree = _parsed(path)
            except (OSError, RecursionError, SyntaxError, ValueError) as error:
                problems[path.stem] = _unreadable(path, error)
                continue
            names = {decorator, *_aliases(tree, decorator)}
            for node in tree.body:
                for call in _registrations(node, names):
                    name = _name_in(call)
                    if name is None:
                        problems[path.stem] = (
                            f'{path}:{call.lineno}: the name should be written out, as in @{decorator}("name"), for '
                            f"the class to be found"
                        )
                        continue
                    assert isinstance(node, ast.ClassDef)
                    summary = (ast.get_docstring(node) or "").partition("\n")[0]
                    registered.append((path, Entry(name, f"{package}.{path.stem}", node.name, summary, _OWN)))
    found: dict[str, Entry] = {}
    # A module is named after the class it registers: of two that register a name, that module keeps it.
    for path, entry in sorted(registered, key=lambda pair: (pair[1].name, pair[0].stem != _stem_of(pair[1].name))):
        first = found.setdefault(entry.name, entry)
        if first is not entry:
            problems[path.stem] = f"{path}: registers {entry.name!r}, as {first.module} does: choose another name"
    return _Scan(found, problems)


def _stem_of(name: str) -> str:
    return name.replace("-", "_")


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{path}:{error.lineno}: cannot be read as Python ({error.msg})"
    return f"{path}: cannot be read as Python ({reason_of(error)})"


def _aliases(tree: ast.Module, decorator: str) -> set[str]:
    """Other names under which a module imports the decorator."""
    imported = (alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names)
    return {alias.asname for alias in imported if alias.name == decorator and alias.asname}


def _registrations(node: ast.stmt, names: set[str]) -> list[ast.Call]:
    """The decorators of a class that register it: `@register_editor(…)` and `@registry.register_editor(…)`."""
    calls = [call for call in getattr(node, "decorator_list", ()) if isinstance(call, ast.Call)]
    return [
        call
        for call in calls
        if isinstance(node, ast.ClassDef)
        and (
            (isinstance(call.func, ast.Name) and call.func.id in names)
            or (isinstance(call.func, ast.Attribute) and call.func.attr in names)
        )
    ]


def _name_in(call: ast.Call) -> str | None:
    """The name that a decorator is given, by position or as `name=`; None if it is not written out or cannot be one."""
    given = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "name")]
    value = given[0].value if given and isinstance(given[0], ast.Constant) else None
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def _declared(module: str, class_name: str, name: str) -> Any:
    """Returns the literal that a class, or the one it inherits from, assigns to an attribute, or `_UNKNOWN`."""
    # To find another package's module would import that package.
    spec = importlib.util.find_spec(module) if module.startswith("grace_bench.") else None
    if spec is None or spec.origin is None:
        return _UNKNOWN
    tree = _parsed(Path(spec.origin))
    cls = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if cls is None:
        return _UNKNOWN
    bound = [node for node in _in_class_scope(cls) if _binds(node, name)]
    if bound:
        plain = [node for node in cls.body if isinstance(node, ast.Assign | ast.AnnAssign) and _targets(node) == bound]
        return _literal(plain[0].value) if plain else _UNKNOWN
    # Of `Base[Kind]`, the class is Base; `Generic[Kind]` declares nothing.
    plain_bases = [base.value if isinstance(base, ast.Subscript) else base for base in cls.bases]
    bases = [base.id if isinstance(base, ast.Name) else None for base in plain_bases]
    base, *others = [base for base in bases if base != "Generic"] or [None]
    if base is None or others:
        return _UNKNOWN
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
    for node in imports:
        for alias in node.names:
            if base == (alias.asname or alias.name):
                return _declared(node.module or "", alias.name, name)
    return _declared(module, base, name)


def _literal(node: ast.expr | None) -> Any:
    """Returns the value of a literal, or `_UNKNOWN` for any other expression."""
    if node is None:
        return _UNKNOWN
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _UNKNOWN


def _in_class_scope(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes of a class body, without the bodies of its functions, whose variables are no attributes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _in_class_scope(child)


def _binds(node: ast.AST, name: str) -> bool:
    """Whether a node gives a name a value, in whichever way."""
    if isinstance(node, ast.FunctionDef):
        return node.name == name
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


EDITORS: Registry[Any] = Registry("editor", "grace_bench.editors", "grace_bench.editing.strategy:EditorStrategy")
STREAMS: Registry[Any] = Registry("stream", "grace_bench.streams", "grace_bench.data.stream:EditStream")
METRICS: Registry[Any] = Registry("metric", "grace_bench.metrics", "grace_bench.evaluation.metric:EditMetric")

register_editor = EDITORS.register
register_stream = STREAMS.register
register_metric = METRICS.register
