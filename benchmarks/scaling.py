"""What grows in a long stream: the time of an edit, memory, a search, and second moments of much text.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py
    OMP_NUM_THREADS=1 python benchmarks/scaling.py editors --editors grace ultraedit --edits 100000
    OMP_NUM_THREADS=1 python benchmarks/scaling.py texts --edits 100000
    OMP_NUM_THREADS=1 python benchmarks/scaling.py moments --megabytes 10

`run` is the cost of an edit around the 100th and around the 10,000th edit of one run of GRACE. It edits the T5 that
ships with atlas-qa on different questions, with five steps per edit, so that the harness takes more of the time than
training; it is evaluated only at the start and at the end. The cost of an edit is the time from one record to the next:
scoring before and after, editing, metrics and files. Up to 32 pending edits are completed together, so the cost is
averaged over windows of 160 records. Lookups, the part that may grow, are the time spent inside the codebook.

`editors` edits a tiny Llama with random weights by `edit_texts`, GRACE one request at a time with one step, the others
in batches of 100: processor time of an edit in the last tenth before each level, the memory of the process, and the
size of the editor's own state.

`texts` adds edits to `retrieve`: processor time to add one and to search for one, and the memory of the process.

`moments` sums the second moments of a layer 1,536 wide, the last of a Llama of SmolLM2-135M's shape, over random words:
tokens a second of processor time, beside the bare forward pass of the same batches.
"""

import argparse
import gc
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from _measure import machine, spread
from _models import SCORED, Size
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grace_bench.data.avalanche import BasePlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.moments import second_moments
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors import Grace
from grace_bench.editors._grace.codebook import Codebook
from grace_bench.models.encoding import pad
from grace_bench.registry import EDITORS
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import RunSettings, Schedule
from grace_bench.streams.jsonl import Jsonl

WINDOW = 160
MILLI = 1e-3
COUNTRIES = ("Peru", "Italy", "France", "Kazakhstan", "Japan", "Kenya", "Norway", "Chile")
PLACES = ("river", "lake", "tower", "bridge", "garden", "square", "museum", "station")


class Clock(BasePlugin[Any]):
    """Records when each candidate's record was complete, and the total time spent in the codebook by then."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.lookups: list[float] = []
        self.spent = 0.0
        self._depth = 0

    def after_candidate(self, strategy: Any, **_: Any) -> None:
        """Records both times."""
        self.times.append(time.perf_counter())
        self.lookups.append(self.spent)

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that its time counts as lookups."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            before = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.spent += time.perf_counter() - before

        return timed

    def window(self, end: int) -> tuple[float, float]:
        """Returns seconds per edit, and per edit's lookups, averaged over the window that ends at record `end`."""
        first, last = max(0, end - WINDOW), end - 1
        n = last - first
        return (self.times[last] - self.times[first]) / n, (self.lookups[last] - self.lookups[first]) / n


def write_requests(path: Path, n: int) -> None:
    """Writes n distinct questions to a JSONL file."""
    generator = random.Random(0)
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        place, country = generator.choice(PLACES), generator.choice(COUNTRIES)
        prompts[f"What is the name of {place} {generator.randrange(10**6)} in {country}?"] = None
    with path.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            record = {"id": str(number), "prompt": prompt, "target": generator.choice(COUNTRIES)}
            file.write(json.dumps(record) + "\n")


