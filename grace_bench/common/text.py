"""Escaping of untrusted text for Markdown, LaTeX, CSV and the terminal."""

import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Line = Sequence[tuple[str, bool]]
"""A line of a table: each cell's text, and whether it is bold."""


def visible(text: str) -> str:
    r"""Returns the text with control, format and line-separator characters written as escapes.

    >>> visible("a\x1b[1m")
    'a\\x1b[1m'
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else c
        for c in text
    )


def on_one_line(text: str) -> str:
    r"""Returns the text on one line, with control characters written as escapes.

    >>> on_one_line("a\nb\x1b[1m")
    'a b\\x1b[1m'
    """
    return visible(text.replace("\n", " ").replace("\t", " "))


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~#$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def markdown_text(text: str) -> str:
    r"""Returns Markdown that renders as exactly this text.

    >>> markdown_text("a|b")
    'a\\|b'
    """
    return text.translate(_MARKDOWN)


def markdown_table(headers: Sequence[str], lines: Iterable[Line], *, n_names: int) -> str:
    """Returns a Markdown table with the first `n_names` columns left-aligned and the others right-aligned."""
    rows = [
        [markdown_text(header) for header in headers],
        [":---" if index < n_names else "---:" for index in range(len(headers))],
    ]
    for line in lines:
        texts = [(markdown_text(text), is_bold) for text, is_bold in line]
        rows.append([f"**{text}**" if is_bold else text for text, is_bold in texts])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "±": r"$\pm$",
        "≈": r"$\approx$",
        "≥": r"$\geq$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "−": r"$-$",
        "·": r"\textperiodcentered{}",
        "–": "--",
    }
)


def latex_text(text: str) -> str:
    r"""Returns LaTeX that typesets exactly this text.

    >>> latex_text("50 %")
    '50 \\%'
    """
    return text.translate(_LATEX)


def latex_cells(line: Line) -> str:
    """Returns a line of a LaTeX table."""
    texts = [(latex_text(text), is_bold) for text, is_bold in line]
    if texts[0][0].startswith(("[", "*")):
        # The \\ that ended the line before would take it for its argument.
        texts[0] = (f"{{}}{texts[0][0]}", texts[0][1])
    return " & ".join(rf"\textbf{{{text}}}" if is_bold else text for text, is_bold in texts) + r" \\"


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns records with the same fields as CSV with a header; None becomes an empty cell.

    A text that begins with `=`, `+`, `-` or `@`, which a spreadsheet would take for a formula, gets an apostrophe in
    front; numbers stay as they are.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _csv_cell(v) if isinstance(v, str) else v for name, v in record.items()})
    return buffer.getvalue()


def _csv_cell(text: str) -> str:
    shown = visible(text)
    # Some spreadsheets treat the full-width forms alike.
    return f"'{shown}" if shown.lstrip().startswith(tuple("=+-@＝＋－＠")) else shown
