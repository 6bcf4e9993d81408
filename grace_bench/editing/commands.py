"""An editor's additions to the command line: its own figures, and recordings that it replays."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from grace_bench.errors import UserError

if TYPE_CHECKING:
    from grace_bench.data.benchmark import EditBenchmark
    from grace_bench.data.requests import EditRequest
    from grace_bench.models.editable import EditableModel


class FigureKind(TypedDict):
    """A kind of figure, as an editor declares it in `EditorStrategy.figures`.

    Declared as a literal, so that kinds are listed from the source text, without importing the editor.

    Attributes:
        draw: `module:function`. Called as `draw(folders, out)` with run folders, or as `draw(overrides, out,
            open_trial)` with settings of a run; it writes the figure into the folder `out` and returns its files.
        takes: The arguments of the command: `runs` for run folders, `options` for settings of a run.
        shows: What the figure shows, for the help of the command line.
    """

    draw: str
    takes: Literal["runs", "options"]
    shows: str


@dataclass(frozen=True, kw_only=True)
class EditedTrial:
    """A finished trial.

    Attributes:
        editor: The editor, with its edits.
        requests: The edited requests, in order.
        metrics: The scores at the end, by metric.
    """

    editor: Any
    requests: tuple["EditRequest", ...]
    metrics: Mapping[str, float]


class Trial(Protocol):
    """A stream, a model and an editor, opened as for a run but without a run folder."""

    @property
    def model(self) -> "EditableModel":
        """The model, unedited."""

    @property
    def benchmark(self) -> "EditBenchmark":
        """The requests of the stream."""

    @property
    def seed(self) -> int:
        """The seed of the run."""

    @property
    def split(self) -> str:
        """The edited split of the stream."""

    def edited(self) -> AbstractContextManager[EditedTrial]:
        """Runs in memory; the model is edited inside the context and unedited again afterwards."""


OpenTrial = Callable[[Sequence[str]], Trial]
"""Opens a trial from settings of a run, such as `stream=toy`; raises `UserError` if they are invalid."""

DrawFromRuns = Callable[..., list[Path]]
"""The function that `FigureKind.draw` names if the figure takes runs: it gets their paths and the folder to write.

If it shows scores, it also has a keyword argument `score`, the score of the panel to show, None for the main one.
"""

DrawFromOptions = Callable[[Sequence[str], Path, OpenTrial], list[Path]]
"""The type of the function that `FigureKind.draw` names if the figure takes options."""


@dataclass(frozen=True)
class Verdict:
    """The result of replaying a recording.

    Attributes:
        difference: The first difference, with its edit and size; None if everything agrees.
        notes: Agreements that hold only up to rounding.
        not_replayed: Why the recording was not replayed at all, such as a fault that it documents; None if it was.
    """

    difference: str | None = None
    notes: tuple[str, ...] = ()
    not_replayed: str | None = None


class OtherRecordError(UserError):
    """A recording is of another kind of editor, for whose replay it may be usable."""


Replay = Callable[[Path], Verdict]
"""The type of the function that `EditorStrategy.traces` names: replays one recording.

Raises `UserError` if it is unusable, `OtherRecordError` if it was not made for this function.
"""