def measure_run(options: argparse.Namespace) -> Table:
    """Runs the stream and returns its table."""
    clock = Clock()
    for name in ("retrieve", "contested", "settle"):
        setattr(Codebook, name, clock.timing(getattr(Codebook, name)))
    settings = RunSettings(schedule=Schedule(max_edits=options.edits, eval_every=options.edits + 1))
    with TemporaryDirectory() as folder:
        path = Path(folder, "requests.jsonl")
        write_requests(path, options.edits + 64)
        run_benchmark(
            Jsonl(path=str(path), task="qa", max_new_tokens=4),
            model="atlas-qa",
            editor=lambda **parts: Grace(n_iter=5, eps_init=1e-4, **parts),
            settings=settings,
            folder=Path(folder, "run"),
            plugins=[clock],
        )
    table = Table(title="Milliseconds per edit, median of windows (min-max)")
    for heading in ("edits", "per edit", "lookups", "other"):
        table.add_column(heading, justify="right")
    ends = [100, 1_000, options.edits // 2, options.edits - (options.repeats - 1) * WINDOW]
    for end in sorted({end for end in ends if end <= options.edits}):
        windows = [clock.window(end + number * WINDOW) for number in range(options.repeats)]
        rest = [whole - lookup for whole, lookup in windows]
        columns = [[whole for whole, _ in windows], [lookup for _, lookup in windows], rest]
        table.add_row(f"{end:,}", *(spread(column, unit=MILLI) for column in columns))
    return table


TINY = Size(
    make=lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1003,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ),
    layer="model.layers.0.mlp.down_proj",
    task="completion",
    n_prompt=6,
    n_target=1,
    says="a Llama of 50,000 weights",
)


def tiny_requests(first: int, n: int) -> list[EditRequest]:
    """Returns n requests with random words, numbered from `first` on."""
    requests = []
    for number in range(first, first + n):
        generator = random.Random(number)
        *prompt, target = (f"w{generator.randrange(1000)}" for _ in range(TINY.n_prompt + TINY.n_target))
        requests.append(EditRequest(id=str(number), prompt=" ".join(prompt), target=target))
    return requests


def megabytes() -> float:
    """Returns the memory of this process."""
    gc.collect()
    return float(psutil.Process().memory_info().rss / 2**20)


def state_megabytes(editor: EditorStrategy) -> float:
    """Returns the size of the tensors in an editor's state."""
    return sum(value.nbytes for value in editor.state_dict().values() if isinstance(value, Tensor)) / 2**20


def edited(editor: EditorStrategy, n: int, *, together: int, first: int) -> float:
    """Edits n requests that no earlier call made, and returns the processor time of an edit."""
    seconds = 0.0
    for start in range(first, first + n, together):
        requests = tiny_requests(start, min(together, first + n - start))
        before = time.process_time()
        outcomes = editor.edit_texts(requests)
        seconds += time.process_time() - before
        failed = next((outcome.failed for outcome in outcomes if outcome.failed), None)
        assert failed is None, failed
    return seconds / n


def levels(n_edits: int) -> list[int]:
    """Returns the numbers of edits to measure at."""
    return sorted({level for level in (1_000, 3_000, 10_000, 30_000, 100_000) if level < n_edits} | {n_edits})


def measure_editors(options: argparse.Namespace) -> Table:
    """Edits by each editor and returns the table."""
    table = Table(title="Processor time of an edit, memory of the process, tensors of the editor's state")
    for heading in ("editor", "edits", "ms an edit", "memory, MB", "state, MB"):
        table.add_column(heading, justify="left" if heading == "editor" else "right")
    for name in options.editors:
        model = TINY.editable(TINY.module(), "exact")
        settings = {"n_iter": 1, "eps_init": 1e-4} if name == "grace" else {}
        editor: EditorStrategy = EDITORS.get(name)(model=model, **settings)
        editor.prepare(())
        done = 0
        for level in levels(options.edits):
            last = (level - done) // 10
            edited(editor, level - done - last, together=100, first=done)
            seconds = edited(editor, last, together=100, first=level - last)
            done = level
            row = (name, f"{level:,}", f"{1e3 * seconds:.2f}", f"{megabytes():.0f}", f"{state_megabytes(editor):.1f}")
            print(*row, f"load {os.getloadavg()[0]:.1f}", flush=True)
            table.add_row(*row)
        editor.detach()
    return table


