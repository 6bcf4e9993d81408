"""The registry: what is there is known without importing it, and only what fits gets in."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grace_bench.analysis.report import TRAITS
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.registry import EDITORS, METRICS, STREAMS, Registry

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
