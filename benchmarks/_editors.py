"""What every editor is timed on, and one side of the comparison: an editor on the exact or the plain engine."""

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from _measure import interleave, peak
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
CONTEXTS = {"n_prefixes": 5, "text": "model", "n_texts": 200}


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
    """

    def __init__(
        self,
        engine: EngineName,
        module: nn.Module,
        tokenizer: Any,
        name: str,
        work: Work,
        requests: Sequence[EditRequest],
    ) -> None:
        # As in a run, the plain engine takes one input at a time.
        task = get_task("completion", batch_size=1 if engine == "plain" else 64)
        self.model = EditableModel(module, layer=work.layer, task=task, tokenizer=tokenizer, engine=engine)
        self.name, self.work, self.requests = name, work, requests
        self.losses: list[float | None] = []

    def prepared(self, **options: Any) -> EditorStrategy:
        """Returns the editor, ready for its first edit."""
        editor: EditorStrategy = EDITORS.get(self.name)(model=self.model, **{**self.work.options, **options})
        editor.prepare(self.requests)
        if editor.needs_upstream_prompts:
            editor.read_upstream([request.prompt for request in self.requests])
        return editor

    def edit(self, **options: Any) -> float:
        """Edits all requests and returns the seconds it took, without preparing the editor."""
        with self.prepared(**options) as editor:
            started = time.perf_counter()
            outcomes = editor.edit_texts(self.requests)
            seconds = time.perf_counter() - started
        self.losses = [loss for outcome in outcomes for loss in (outcome.loss_first, outcome.loss)]
        return seconds

    def operations(self) -> float:
        """Returns the floating-point operations per edit; of many steps extrapolated from two and three."""
        steps = self.work.steps
        if steps is None:
            return self._count() / len(self.requests)
        parameters = inspect.signature(EDITORS.get(self.name)).parameters
        n = self.work.options.get(steps, parameters[steps].default)
        first, second = self._count(**{steps: 2}), self._count(**{steps: 3})
        return (first + (n - 2) * (second - first)) / len(self.requests)

    def _count(self, **options: Any) -> float:
        with self.prepared(**options) as editor, FlopCounterMode(display=False) as counter:
            editor.edit_texts(self.requests)
        return float(counter.get_total_flops())


def facts(path: Path, n: int) -> list[EditRequest]:
    """Returns the first facts of a CounterFact file in EasyEdit's format (JSON lines)."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for _, line in zip(range(n), lines, strict=False)]
    return [
        EditRequest(id=str(number), prompt=record["prompt"], target=record["target_new"], subject=record["subject"])
        for number, record in enumerate(records)
    ]


def measure(
    name: str, module: nn.Module, tokenizer: Any, requests: Sequence[EditRequest], *, repeats: int
) -> dict[str, Any]:
    """Returns the figures for one editor's row of the table."""
    work = WORK[name]
    sides = {engine: Side(engine, module, tokenizer, name, work, requests) for engine in ("plain", "exact")}
    # The first edit checks what the engine assumes, and fills the caches of second moments.
    sides["exact"].edit(**({} if work.steps is None else {work.steps: 2}))
    fastest = peak()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    interleave(
        {engine: lambda engine=engine: taken[engine].append(sides[engine].edit()) for engine in sides},  # type: ignore[misc]
        repeats=repeats,
        warmup=0,
    )
    seconds = {engine: [value / len(requests) for value in values] for engine, values in taken.items()}
    pairs = zip(sides["plain"].losses, sides["exact"].losses, strict=True)
    apart = [abs(a - b) / max(1.0, abs(a)) for a, b in pairs if a is not None and b is not None]
    needed = {engine: side.operations() for engine, side in sides.items()}
    fastest = max(fastest, peak())
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
