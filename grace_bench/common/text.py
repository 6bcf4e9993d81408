"""Text in Markdown, LaTeX, CSV and the terminal: nothing that comes from a data set is obeyed."""

import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Line = Sequence[tuple[str, bool]]
"""A line of a table: each cell's text, and whether it stands in bold."""


def visible(text: str) -> str:
    r"""Returns the text with characters that steer a terminal or a line written as escapes.

    >>> visible("a\x1b[1m")
    'a\\x1b[1m'
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else c
        for c in text
    )


def on_one_line(text: str) -> str:
    r"""Returns the text on one line, with what steers a terminal written as escapes.

    >>> on_one_line("a\nb\x1b[1m")
    'a b\\x1b[1m'
    """
    return visible(text.replace("\n", " ").replace("\t", " "))


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~#$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def markdown_text(text: str) -> str:
    r"""Returns the text as Markdown shows it letter by letter.

    >>> markdown_text("a|b")
    'a\\|b'
    """
    return text.translate(_MARKDOWN)


def markdown_table(headers: Sequence[str], lines: Iterable[Line], *, n_names: int) -> str:
    """Returns a Markdown table, the first `n_names` columns to the left and the others to the right."""
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
    r"""Returns the text as LaTeX sets it letter by letter.

    >>> latex_text("50 %")
    '50 \\%'
    """
    return text.translate(_LATEX)


def latex_cells(line: Line) -> str:
    """Returns a line of a LaTeX table."""
    texts = [(latex_text(text), is_bold) for text, is_bold in line]
    if texts[0][0].startswith(("[", "*")):
        # The command that ended the line before would take it for its argument.
        texts[0] = (f"{{}}{texts[0][0]}", texts[0][1])
    return " & ".join(rf"\textbf{{{text}}}" if is_bold else text for text, is_bold in texts) + r" \\"


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns records of the same fields as CSV with a header; what is None is an empty cell.

    A text that a spreadsheet would compute, because it begins with `=`, `+`, `-` or `@`, gets an apostrophe in front;
    numbers stay as they are.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _csv_cell(v) if isinstance(v, str) else v for name, v in record.items()})
    return buffer.getvalue()


def _csv_cell(text: str) -> str:
    shown = visible(text)
    # In their wide forms, too, which some spreadsheets take for the same.
    return f"'{shown}" if shown.lstrip().startswith(tuple("=+-@＝＋－＠")) else shown
