"""What is wrong with the class of a stream is one line before it is ever made."""

from typing import Any

import pytest

from grace_bench.data.stream import EditStream, StreamData, StreamMetadata

METADATA = StreamMetadata(source="this test", revision="1", license="MIT")


class Points(EditStream):
    """Points of the plane."""

    task = "classification"
    metadata = METADATA

    def __init__(self, *, n: int = 5, max_new_tokens: int = 3) -> None:
        self.n = n
        self.max_new_tokens = max_new_tokens

    def load(self) -> StreamData:
        return StreamData(edits=())


class AnyTask(Points):
    """Points whose task the user chooses."""

    task: Any

    def __init__(self, *, task: str = "qa") -> None:
        super().__init__()
        self.task = task


def changed(*without: str, **attributes: Any) -> type[EditStream]:
    """The class of points with some attributes left out or replaced."""
    body = {"__doc__": Points.__doc__, "task": Points.task, "metadata": METADATA, "load": Points.load, **attributes}
    return type("Changed", (EditStream,), {name: value for name, value in body.items() if name not in without})


def of_position(self: Any, n: int = 5) -> None:
    self.n = n


def of_limit(self: Any, *, max_new_tokens: int = 5) -> None:
    """Forgets its argument, for which `EditStream` has a default."""


@pytest.mark.parametrize("cls", [Points, AnyTask, changed()])
def test_a_stream_with_metadata_and_a_task_is_fine(cls: type[EditStream]) -> None:
    assert cls.check_class() is None


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (
            changed("metadata"),
            "Changed has no metadata: set `metadata = StreamMetadata(source=..., revision=..., license=...)`",
        ),
        (
            changed(metadata={"source": "this test"}),
            "Changed has no metadata: set `metadata = StreamMetadata(source=..., revision=..., license=...)`",
        ),
        (
            changed("task"),
            "Changed has no task: set `task` to one of classification, qa, completion, language_modelling",
        ),
        (
            changed(task="completions"),
            "task of Changed is 'completions'; did you mean 'completion'? "
            "(there are: classification, qa, completion, language_modelling)",
        ),
        (
            changed(order="shufle"),
            "order of Changed is 'shufle'; did you mean 'shuffle'? (there are: shuffle, stream)",
        ),
        (
            changed(normalise="exact"),
            "normalise of Changed is 'exact' (there are: squad, strict)",
        ),
        (changed("load"), "Changed is abstract: implement load"),
        (
            changed("__doc__"),
            "Changed has no docstring: write one, its first line describes the class in listings",
        ),
        (
            changed(__init__=of_position),
            "Changed.__init__ takes n by position: put `*` in front to make it keyword-only",
        ),
        (
            changed(__init__=of_limit),
            "Changed.__init__ does not keep its argument 'max_new_tokens': set `self.max_new_tokens = max_new_tokens`",
        ),
    ],
)
def test_what_is_wrong_with_a_stream_is_one_line_with_the_remedy(cls: type[EditStream], says: str) -> None:
    assert cls.check_class() == says
