"""Seconds per scoring pass: the exact engine against the plain one, on models of real sizes with random weights.

    OMP_NUM_THREADS=2 python benchmarks/evaluate.py
    OMP_NUM_THREADS=1 python benchmarks/evaluate.py --models llama --inputs 60 --repeats 1

The sizes are those of `edit.py`, and a Llama of SmolLM2-135M's shape, which completes prompts and is scored by the
whole panel; that one and T5 generate answers. In each round the exact engine scores the inputs in four
cases:

- anew: for the first time, with nothing cached;
- full: again, after the edited layer's weights changed, so every answer may have changed;
- one edit: again, after GRACE edited one of the inputs;
- a tenth: again, after GRACE edited every tenth input.

The plain engine scores all inputs one at a time in every case, so one pass per round stands for all four cases. A small
warm-up round goes first. Ratios are of processor time, which other load on the machine changes little. The last column
of the table is the largest difference between a score and the plain engine's score with the same weights and codebook:
over all inputs for `anew`, and for the edited models over the edited tenth and as many others.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from _measure import machine, spread
from _models import SCORED, Size
from rich.console import Console
from rich.table import Table

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors import Grace
from grace_bench.editors.ft import FineTune
from grace_bench.evaluation.rescoring import Rescorer
from grace_bench.models.tasks.base import ItemScore

CASES = ("anew", "full", "one edit", "a tenth")


def score(rescorer: Rescorer, requests: Sequence[EditRequest]) -> list[ItemScore]:
    """Scores the inputs as one evaluation of a run does."""
    with rescorer.evaluation(), torch.no_grad():
        return rescorer.score(requests)


def edit(editor: EditorStrategy, requests: Sequence[EditRequest]) -> None:
    """Edits requests and completes all pending edits."""
    for request in requests:
        encoded = editor.model.encode_batch([request.prompt], [request.target])
        editor.edit(EditBatch(prompts=(request.prompt,), targets=(request.target,), encoded=encoded))
    editor.flush()


def change_weights(editor: EditorStrategy) -> None:
    """Changes the layer's weights slightly, as fine-tuning would."""
    with torch.no_grad():
        for weight in editor.model.layer.parameters():
            weight.mul_(1.01)


def apart(given: Sequence[ItemScore], expected: Sequence[ItemScore]) -> float:
    """Returns the largest difference between two lists of scores; perplexities are compared by their logarithms."""

    def numbers(item: ItemScore) -> dict[str, float]:
        known = {"": item.score, **item.others}
        return {name: math.log(value) if value > 1 else value for name, value in known.items()}

    pairs = [(numbers(a), numbers(b)) for a, b in zip(given, expected, strict=True)]
    return max(abs(a[name] - b[name]) for a, b in pairs for name in a if not math.isnan(a[name]))


def measure(size: Size, *, n: int, repeats: int) -> dict[str, Any]:
    """Returns the figures for one model's rows of the table."""
    frozen, rewritten, plain, plain_rewritten = (
        size.editable(size.module(), "plain" if is_plain else "exact") for is_plain in (False, False, True, True)
    )
    grace, tuned = Grace(model=frozen, n_iter=1, eps_init=1e-3), FineTune(model=rewritten)
    plain_grace, plain_tuned = Grace(model=plain, n_iter=1, eps_init=1e-3), FineTune(model=plain_rewritten)
    rescorers = {editor: Rescorer(editor) for editor in (grace, tuned, plain_grace, plain_tuned)}
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *CASES)}
    processor: dict[str, list[float]] = {name: [] for name in seconds}
    scores: dict[str, list[ItemScore]] = {}

    def timed(name: str, call: Callable[[], list[ItemScore]]) -> None:
        before, used = time.perf_counter(), time.process_time()
        scores[name] = call()
        seconds[name].append(time.perf_counter() - before)
        processor[name].append(time.process_time() - used)
        print(
            f"  {name}: {seconds[name][-1]:.4g} s, processor {processor[name][-1]:.4g} s, "
            f"load {os.getloadavg()[0]:.2f}",
            flush=True,
        )

    def one_round(requests: Sequence[EditRequest]) -> None:
        grace.rollback()
        rescorers[grace].forget()
        frozen.engine.forget()
        timed("plain", lambda: score(rescorers[plain_grace], requests))
        timed("anew", lambda: score(rescorers[grace], requests))
        edit(grace, requests[:1])
        timed("one edit", lambda: score(rescorers[grace], requests))
        edit(grace, requests[1::10])
        timed("a tenth", lambda: score(rescorers[grace], requests))
        change_weights(tuned)
        timed("full", lambda: score(rescorers[tuned], requests))

    one_round(size.requests(8, seed=1))
    requests = size.requests(n)
    score(rescorers[tuned], requests)
    for values in (*seconds.values(), *processor.values()):
        values.clear()
    for _ in range(repeats):
        one_round(requests)
    for _ in range(repeats + 1):
        change_weights(plain_tuned)
    differences = {"anew": apart(scores["anew"], scores["plain"])}
    plain_grace.load_state_dict(grace.state_dict())
    rescorers[plain_grace].forget()
    compared = [number for number in range(len(requests)) if number % 10 in (1, 2)]
    for case, editor in (("full", plain_tuned), ("a tenth", plain_grace)):
        expected = score(rescorers[editor], [requests[number] for number in compared])
        differences[case] = apart([scores[case][number] for number in compared], expected)
    notes = [*frozen.engine.notes, *rewritten.engine.notes]
    return {"seconds": seconds, "processor": processor, "apart": differences, "notes": notes}


def main() -> None:
    """Measures the selected models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SCORED), choices=list(SCORED))
    parser.add_argument("--inputs", type=int, default=1000, help="inputs to score (1000)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    options = parser.parse_args()
    print(f"before: {machine()}")
    table = Table(title=f"Seconds to score {options.inputs} inputs: median (min-max)")
    for heading in ("model", "case", "plain", "exact", "ratio", "scores apart"):
        table.add_column(heading, justify="left" if heading in {"model", "case"} else "right")
    for name in options.models:
        measured = measure(SCORED[name], n=options.inputs, repeats=options.repeats)
        print(f"{name}: {measured}", flush=True)
        seconds, processor = measured["seconds"], measured["processor"]
        for case in CASES:
            ratio = median(processor["plain"]) / median(processor[case])
            difference = measured["apart"].get(case)
            table.add_row(
                name,
                case,
                spread(seconds["plain"]),
                spread(seconds[case]),
                f"{ratio:.1f}",
                "-" if difference is None else f"{difference:.1e}",
            )
    print(f"after: {machine()}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