def measure_texts(options: argparse.Namespace) -> Table:
    """Adds edits to `retrieve` and returns the table."""
    table = Table(title="retrieve: processor time, and memory of the process")
    for heading in ("edits", "ms an edit", "ms a question", "memory, MB"):
        table.add_column(heading, justify="right")
    editor: Any = EDITORS.get("retrieve")(model=TINY.editable(TINY.module(), "exact"))
    questions = [request.prompt for request in tiny_requests(10**6, 64)]
    done = 0
    for level in levels(options.edits):
        seconds, done = edited(editor, level - done, together=100, first=done), level
        searched = []
        for question in questions:
            before = time.process_time()
            editor.find([question])
            searched.append(time.process_time() - before)
        row = (f"{level:,}", f"{1e3 * seconds:.2f}", spread(searched, unit=MILLI), f"{megabytes():.0f}")
        print(*row, f"load {os.getloadavg()[0]:.1f}", flush=True)
        table.add_row(*row)
    return table


def random_texts(megabytes: float) -> list[str]:
    """Returns texts of a hundred random words, of about as many bytes."""
    generator = random.Random(0)
    texts: list[str] = []
    n_bytes = 0
    while n_bytes < megabytes * 2**20:
        texts.append(" ".join(f"w{generator.randrange(30_000)}" for _ in range(100)))
        n_bytes += len(texts[-1])
    return texts


def clock_of(module: torch.nn.Module) -> Callable[[], float]:
    """Returns a clock: of the processor's time, or of the time by which an accelerator has finished its work."""
    if next(module.parameters()).device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


@torch.no_grad()
def bare_pass(module: torch.nn.Module, rows: Sequence[Sequence[int]]) -> float:
    """Returns the seconds of a forward pass of rows in batches of about 2,048 tokens, with one logit a row."""
    now, device = clock_of(module), next(module.parameters()).device
    before = now()
    for start in range(0, len(rows), 20):
        ids, mask = (tensor.to(device) for tensor in pad(rows[start : start + 20], 0, "right"))
        module(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return now() - before


def moments_beside_pass(size: Size, layers: Sequence[str], *, megabytes: float, repeats: int) -> Table:
    """Computes second moments of layers' inputs over random words, and returns the table."""
    model = size.editable(size.module(), "exact")
    now, texts = clock_of(model.module), random_texts(megabytes)
    rows = [model.encode_batch([""], [text]).inputs["input_ids"][0].tolist() for text in texts]
    n_tokens = sum(map(len, rows))
    # The hash of the weights is computed once a model.
    assert model.fingerprint
    bare_pass(model.module, rows[:20])
    seconds: dict[str, list[float]] = {"bare pass": [], "moments": []}
    for _ in range(repeats):
        seconds["bare pass"].append(bare_pass(model.module, rows))
        with TemporaryDirectory() as cache:
            os.environ["GRACE_BENCH_CACHE"] = cache
            before = now()
            second_moments(model, layers, texts)
            seconds["moments"].append(now() - before)
        print(seconds, f"load {os.getloadavg()[0]:.1f}", flush=True)
    table = Table(title=f"Second moments of {len(layers)} layers over {n_tokens:,} tokens, {megabytes:g} MB")
    for heading in ("what", "seconds", "tokens a second", "share"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, taken in seconds.items():
        share = median(seconds["bare pass"]) / median(taken)
        table.add_row(name, spread(taken), f"{n_tokens / median(taken):.0f}", f"{share:.2f}")
    return table


def measure_moments(options: argparse.Namespace) -> Table:
    """Computes the moments of a layer 1,536 wide and returns the table."""
    layers = ["model.layers.29.mlp.down_proj"]
    return moments_beside_pass(SCORED["llama"], layers, megabytes=options.megabytes, repeats=options.repeats)


PARTS = {"run": measure_run, "editors": measure_editors, "texts": measure_texts, "moments": measure_moments}


def main() -> None:
    """Measures the selected part and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="run", choices=list(PARTS))
    parser.add_argument("--edits", type=int, default=10_000, help="edits, or texts of retrieve (10,000)")
    parser.add_argument("--editors", nargs="+", default=["grace", "ultraedit"], help="of the part `editors`")
    parser.add_argument("--megabytes", type=float, default=10.0, help="text of the part `moments` (10)")
    parser.add_argument("--repeats", type=int, default=3, help="windows per row of `run`, rounds of `moments` (3)")
    options = parser.parse_args()
    print(f"before: {machine()}")
    table = PARTS[options.part](options)
    print(f"after: {machine()}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
