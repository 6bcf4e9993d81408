"""Seconds per edit: the exact engine against the plain one, on models of real sizes.

    OMP_NUM_THREADS=2 python benchmarks/edit.py
    OMP_NUM_THREADS=2 python benchmarks/edit.py --models gpt2 --replacement replace_last
    OMP_NUM_THREADS=1 python benchmarks/edit.py --editors memit wise --model models/smollm2-135m --facts FILE --n 4

Without `--editors`, GRACE with random weights: T5-small v1.1 with questions of 12 tokens, BERT-base with 512
tokens, GPT-2 small with 90 prompt and 30 target tokens. The exact engine is given as many requests as `--at-hand`
says and trains their values together; the plain one makes the first of these edits, one at a time. Both start from
the same weights; rounds are interleaved, and a short one goes before them. Beside the measured seconds stands the
limit: the floating-point operations that each engine needs for an edit, counted, over the rate that a large matrix
product reaches in the same run.

With `--editors`, each of them edits the first facts of a CounterFact file in EasyEdit's format (JSON lines) in a Llama
of real weights, by its own settings (`_editors.py`), on both engines; an editor of batches gets all of them at once.
Preparation (second moments, contexts, from the facts behind those) is done before the clock starts. Processor time is
measured, which other work on the machine affects less.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import _editors
from _measure import interleave, machine, peak, spread
from _models import SIZES, Size
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors import Grace
from grace_bench.models.editable import EditableModel, Replacement
from grace_bench.models.engine.engine import EngineName

N_PLAIN = 4
TARGETS = {
    (SIZES["t5"].layer, "replace_prompt"): 8.0,
    (SIZES["bert"].layer, "replace_prompt"): 26.0,
    (SIZES["gpt2"].layer, "replace_prompt"): 3.5,
    (SIZES["gpt2"].layer, "replace_last"): 5.0,
}
"""The ratio to reach, by layer and replacement."""


class Side:
    """One engine with its requests.

    Args:
        engine: The engine's name.
        size: The model's size.
        module: The network.
        requests: The requests to edit.
        replacement: The positions that GRACE's values overwrite.
    """

    def __init__(
        self,
        engine: EngineName,
        size: Size,
        module: nn.Module,
        requests: Sequence[EditRequest],
        replacement: Replacement,
    ) -> None:
        self.model: EditableModel = size.editable(module, engine)
        self.requests = requests
        self.replacement: Replacement = replacement
        self.losses: list[tuple[float | None, float | None]] = []

    def edit(self, n_iter: int) -> None:
        """Edits every request, starting from an empty codebook."""
        with Grace(model=self.model, n_iter=n_iter, eps_init=1e-3, replacement=self.replacement) as editor:
            for request in self.requests:
                encoded = self.model.encode_batch([request.prompt], [request.target])
                editor.edit(EditBatch(prompts=(request.prompt,), targets=(request.target,), encoded=encoded))
            self.losses = [(outcome.loss_first, outcome.loss) for outcome in editor.flush()]

    def operations(self, n_iter: int) -> float:
        """Returns the floating-point operations per edit, extrapolated from counts for one and two steps."""
        counts = []
        for steps in (1, 2):
            with FlopCounterMode(display=False) as counter:
                self.edit(steps)
            counts.append(counter.get_total_flops())
        return (counts[0] + (n_iter - 1) * (counts[1] - counts[0])) / len(self.requests)


def measure(size: Size, *, at_hand: int, n_iter: int, repeats: int, replacement: Replacement) -> dict[str, Any]:
    """Returns the figures for one model's row of the table."""
    module, requests = size.module(), size.requests(at_hand)
    exact = Side("exact", size, module, requests, replacement)
    plain = Side("plain", size, module, requests[:N_PLAIN], replacement)
    for side in (exact, plain):
        side.edit(2)
    fastest = peak()
    seconds = interleave(
        {"plain": lambda: plain.edit(n_iter), "exact": lambda: exact.edit(n_iter)}, repeats=repeats, warmup=0
    )
    taken = {
        name: [value / len(side.requests) for value in seconds[name]]
        for name, side in (("plain", plain), ("exact", exact))
    }
    apart = [
        abs((a or 0.0) - (b or 0.0))
        for pair in zip(plain.losses, exact.losses, strict=False)
        for a, b in zip(*pair, strict=True)
    ]
    needed = {"plain": plain.operations(n_iter), "exact": exact.operations(n_iter)}
    fastest = max(fastest, peak())
    return {
        **taken,
        "ratio": median(taken["plain"]) / median(taken["exact"]),
        "target": TARGETS.get((size.layer, replacement), math.nan),
        "limit": median(taken["plain"]) / (needed["exact"] / fastest),
        "counted": needed["plain"] / needed["exact"],
        "reached": {name: needed[name] / median(taken[name]) / fastest for name in taken},
        "apart": max(apart),
        "fastest": fastest,
        "notes": exact.model.engine.notes,
    }


