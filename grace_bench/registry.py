"""One registry for editors, streams and metrics.

The names in a folder and what its classes declare are read from its source text, so listing them imports nothing. A
class is imported when it is asked for. Packages outside the repository register through entry points of the groups
`grace_bench.editors`, `grace_bench.streams` and `grace_bench.metrics`.
"""

import ast
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from grace_bench.errors import UserError, did_you_mean

T = TypeVar("T")

# It becomes a part of paths, of command lines and of file names on any system.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

_UNKNOWN: Any = object()
"""What `_declared` returns where the source alone does not tell."""


@dataclass(frozen=True)
class Entry:
    """What is known of a registered class before it is imported.

    Attributes:
        name: The registered name, as typed on the command line.
        module: The dotted module that defines the class.
        class_name: The class in that module.
        summary: The first line of the class's docstring, or the distribution's summary for an entry point.
        origin: `grace_bench`, or the name of the distribution that brings it.
    """

    name: str
    module: str
    class_name: str
    summary: str
    origin: str


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

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Returns a class decorator that registers the class as `name`.

        Raises:
            TypeError: If the class is not a subclass of the registry's base or has no docstring.
            ValueError: If the name cannot be the name of a folder, or another class already has it.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{self.kind} {name!r}: a name is of at most 64 letters, digits, hyphens and underscores")

        def decorate(cls: type[T]) -> type[T]:
            base_module, base_name = self._base.split(":")
            base = getattr(importlib.import_module(base_module), base_name)
            if not issubclass(cls, base):
                raise TypeError(f"{self.kind} {name!r}: {cls.__qualname__} is not a subclass of {base_name}")
            if not cls.__doc__:
                raise TypeError(f"{self.kind} {name!r}: {cls.__qualname__} needs a docstring")
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise ValueError(f"{self.kind} {name!r} is already registered by {known.__module__}")
            cls.registered_name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return decorate

    def entries(self) -> dict[str, Entry]:
        """Returns every entry by name: the package's own, those of installed packages, and those of this process."""
        own = dict(_scan_package(self.package, f"register_{self.kind}"))
        for point in sorted(entry_points(group=self.package), key=lambda point: point.name):
            if point.name in own or not _NAME.fullmatch(point.name):
                continue
            module, _, class_name = point.value.partition(":")
            distribution = point.dist
            own[point.name] = Entry(
                name=point.name,
                module=module,
                class_name=class_name,
                summary=(distribution.metadata["Summary"] or "") if distribution else "",
                origin=distribution.name if distribution else "entry point",
            )
        for name, cls in self._classes.items():
            if name not in own:
                summary = (cls.__doc__ or "").strip().partition("\n")[0]
                own[name] = Entry(name, cls.__module__, cls.__qualname__, summary, origin=cls.__module__)
        return own

    def check(self, name: str) -> None:
        """Makes sure that there is a class of that name, without importing it.

        Raises:
            UserError: If there is none, with the closest one that exists.
        """
        names = dict.fromkeys([*self.entries(), *self._classes])
        if name not in names:
            raise UserError(f"no {self.kind} {name!r}{did_you_mean(name, names)} (there are: {', '.join(names)})")

    def get(self, name: str) -> type[T]:
        """Imports and returns the class registered as `name`.

        Raises:
            UserError: If there is no such name, with the closest one that exists, or an installed package is broken.
        """
        if name in self._classes:
            return self._classes[name]
        self.check(name)
        entry = self.entries()[name]
        try:
            cls = getattr(importlib.import_module(entry.module), entry.class_name)
        except (ImportError, AttributeError) as error:
            if entry.origin == "grace_bench":
                raise
            raise UserError(
                f"{self.kind} {name!r} of the installed package {entry.origin} cannot be imported ({error})"
            ) from error
        if name not in self._classes:
            self.register(name)(cls)
        return self._classes[name]

    def declares(self, name: str, flag: str) -> bool:
        """Returns a boolean class attribute of the class registered as `name`, as `attribute` does."""
        return bool(self.attribute(name, flag))

    def attribute(self, name: str, attribute: str) -> Any:
        """Returns a class attribute of the class registered as `name`.

        A literal that one of the package's own classes declares is read from its source, so that nothing is imported.

        Raises:
            UserError: As `get` does.
        """
        own = _scan_package(self.package, f"register_{self.kind}").get(name)
        declared = _UNKNOWN
        if own is not None and name not in self._classes:
            declared = _declared(own.module, own.class_name, attribute)
        return getattr(self.get(name), attribute) if declared is _UNKNOWN else declared

    def by_class_name(self, class_name: str) -> type[T]:
        """Imports and returns the package's own class of that name, for `from grace_bench.editors import Grace`.

        Raises:
            AttributeError: If the package registers no such class.
        """
        for entry in _scan_package(self.package, f"register_{self.kind}").values():
            if entry.class_name == class_name:
                return self.get(entry.name)
        raise AttributeError(f"module {self.package!r} has no attribute {class_name!r}")


@cache
def _scan_package(package: str, decorator: str) -> dict[str, Entry]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return {}
    found = {}
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).glob("*.py")):
            for node in _parsed(path).body:
                if isinstance(node, ast.ClassDef) and (name := _registered_name(node, decorator)):
                    summary = (ast.get_docstring(node) or "").partition("\n")[0]
                    found[name] = Entry(name, f"{package}.{path.stem}", node.name, summary, "grace_bench")
    return dict(sorted(found.items()))


def _registered_name(node: ast.ClassDef, decorator: str) -> str | None:
    for call in node.decorator_list:
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == decorator
            and isinstance(call.args[0], ast.Constant)
        ):
            return str(call.args[0].value)
    return None


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
    if len(cls.bases) != 1 or not isinstance(cls.bases[0], ast.Name):
        return _UNKNOWN
    base = cls.bases[0].id
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
