"""Seconds per edit of GRACE: the exact engine against the plain one, on models of real sizes with random weights.

    OMP_NUM_THREADS=2 python benchmarks/edit.py
    OMP_NUM_THREADS=2 python benchmarks/edit.py --models gpt2 --replacement replace_last

T5-small v1.1 with questions of 12 tokens, BERT-base with 512 tokens, GPT-2 small with 90 prompt and 30 target tokens.
The exact engine is given as many requests as `--at-hand` says and trains their values together; the plain one makes
the first of these edits, one at a time. Both start from the same weights; rounds are interleaved, and a short one goes
before them. Beside the measured seconds stands the limit: the floating-point operations that each engine needs for an
edit, counted, over the rate that a large matrix product reaches in the same run.
"""

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from _measure import interleave, machine, spread
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


def peak() -> float:
    """Returns the floating-point operations per second that a product of two large matrices reaches."""
    left, right = torch.randn(2, 2048, 2048).unbind()
    seconds = []
    for _ in range(8):
        before = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - before)
    return float(2 * 2048**3 / median(seconds))


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
        "limit": median(taken["plain"]) / (needed["exact"] / fastest),
        "counted": needed["plain"] / needed["exact"],
        "reached": {name: needed[name] / median(taken[name]) / fastest for name in taken},
        "apart": max(apart),
        "fastest": fastest,
        "notes": exact.model.engine.notes,
    }


def main() -> None:
    """Measures the selected models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--at-hand", type=int, help="requests edited together (32 for T5, 1 for the others)")
    parser.add_argument("--replacement", default="replace_prompt", choices=["replace_prompt", "replace_last"])
    parser.add_argument("--steps", type=int, default=100, help="Adam steps per edit (100)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    options = parser.parse_args()
    print(f"before: {machine()}")
    table = Table(title=f"Seconds per edit of {options.steps} steps, {options.replacement}: median (min-max)")
    for heading in ("model", "at hand", "plain", "exact", "ratio", "limit", "counted", "of peak", "losses apart"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name in options.models:
        at_hand = options.at_hand or (32 if name == "t5" else 1)
        row = measure(
            SIZES[name],
            at_hand=at_hand,
            n_iter=options.steps,
            repeats=options.repeats,
            replacement=options.replacement,
        )
        print(f"{name}: {row}", flush=True)
        reached = row["reached"]
        table.add_row(
            name,
            str(at_hand),
            spread(row["plain"]),
            spread(row["exact"]),
            *(f"{row[key]:.1f}" for key in ("ratio", "limit", "counted")),
            f"{reached['plain']:.0%} / {reached['exact']:.0%}",
            f"{row['apart']:.1e}",
        )
    print(f"after: {machine()}")
    console = Console(width=110)
    console.print(table)
    console.print(
        "ratio: plain / exact; limit: the ratio if the exact engine ran its operations at the peak rate; counted: the "
        "ratio of operations; of peak: the share of the peak rate that plain and exact reach",
        highlight=False,
    )


if __name__ == "__main__":
    main()
