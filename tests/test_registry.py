"""The registry: what is there is known without importing it, and only what fits gets in."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grace_bench.analysis.report import TRAITS
from grace_bench.cli import main
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.registry import EDITORS, METRICS, STREAMS, Registry, _scan_package

REGISTRIES = pytest.mark.parametrize("registry", [EDITORS, STREAMS, METRICS], ids=lambda registry: registry.kind)
NAMED_BY_MODULE = pytest.mark.parametrize("registry", [EDITORS, STREAMS], ids=lambda registry: registry.kind)


@pytest.fixture
def editors() -> Registry[Any]:
    """A registry of editors like the package's own, for classes that a test defines."""
    return Registry("editor", "grace_bench.editors", "grace_bench.editing.strategy:EditorStrategy")


class Silent(EditorStrategy):
    """Edits nothing."""

    def edit(self, batch: EditBatch) -> EditOutcome:
        return EditOutcome()


def modules(registry: Registry[Any]) -> Iterator[tuple[str, str]]:
    """The stem and the source of every module in a registry's folder."""
    package = importlib.import_module(registry.package)
    for path in sorted(Path(next(iter(package.__path__))).glob("*.py")):
        yield path.stem, path.read_text(encoding="utf-8")


def test_names_and_summaries_are_read_without_importing_torch_avalanche_or_transformers() -> None:
    program = """
import json, sys
from grace_bench.registry import EDITORS, METRICS, STREAMS
entries = {r.kind: {e.name: e.summary for e in r.entries().values()} for r in (EDITORS, STREAMS, METRICS)}
heavy = sorted({"torch", "avalanche", "transformers", "datasets"} & {name.partition(".")[0] for name in sys.modules})
own = sorted(e.module for r in (EDITORS, STREAMS, METRICS) for e in r.entries().values() if e.module in sys.modules)
print(json.dumps([entries, heavy, own]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    entries, heavy, imported = json.loads(done.stdout)
    assert heavy == []
    assert imported == []
    assert {"none", "grace", "ft"} <= entries["editor"].keys()
    assert {"atlas-qa", "toy", "jsonl", "counterfact"} <= entries["stream"].keys()
    for registry in (EDITORS, STREAMS, METRICS):
        for name, summary in entries[registry.kind].items():
            assert summary == (registry.get(name).__doc__ or "").strip().splitlines()[0]
            assert len(summary) > 10


@NAMED_BY_MODULE
def test_a_module_is_named_as_what_it_registers(registry: Registry[Any]) -> None:
    for entry in registry.entries().values():
        if entry.origin == "grace_bench":
            assert entry.module == f"{registry.package}.{entry.name.replace('-', '_')}"


@REGISTRIES
def test_every_registration_in_a_folder_is_found(registry: Registry[Any]) -> None:
    written = {
        name: stem
        for stem, source in modules(registry)
        for name in re.findall(rf'^@register_{registry.kind}\("([^"]+)"\)', source, flags=re.MULTILINE)
    }
    found = {
        entry.name: entry.module.rpartition(".")[2]
        for entry in registry.entries().values()
        if entry.origin == "grace_bench"
    }
    assert found == written
    assert written


@REGISTRIES
def test_a_registered_class_knows_its_name_and_can_be_had_from_the_package(registry: Registry[Any]) -> None:
    package = importlib.import_module(registry.package)
    for name, entry in registry.entries().items():
        cls = registry.get(name)
        assert cls.registered_name == name
        assert cls.__module__ == entry.module
        assert registry.by_class_name(entry.class_name) is cls
    assert package.__name__ == registry.package
    with pytest.raises(AttributeError, match="NoSuchClass"):
        registry.by_class_name("NoSuchClass")


@pytest.mark.parametrize(
    ("registry", "typed", "meant"), [(EDITORS, "grcae", "grace"), (STREAMS, "atlas-q", "atlas-qa")]
)
def test_an_unknown_name_is_answered_with_the_closest_one(registry: Registry[Any], typed: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        registry.get(typed)
    message = str(caught.value)
    assert f"no {registry.kind} '{typed}'" in message
    assert f"did you mean '{meant}'?" in message
    assert all(name in message for name in registry.entries())
    assert "\n" not in message


def test_a_name_like_no_other_is_answered_with_all_there_are() -> None:
    with pytest.raises(UserError) as caught:
        EDITORS.get("zzzzzz")
    assert "did you mean" not in str(caught.value)
    assert "grace" in str(caught.value)


def test_a_class_of_another_kind_is_refused(editors: Registry[Any]) -> None:
    class NotAnEditor:
        """Something else."""

    with pytest.raises(TypeError, match=r"editor 'odd'.*NotAnEditor is not a subclass of EditorStrategy"):
        editors.register("odd")(NotAnEditor)
    with pytest.raises(UserError):
        editors.get("odd")


def test_a_class_without_a_docstring_is_refused(editors: Registry[Any]) -> None:
    class Undocumented(Silent):
        pass

    with pytest.raises(TypeError, match="Undocumented needs a docstring"):
        editors.register("odd")(Undocumented)


def test_a_name_belongs_to_one_class(editors: Registry[Any]) -> None:
    class Other(Silent):
        """Another one that edits nothing."""

    assert editors.register("silent")(Silent) is Silent
    assert editors.get("silent") is Silent
    assert editors.register("silent")(Silent) is Silent
    with pytest.raises(ValueError, match="editor 'silent' is already registered by"):
        editors.register("silent")(Other)
    assert editors.get("silent") is Silent


def test_what_an_editor_declares_is_read_without_importing_it() -> None:
    program = f"""
