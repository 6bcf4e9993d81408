"""The kinds of figures: the command's own and what editors declare, known without importing an editor."""

import subprocess
import sys
from importlib import import_module

import pytest

from grace_bench.cli import main
from grace_bench.launch.figures import figure_kinds


def test_kinds_are_listed_without_importing_an_editor() -> None:
    program = """
import sys
from grace_bench.launch.figures import figure_kinds
print(*(name for name, _ in figure_kinds()), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["curves", "editors", "scores", "sweep", "overlap", "toy", "separability", "False"]


def test_every_kind_is_drawn_by_a_function_that_is_there_and_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, kind in figure_kinds():
        module, _, function = kind["draw"].partition(":")
        assert callable(getattr(import_module(module), function))
        assert f"{name} {'RUNS ...' if kind['takes'] == 'runs' else '[option=value ...]'} {kind['shows']}" in shown
