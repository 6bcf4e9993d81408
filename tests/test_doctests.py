"""The examples in docstrings say what happens."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import grace_bench
from grace_bench import editors, metrics, streams


def with_examples() -> Iterator[str]:
    for package in (grace_bench, editors, metrics, streams):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__"):
                module = importlib.import_module(info.name)
                if any(test.examples for test in doctest.DocTestFinder().find(module)):
                    yield info.name


MODULES = list(with_examples())


def test_every_kind_of_module_has_examples() -> None:
    assert {
        "grace_bench.models.tasks.text_scores",
        "grace_bench.models.encoding",
        "grace_bench.metrics.success",
    } <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
