"""The parts common to all figures: one style, reproducible files, and captions.

Nothing here changes matplotlib's global state, and the user's own matplotlib settings do not affect the figures.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_bench.common.files import write_atomically
from grace_bench.errors import UserError
from grace_bench.registry import EDITORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for all kinds of colour vision, without its faint yellow and without black, which marks the
# reference.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK = "#333333"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (9, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")

_DPI = 200
_STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    # Element ids are hashed with this instead of a random number.
    "svg.hashsalt": "grace-bench",
    # Text stays text, which makes the files smaller and searchable.
    "svg.fonttype": "none",
    # A dollar sign in the name of a model or a setting does not start a formula.
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.labelsize": 7,
    "ytick.color": INK,
    "ytick.labelsize": 7,
}


@contextmanager
def styled() -> Iterator[None]:
    """Applies the figures' style, on top of matplotlib's defaults, to everything drawn and saved inside the context."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of a size in inches, which leaves room for all its labels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def add_caption(figure: "Figure", *sentences: str) -> None:
    """Adds small lines below a figure that describe it."""
    width = int(figure.get_figwidth() * 19.5)
    text = "\n".join(line for sentence in sentences for line in textwrap.wrap(plain(sentence), width))
    figure.supxlabel(text, fontsize=6.5, color="#666666", x=0.01, ha="left", linespacing=1.4)


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Writes a figure as SVG and PNG; files of these names are replaced.

    Returns:
        The two paths.

    Raises:
        UserError: If the folder cannot be written to.
    """
    written = []
    # With a date or a version in it, the file would change although the figure does not.
    for suffix, metadata in (("svg", {"Date": None, "Creator": "grace-bench"}), ("png", {"Software": "grace-bench"})):
        buffer = io.BytesIO()
        with styled():
            figure.savefig(buffer, format=suffix, dpi=_DPI, metadata=metadata)
        written.append(write(folder / f"{name}.{suffix}", buffer.getvalue()))
    return written


def write(path: Path, content: bytes) -> Path:
    """Writes a file atomically and creates its folder if necessary.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"--out {path.parent}: {error.strerror or error}") from error
    return path


def editor_styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns colour, dashes and marker for each line, named by its editor.

    An editor looks the same in every figure; if an editor has several lines, the style depends on the line's order
    instead.
    """
    known = list(EDITORS.entries())
    if len(set(names)) < len(names) or not set(names) <= set(known):
        return [line_style(index) for index in range(len(names))]
    return [line_style(known.index(name)) for name in names]


def line_style(index: int) -> dict[str, Any]:
    """Returns the colour, dashes and marker of a line by its number; the first 330 all differ."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def legend_in(axes: "Axes", handles: Sequence[Any]) -> None:
    """Uses axes without data for the legend."""
    axes.axis("off")
    axes.legend(handles=list(handles), loc="center left", handlelength=3.2)


def label_numbers(axes: "Axes", ticks: Sequence[float]) -> None:
    """Puts the ticks of a logarithmic x axis at the measured numbers, written out."""
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def plain(text: str) -> str:
    r"""Returns text that a figure can hold: characters that cannot be printed or are not allowed in XML become a mark.

    >>> plain("a\x1bb")
    'a�b'
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def file_name(*parts: str) -> str:
    """Returns a file name of letters, digits, dots and hyphens; a model with the name of its stream is left out.

    >>> file_name("curves", "atlas-qa", "My Model/$x")
    'curves-atlas-qa-my-model-x'
    >>> file_name("curves", "toy", "toy")
    'curves-toy'
    """
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", part.lower())[:80].strip("-.") or "x" for part in dict.fromkeys(parts))
