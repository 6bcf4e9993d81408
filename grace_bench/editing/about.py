"""What a user weighs before choosing an editor, as each editor's class says it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class About:
    """An editor in a few phrases, for tables and the documentation.

    Attributes:
        source: The paper, such as `Meng et al., ICLR 2023`.
        changes: What an edit changes.
        needs: What it needs beside the requests, as far as its class does not say so otherwise; may be empty.
        costs: What an edit, and the edited model, cost.
        choose: When to choose it.
    """

    source: str
    changes: str
    needs: str = ""
    costs: str
    choose: str


_FLAGS: Mapping[str, str] = {
    "needs_subject": "the subject of each request",
    "needs_meta_training": "meta-training on the stream's `train` requests",
    "needs_replay": "earlier requests",
}

COLUMNS: Mapping[str, Callable[[Any], str]] = {
    "source": lambda editor: editor.about.source,
    "changes": lambda editor: editor.about.changes,
    "needs": lambda editor: needs_of(editor),
    "costs": lambda editor: editor.about.costs,
    "choose it": lambda editor: editor.about.choose,
    "a batch is": lambda editor: "one operation" if editor.edits_together else "its requests in turn",
    "tasks": lambda editor: ", ".join(task.replace("_", " ") for task in editor.supported_tasks),
}
"""The columns of the table of editors, each a function of an editor's class that has an `about`."""


def needs_of(editor: Any) -> str:
    """Returns what an editor's class needs beside requests: by its flags, then in its own words.

    >>> from types import SimpleNamespace
    >>> about = About(source="", changes="", needs="running text", costs="", choose="")
    >>> flags = {"needs_subject": True, "needs_meta_training": False, "needs_replay": False}
    >>> needs_of(SimpleNamespace(about=about, **flags))
    'the subject of each request; running text'
    """
    needs = [text for flag, text in _FLAGS.items() if getattr(editor, flag)]
    return "; ".join([*needs, *filter(None, [editor.about.needs])]) or "–"


def markdown_table(editors: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of a Markdown table of the editors that describe themselves.

    Args:
        editors: Classes by registered name.
    """
    yield "| editor | " + " | ".join(COLUMNS) + " |"
    yield "| :--- " * (len(COLUMNS) + 1) + "|"
    for name, editor in editors.items():
        if editor.about is not None:
            yield f"| `{name}` | " + " | ".join(column(editor) for column in COLUMNS.values()) + " |"
