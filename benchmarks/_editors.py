"""What every editor is timed on, and one side of the comparison: an editor on the exact or the plain engine."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from _measure import peak
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.models.editable import EditableModel
from grace_bench.models.engine.engine import EngineName
from grace_bench.models.tasks.lookup import get_task
from grace_bench.registry import EDITORS

DOWN = "model.layers.{}.mlp.down_proj"
MIDDLE = [DOWN.format(block) for block in range(10, 15)]
CONTEXTS = {"n_prefixes": 5}
ENGINES: tuple[EngineName, ...] = ("plain", "exact")
N_TRAIN = 200
"""The facts behind the edited ones that serve as running text and background prompts."""


@dataclass(frozen=True)
class Work:
    """What an editor is timed on.

    Attributes:
        target: The ratio to reach.
        layer: The edited layer.
        options: The editor's options.
        steps: The option that counts its gradient steps; None if it takes none.
    """

    target: float
    layer: str = DOWN.format(27)
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: str | None = "n_iter"


WORK = {
    "memit": Work(6, MIDDLE[-1], {"layers": MIDDLE, **CONTEXTS}),
    "alphaedit": Work(6, MIDDLE[-1], {"layers": MIDDLE, **CONTEXTS}),
    "rome": Work(5, MIDDLE[0], {"n_iter": 25, **CONTEXTS}),
    "r_rome": Work(5, MIDDLE[0], {"n_iter": 25, **CONTEXTS}),
    "wise": Work(8, options={"n_iter": 30}),
    "memoir": Work(3),
    "ultraedit": Work(3, options={"layers": [DOWN.format(block) for block in range(18, 26)]}, steps=None),
    "ft": Work(5),
    "ft_bf": Work(3, steps="n_epochs"),
    "lora": Work(5),
    "melo": Work(3, options={"layers": [DOWN.format(27)]}),
}


class Side:
    """One engine with an editor.

    Args:
        engine: The engine's name.
        module: The network.
        tokenizer: Its tokenizer.
        name: The editor's registered name.
        work: What it is timed on.
        requests: The requests to edit.
        train: The requests for training.
    """

    def __init__(
        self,
        engine: EngineName,
        module: nn.Module,
        tokenizer: Any,
        name: str,
        work: Work,
        requests: Sequence[EditRequest],
        train: Sequence[EditRequest],
    ) -> None:
        # As in a run, the plain engine takes one input at a time.
        task = get_task("completion", batch_size=1 if engine == "plain" else 64)
        self.model = EditableModel(module, layer=work.layer, task=task, tokenizer=tokenizer, engine=engine)
        self.name, self.work, self.requests, self.train = name, work, requests, train
        self.losses: list[float | None] = []
        self.steps: list[int | None] = []

    @contextmanager
    def editor(self, **options: Any) -> Iterator[EditorStrategy]:
        """An editor that is ready for its first edit."""
        editor: EditorStrategy = EDITORS.get(self.name)(model=self.model, **{**self.work.options, **options})
        with editor:
            editor.prepare(self.train)
            if editor.needs_upstream_prompts:
                editor.read_upstream([request.prompt for request in self.train])
            yield editor

    def edit(self, editor: EditorStrategy) -> float:
        """Edits all requests from the unedited model on, and returns the processor seconds of an edit."""
        editor.rollback()
        started = time.process_time()
        outcomes = editor.edit_texts(self.requests)
        seconds = time.process_time() - started
        failed = next((outcome.failed for outcome in outcomes if outcome.failed is not None), None)
        if failed is not None:
            raise RuntimeError(f"{self.name}: {failed}")
        self.losses = [loss for outcome in outcomes for loss in (outcome.loss_first, outcome.loss)]
        self.steps = [outcome.steps for outcome in outcomes]
        return seconds / len(self.requests)

    def operations(self, editor: EditorStrategy) -> float:
        """Returns the floating-point operations of an edit, counted."""
        with FlopCounterMode(display=False) as counter:
            self.edit(editor)
        return counter.get_total_flops() / len(self.requests)


def facts(path: Path, n: int) -> tuple[list[EditRequest], list[EditRequest]]:
    """Returns the first n facts of a CounterFact file in EasyEdit's format (JSON lines), and `N_TRAIN` further ones."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for _, line in zip(range(n + N_TRAIN), lines, strict=False)]
    requests = [
        EditRequest(id=str(number), prompt=record["prompt"], target=record["target_new"], subject=record["subject"])
        for number, record in enumerate(records)
    ]
    return requests[:n], requests[n:]


def measure(
    name: str,
    module: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    train: Sequence[EditRequest],
    *,
    repeats: int,
) -> dict[str, Any]:
    """Returns the figures for one editor's row of the table; all are of processor time."""
    work = WORK[name]
    # Each has the network to itself: an editor that acts by hooks would act on the other's passes too.
    sides = {engine: Side(engine, deepcopy(module), tokenizer, name, work, requests, train) for engine in ENGINES}
    fastest = peak(time.process_time)
    seconds: dict[str, list[float]] = {engine: [] for engine in sides}
    with ExitStack() as stack:
        editors = {engine: stack.enter_context(side.editor()) for engine, side in sides.items()}
        # The exact engine checks what it assumes at first use.
        sides["exact"].edit(editors["exact"])
        for _ in range(repeats):
            for engine, side in sides.items():
                seconds[engine].append(side.edit(editors[engine]))
        pairs = zip(sides["plain"].losses, sides["exact"].losses, strict=True)
        apart = [abs(a - b) / max(1.0, abs(a)) for a, b in pairs if a is not None and b is not None]
        needed = {engine: side.operations(editors[engine]) for engine, side in sides.items()}
    fastest = max(fastest, peak(time.process_time))
    return {
        **seconds,
        "n": len(requests),
        "ratio": median(seconds["plain"]) / median(seconds["exact"]),
        "target": work.target,
        "limit": median(seconds["plain"]) / (needed["exact"] / fastest),
        "counted": needed["plain"] / needed["exact"],
        "reached": {engine: needed[engine] / median(seconds[engine]) / fastest for engine in sides},
        "apart": max(apart, default=0.0),
        "fastest": fastest,
        "notes": sides["exact"].model.engine.notes,
    }