import json, sys
from grace_bench.registry import EDITORS
declared = {{name: {{flag: EDITORS.attribute(name, flag) for flag in {TRAITS}}}
            for name, entry in EDITORS.entries().items() if entry.origin == "grace_bench"}}
print(json.dumps([declared, "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    declared, imported = json.loads(done.stdout)
    assert not imported
    assert declared == {name: {flag: getattr(EDITORS.get(name), flag) for flag in TRAITS} for name in declared}
    # Its own word, that of the editor it inherits from, and that of the base class.
    assert declared["ft_ewc"] == {
        "needs_subject": False,
        "needs_replay": True,
        "needs_meta_training": False,
        "freezes_weights": False,
    }


ODD = """
def register_odd(name):
    return lambda cls: cls

class Base:
    flag = False

class Mixed:
    flag = True

@register_odd("odd")
{source}
    __doc__ = 'An odd one.'
"""


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("odd_expression", "class Odd(Base):\n    flag = not False"),
        ("odd_chain", "class Odd(Base):\n    flag = other = True"),
        ("odd_twice", "class Odd(Base):\n    flag = False\n    flag = True"),
        ("odd_condition", "class Odd(Base):\n    if True:\n        flag = True"),
        ("odd_bases", "class Odd(Mixed, Base):"),
        ("odd_variable", "class Odd(Mixed):\n    def method(self) -> None:\n        flag = False"),
    ],
)
def test_what_source_does_not_say_plainly_is_asked_of_the_class(
    package: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "odd.py").write_text(ODD.format(source=source), encoding="utf-8")
    grace_bench = importlib.import_module("grace_bench")
    monkeypatch.setattr(grace_bench, "__path__", [*grace_bench.__path__, str(tmp_path)])
    registry = Registry[Any]("odd", f"grace_bench.{package}", f"grace_bench.{package}.odd:Base")
    assert registry.attribute("odd", "flag") is True


LITERALS = """
from grace_bench.{package}.base import Base

def register_odd(name):
    return lambda cls: cls

@register_odd("own")
class Own(Base):
    text = "a" "b"
    parts = ("x", 1, None)
    ratings = {{"low": -0.5}}
"""


def test_a_literal_of_any_kind_is_read_from_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = "odd_literals"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "base.py").write_text("raise ImportError\nclass Base:\n    size = 3\n", encoding="utf-8")
    (tmp_path / package / "odd.py").write_text(LITERALS.format(package=package), encoding="utf-8")
    grace_bench = importlib.import_module("grace_bench")
    monkeypatch.setattr(grace_bench, "__path__", [*grace_bench.__path__, str(tmp_path)])
    registry = Registry[Any]("odd", f"grace_bench.{package}", f"grace_bench.{package}.base:Base")
    assert registry.attribute("own", "text") == "ab"
    assert registry.attribute("own", "parts") == ("x", 1, None)
    assert registry.attribute("own", "ratings") == {"low": -0.5}
    assert registry.attribute("own", "size") == 3


# --- somebody else's mistakes ----------------------------------------------------------------------------------------

