"""Edit, evaluate and compute second moments at Llama-3-8B's shapes on a GPU, or at small shapes where there is none.

    benchmarks/gpu.sh
    benchmarks/gpu.sh --parts edit moments

Weights are random, in bfloat16. `edit` is the time of an edit by each of a few editors, exact against plain; `evaluate`
is that of a scoring pass by the whole panel, as `evaluate.py` measures it; `moments` is that of the second moments of
five layers, beside the bare forward pass, as `scaling.py` measures it. What a part measured is printed as it ends.
"""

import argparse
import gc
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from _editors import Side, Work
from _measure import machine, spread
from _models import Size
from evaluate import CASES
from evaluate import measure as measure_scoring
from rich.console import Console
from rich.table import Table
from scaling import clock_of, moments_beside_pass
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from grace_bench.data.requests import EditRequest

DOWN = "model.layers.{}.mlp.down_proj"
LLAMA_3_8B: Mapping[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
SMALL: Mapping[str, Any] = {
    "vocab_size": 30003,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
ON_GPU = torch.cuda.is_available()
SHAPE = LLAMA_3_8B if ON_GPU else SMALL
MIDDLE = [DOWN.format(block) for block in range(4, 9)]
LATE = DOWN.format(SHAPE["num_hidden_layers"] - 5)
STEPS = 25 if ON_GPU else 3
"""The steps of an edit."""
N_EDITS, N_SCORED, MEGABYTES = (8, 96, 0.5) if ON_GPU else (2, 12, 0.02)
WORK = {
    "grace": Work(0, LATE, {"n_iter": STEPS}),
    "ft": Work(0, LATE, {"n_iter": STEPS}),
    "memit": Work(0, MIDDLE[-1], {"layers": MIDDLE, "n_iter": STEPS, "n_prefixes": 5, "text": "model", "n_texts": 16}),
    "ultraedit": Work(0, LATE, steps=None),
}


def make() -> nn.Module:
    """Returns the network on the device."""
    with torch.device("cuda" if ON_GPU else "cpu"):
        module: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).to(torch.bfloat16)
    return module


SIZE = Size(make=make, layer=LATE, task="completion", n_prompt=24, n_target=4, says="Llama-3-8B's shapes")


def measure_edits() -> Table:
    """Edits by each editor and returns the table."""
    module = SIZE.module()
    tokenizer = SIZE.editable(module, "exact").tokenizer
    now = clock_of(module)
    requests = [
        EditRequest(id=r.id, prompt=r.prompt, target=r.target, subject=" ".join(r.prompt.split()[:3]))
        for r in SIZE.requests(N_EDITS)
    ]
    table = Table(title=f"Seconds an edit, {N_EDITS} requests: after one round that is not counted")
    for heading in ("editor", "plain", "exact", "ratio", "losses apart"):
        table.add_column(heading, justify="left" if heading == "editor" else "right")
    for name, work in WORK.items():
        seconds: dict[str, float] = {}
        losses: dict[str, list[float]] = {}
        for engine in ("plain", "exact"):
            side = Side(engine, module, tokenizer, name, work, requests)  # type: ignore[arg-type]
            if engine == "exact":
                side.edit()
            with side.prepared() as editor:
                before = now()
                outcomes = editor.edit_texts(requests)
                seconds[engine] = (now() - before) / len(requests)
            losses[engine] = [outcome.loss for outcome in outcomes if outcome.loss is not None]
        apart = max((abs(a - b) for a, b in zip(losses["plain"], losses["exact"], strict=True)), default=0.0)
        ratio = seconds["plain"] / seconds["exact"]
        row = (name, f"{seconds['plain']:.3g}", f"{seconds['exact']:.3g}", f"{ratio:.1f}", f"{apart:.1e}")
        print(*row, flush=True)
        table.add_row(*row)
    return table


def measure_evaluation() -> Table:
    """Scores inputs and returns the table."""
    measured = measure_scoring(SIZE, n=N_SCORED, repeats=1)
    seconds = measured["seconds"]
    table = Table(title=f"Seconds to score {N_SCORED} inputs by the whole panel")
    for heading in ("case", "plain", "exact", "ratio"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in CASES:
        ratio = median(seconds["plain"]) / median(seconds[case])
        table.add_row(case, spread(seconds["plain"]), spread(seconds[case]), f"{ratio:.1f}")
    return table


def measure_moments() -> Table:
    """Computes second moments and returns the table."""
    return moments_beside_pass(SIZE, MIDDLE, megabytes=MEGABYTES, repeats=1)


PARTS = {"edit": measure_edits, "evaluate": measure_evaluation, "moments": measure_moments}


def main() -> None:
    """Measures the selected parts and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    shapes = "Llama-3-8B's shapes" if ON_GPU else "small shapes, since there is no GPU"
    print(f"{torch.cuda.get_device_name() if ON_GPU else 'CPU'}, {shapes}; {machine()}", flush=True)
    for name in options.parts:
        started = time.perf_counter()
        table = PARTS[name]()
        Console(width=110).print(table)
        print(f"{name}: {time.perf_counter() - started:.0f} s in all", flush=True)
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
