"""A run in memory, for the figures that editors draw of themselves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from grace_bench.data.avalanche import EvaluationPlugin
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.editing.commands import EditedTrial
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.launch.arguments import run_arguments
from grace_bench.launch.compose import compose
from grace_bench.models.editable import EditableModel
from grace_bench.registry import METRICS
from grace_bench.run.loggers import RunLogger
from grace_bench.run.loop import RunLoop
from grace_bench.run.opening import Opened, open_benchmark
from grace_bench.run.settings import RunSettings


@dataclass(frozen=True)
class MemoryTrial:
    """A `grace_bench.editing.commands.Trial`.

    Attributes:
        opened: The stream and the model.
        make_editor: Makes the editor.
        settings: The settings of the run.
    """

    opened: Opened
    make_editor: Callable[..., EditorStrategy]
    settings: RunSettings

    @property
    def model(self) -> EditableModel:
        """The model, unedited."""
        return self.opened.model

    @property
    def benchmark(self) -> EditBenchmark:
        """The requests of the stream."""
        return self.opened.benchmark

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.settings.seed

    @property
    def split(self) -> str:
        """The split of the stream that is edited."""
        return self.settings.split

    @contextmanager
    def edited(self) -> Iterator[EditedTrial]:
        """Carries the run out; the model is edited inside the context, and unedited again afterwards."""
        metrics = (metric() for metric in METRICS.classes().values())
        evaluator = EvaluationPlugin(*metrics, loggers=[RunLogger()], collect_all=False)
        with self.make_editor(model=self.model, evaluator=evaluator) as editor:
            run = RunLoop(benchmark=self.benchmark, strategy=editor, schedule=self.settings.schedule)
            run.run()
            requests = tuple(self.benchmark.data.edits[index] for index in run.position.edited)
            yield EditedTrial(editor=editor, requests=requests, metrics=dict(run.metrics()))


def open_trial(overrides: Sequence[str]) -> MemoryTrial:
    """Opens a run in memory.

    Args:
        overrides: Settings of the run.

    Raises:
        UserError: If they do not compose, or data or model cannot be read.
    """
    stream, asked = run_arguments(compose(overrides))
    make_editor = asked.pop("editor")
    return MemoryTrial(open_benchmark(stream, **asked, progress=None), make_editor, asked["settings"])