SMALL = ("stream=toy", "editor=none", "max_edits=1", "max_upstream=5", "wandb.mode=disabled")
EDITOR = """
from grace_bench.editors import EditorStrategy, EditOutcome, register_editor
{before}
@register_editor({name})
class Extra(EditorStrategy):
    \"\"\"Edits nothing, from another file.\"\"\"

    {attribute}

    def edit(self, batch):
        return EditOutcome()

    def rollback(self, n=1):
        pass
"""


def source(*, name: str = '"extra"', before: str = "", attribute: str = "needs_subject = False") -> str:
    return EDITOR.format(name=name, before=before, attribute=attribute)


@pytest.fixture
def add_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Adds a file to the folder of a registry's classes, for the length of a test."""
    added: list[str] = []

    def add(name: str, content: str | bytes, registry: Registry[Any] = EDITORS) -> Path:
        package = importlib.import_module(registry.package)
        folder = tmp_path / registry.package
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.py"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        locations = [*package.__path__, str(folder)]
        monkeypatch.setattr(package, "__path__", locations)
        monkeypatch.setattr(package.__spec__, "submodule_search_locations", locations)
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
        monkeypatch.setattr(registry, "_reported", set())
        _scan_package.cache_clear()
        importlib.invalidate_caches()
        added.append(f"{registry.package}.{name}")
        return path

    yield add
    for module in added:
        sys.modules.pop(module, None)
    _scan_package.cache_clear()


UNREADABLE: dict[str, tuple[str | bytes, str]] = {
    "half-written": ("@register_editor(", "PATH:1: cannot be read as Python ('(' was never closed)"),
    "another encoding": (b"NAME = '\xff\xfe'", "PATH: cannot be read as Python ("),
    "a null byte": (b"\x00", "PATH: cannot be read as Python (source code string cannot contain null bytes)"),
    "a computed name": (
        source(name="NAME", before='NAME = "ex" + "tra"'),
        'PATH:4: the name should be written out, as in @register_editor("name"), for the class to be found',
    ),
    "no name": (source(name=""), "PATH:4: the name should be written out"),
}