COLUMNS = ("plain", "exact", "ratio", "target", "limit", "counted", "of peak", "losses apart")
NOTE = (
    "ratio: plain / exact; limit: the ratio if the exact engine ran its operations at the peak rate; counted: the "
    "ratio of operations; of peak: the share of the peak rate that plain and exact reach"
)


def cells(row: dict[str, Any]) -> list[str]:
    """Returns the cells of a row of figures, in the order of `COLUMNS`."""
    reached = row["reached"]
    return [
        spread(row["plain"]),
        spread(row["exact"]),
        *(f"{row[key]:.1f}" for key in ("ratio", "target", "limit", "counted")),
        f"{reached['plain']:.0%} / {reached['exact']:.0%}",
        f"{row['apart']:.1e}",
    ]


def rows_of_editors(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the figures of every selected editor."""
    loaded = EditableModel.from_pretrained(options.model, layer=_editors.MIDDLE[0], task="completion")
    requests, train = _editors.facts(options.facts, options.n)
    for name in options.editors:
        yield name, _editors.measure(name, loaded.module, loaded.tokenizer, requests, train, repeats=options.repeats)


def rows_of_models(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields GRACE's figures on every selected model."""
    for name in options.models:
        yield (
            name,
            measure(
                SIZES[name],
                at_hand=options.at_hand or (32 if name == "t5" else 1),
                n_iter=options.steps,
                repeats=options.repeats,
                replacement=options.replacement,
            ),
        )


def main() -> None:
    """Measures what was selected and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--at-hand", type=int, help="requests edited together (32 for T5, 1 for the others)")
    parser.add_argument("--replacement", default="replace_prompt", choices=["replace_prompt", "replace_last"])
    parser.add_argument("--steps", type=int, default=100, help="Adam steps per edit of GRACE (100)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--editors", nargs="+", choices=list(_editors.WORK), help="time these instead of GRACE")
    parser.add_argument("--model", default="models/smollm2-135m", help="the model of --editors")
    parser.add_argument("--facts", type=Path, help="the CounterFact file of --editors")
    parser.add_argument("--n", type=int, default=4, help="how many facts --editors edit (4)")
    options = parser.parse_args()
    if options.editors and options.facts is None:
        parser.error("--editors needs --facts")
    print(f"before: {machine()}")
    what = "editor" if options.editors else "model"
    clock = "Processor seconds" if options.editors else "Seconds"
    table = Table(title=f"{clock} per edit: median (min-max) of {options.repeats} rounds")
    for heading in (what, *COLUMNS):
        table.add_column(heading, justify="left" if heading == what else "right")
    for name, row in rows_of_editors(options) if options.editors else rows_of_models(options):
        print(f"{name}: {row}", flush=True)
        table.add_row(name, *cells(row))
    print(f"after: {machine()}")
    console = Console(width=120)
    console.print(table)
    console.print(NOTE, highlight=False)


if __name__ == "__main__":
    main()