@pytest.mark.parametrize(("content", "says"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_cannot_be_read_is_one_line_for_those_who_list_or_need_it(
    content: str | bytes, says: str, add_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = [*EDITORS.entries()]
    expected = says.replace("PATH", str(add_file("extra", content)))
    assert main(["list", "editors"]) == 0
    listed = capsys.readouterr()
    assert [line.split()[0] for line in listed.out.splitlines()[1:] if line[:1].strip()] == before
    (line,) = listed.err.splitlines()
    assert line.startswith(f"grace-bench: {expected}")
    assert main(["run", "stream=toy", "editor=extra"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"grace-bench: editor 'extra': {expected}")
    assert main(["run", *SMALL, f"out={tmp_path / 'runs'}"]) == 0
    assert "extra" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no editor 'nothing' .*extra\.py"):
        EDITORS.get("nothing")


BROKEN = {
    "a missing library": (source(before="import not_installed"), "(No module named 'not_installed')"),
    "an error at import": (source(before="HALF = 1 / 0"), "extra.py:3: ZeroDivisionError: division by zero)"),
    "a broken contract": (
        source(attribute='check_class = classmethod(lambda cls: "Extra has no `metadata`")'),
        "extra.py): Extra has no `metadata`)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "says"), BROKEN.values(), ids=BROKEN)
def test_a_class_that_cannot_be_imported_is_one_line_for_those_who_ask_for_it_and_stops_nobody_else(
    content: str, says: str, add_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    add_file("extra", content)
    assert main(["run", "stream=toy", "editor=extra"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grace-bench: editor 'extra' cannot be imported (")
    assert line.endswith(says)
    assert main(["run", *SMALL, f"out={tmp_path / 'runs'}"]) == 0
    assert "extra" not in capsys.readouterr().err
    assert "extra" not in EDITORS.classes()
    assert EDITORS.classes().keys() >= {"none", "grace", "ft"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "'extra' cannot be imported" in line


@pytest.mark.parametrize("file", ["aaa", "zzz"])
def test_a_name_that_two_files_register_stays_with_the_file_of_that_name(
    file: str, add_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = add_file(file, source(name='"none"'))
    assert EDITORS.entries()["none"].module == "grace_bench.editors.none"
    assert main(["list", "editors"]) == 0
    assert capsys.readouterr().err == (
        f"grace-bench: {path}: registers 'none', as grace_bench.editors.none does: choose another name\n"
    )


@pytest.mark.parametrize(
    "form",
    [
        source(name='name="extra"'),
        source(before="from grace_bench import registry\n").replace("@register_editor", "@registry.register_editor"),
        source().replace("register_editor\n", "register_editor as own\n").replace("@register_editor", "@own"),
    ],
    ids=["a keyword", "an attribute", "another name"],
)
def test_a_decorator_may_be_written_in_any_form(form: str, add_file: Callable[..., Path]) -> None:
    path = add_file("extra", form)
    assert EDITORS.entries()["extra"].summary == "Edits nothing, from another file."
    assert EDITORS.get("extra").registered_name == "extra"
    assert sys.modules[EDITORS.get("extra").__module__].__file__ == str(path)


@pytest.mark.parametrize("content", ["import not_installed", "class ("])
def test_a_broken_metric_is_one_line_and_the_others_are_measured(
    content: str, add_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    registered = (
        "\nfrom grace_bench.metrics import EditMetric, register_metric\n"
        "@register_metric('extra')\nclass Extra(EditMetric):\n    'Measures nothing.'\n"
    )
    add_file("extra", content + registered, METRICS)
    assert main(["run", *SMALL, f"out={tmp_path / 'runs'}"]) == 0
    errors = [line for line in capsys.readouterr().err.splitlines() if "extra" in line]
    assert len(errors) == 1
    (result,) = (tmp_path / "runs").rglob("result.json")
    assert json.loads(result.read_bytes())["metrics"]["TRR"] is not None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("not_there:Extra", "No module named 'not_there'"),
        ("json:Extra", "module 'json' has no attribute 'Extra'"),
        ("json", "has no attribute ''"),
        ("json:JSONDecoder", "JSONDecoder is not a subclass of EditorStrategy"),
        ("half_written:Extra", "half_written.py:1: '(' was never closed"),
    ],
)
def test_a_broken_entry_point_names_its_package_and_stops_nobody_else(
    value: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    info = tmp_path / "site" / "somebodys-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\nSummary: An extra.\n")
    (info / "entry_points.txt").write_text(f"[grace_bench.editors]\nextra = {value}\n")
    (tmp_path / "site" / "half_written.py").write_text("print(")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(EDITORS, "_reported", set())
    assert EDITORS.entries()["extra"].origin == "somebodys"
    assert main(["run", "stream=toy", "editor=extra"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grace-bench: editor 'extra' of the installed package somebodys cannot be imported (")
    assert says in line
    assert main(["list"]) == 0
    assert main(["run", *SMALL, f"out={tmp_path / 'runs'}"]) == 0
    assert "somebodys" not in capsys.readouterr().err


def test_what_a_base_class_says_of_a_class_is_said_when_it_is_registered(editors: Registry[Any]) -> None:
    class Wrong(Silent):
        """Breaks the contract."""

        @classmethod
        def check_class(cls) -> str | None:
            return f"{cls.__name__} keeps `lr` under no attribute of that name: set self.lr = lr"

    with pytest.raises(TypeError) as caught:
        editors.register("wrong")(Wrong)
    assert str(caught.value) == (
        f"editor 'wrong' ({__file__}): Wrong keeps `lr` under no attribute of that name: set self.lr = lr"
    )
    assert "wrong" not in editors.entries()


def test_a_class_of_this_process_is_an_entry_like_any_other(editors: Registry[Any]) -> None:
    assert "silent" not in editors.entries()
    editors.register("silent")(Silent)
    entry = editors.entries()["silent"]
    assert (entry.module, entry.class_name, entry.summary) == (__name__, "Silent", "Edits nothing.")
    assert list(editors.entries())[-1] == "silent"
    assert editors.classes()["silent"] is Silent
    assert editors.name_of(f"{__name__}.Silent") == "silent"
    assert editors.attribute("silent", "needs_subject") is False


@pytest.mark.parametrize("name", [None, 3, "", "a b", "../x", "a" * 65])
def test_a_name_that_cannot_be_one_of_a_folder_is_refused(name: Any, editors: Registry[Any]) -> None:
    with pytest.raises(ValueError, match="a name has at most 64 letters"):
        editors.register(name)
