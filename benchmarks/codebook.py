"""Times adds and lookups in codebooks of growing size, against plain distances to every key.

python benchmarks/codebook.py [--plot growth.png]
"""

import argparse
import gc
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from _measure import interleave, machine, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

from grace_bench.editors._grace.codebook import Codebook
from grace_bench.editors._grace.key_index import EuclideanIndex

BATCH = 64
MICRO = 1e-6
EPS_INIT = 1.0


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=lambda text: int(float(text)), default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="time per measurement, after which no round starts")
    parser.add_argument("--plot", type=Path, help="file for a plot of the growth, on logarithmic axes")
    options = parser.parse_args()
    print(f"before: {machine()}")
    rows: dict[int, dict[str, Any]] = {}
    for n in options.sizes:
        # Two copies of the keys (loading the state, or growing the storage) and the distances of the plain side.
        needed = n * (2.2 * options.width + 3 * BATCH) * 4
        available = psutil.virtual_memory().available
        if needed > available:
            print(f"{n} keys: skipped, needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB available")
            continue
        rows[n] = measure(n, options.width, options.repeats, options.seconds)
        rows[n]["append"] = [append(n, options.width)]
        for name, value in rows[n].items():
            shown = spread(value, unit=MICRO) + " us" if isinstance(value, list) else f"{value:.1f}"
            print(f"{n} keys, {name}: {shown}", flush=True)
    print(f"after: {machine()}")
    if options.plot:
        draw(rows, options.plot)
    report(rows, options.width)


def measure(n: int, width: int, repeats: int, seconds: float) -> dict[str, Any]:
    """Measures a codebook of n keys.

    Returns:
        The seconds per query or add, by side and operation; and the bytes per key.
    """
    torch.manual_seed(0)
    # Memory that libraries allocate at first use should not count as the codebook's.
    filled(1000, width)
    codebook, n_bytes = filled(n, width)
    # Half of the queries are near a key, as hits are; the other half are near none.
    queries = codebook.keys[torch.randint(n, (BATCH,))] + 0.01 * torch.randn(BATCH, width)
    queries[::2] = torch.randn(BATCH // 2, width)
    results: dict[str, Any] = {"bytes a key": n_bytes}
    for batch in (1, BATCH):
        some = queries[-batch:]
        assert torch.equal(codebook.retrieve(some).entry, plain(codebook.keys, some)[0])
        sides = {
            "codebook": lambda some=some: codebook.retrieve(some),
            "plain": lambda some=some: plain(codebook.keys, some),
            "product": lambda some=some: some @ codebook.keys.T,
        }
        for side, taken in interleave(sides, repeats=repeats, seconds=seconds).items():
            results[f"{side}, {batch}"] = [taking / batch for taking in taken]
    fresh = unheard(width)
    adding = {
        "codebook, add": lambda: codebook.settle(next(fresh), (0,), lambda: torch.zeros(1), label_mean=0.0),
        "plain, add": lambda: plain(codebook.keys, next(fresh)[None]),
    }
    return results | interleave(adding, repeats=repeats, seconds=seconds)


def filled(n: int, width: int) -> tuple[Codebook, float]:
    """Returns a codebook of n random keys, and the bytes of memory per key without its value."""
    codebook = Codebook(eps_init=EPS_INIT)
    state: dict[str, Any] = {
        "keys": torch.randn(n, width),
        "values": torch.zeros(n, 1),
        "radii": torch.full((n,), EPS_INIT),
        "labels": [[number % 1000] for number in range(n)],
        "label_means": [0.0] * n,
    }
    gc.collect()
    before = psutil.Process().memory_info().rss
    codebook.load_state_dict(state)
    return codebook, (psutil.Process().memory_info().rss - before) / n - codebook.values.element_size()


def plain(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Looks up the newest of the nearest keys from the distances of all pairs."""
    distances = torch.cdist(keys, queries, compute_mode="donot_use_mm_for_euclid_dist").T
    entry = len(keys) - 1 - distances.flip(1).argmin(dim=1)
    return entry, distances.gather(1, entry[:, None])[:, 0]


def unheard(width: int) -> Iterator[Tensor]:
    """Yields random queries that are near no key."""
    for seed in count(1):
        yield torch.randn(width, generator=torch.Generator().manual_seed(seed))


def append(n: int, width: int) -> float:
    """Returns the seconds to store one key, averaged over growth from none to n keys."""
    index = EuclideanIndex(device=torch.device("cpu"))
    keys = torch.randn(64, 1, width)
    start = time.perf_counter()
    for number in range(n):
        index.extend(keys[number % len(keys)])
    return (time.perf_counter() - start) / n


def report(rows: dict[int, dict[str, Any]], width: int) -> None:
    """Prints the table, with the ratio after each operation."""
    table = Table(title=f"Microseconds, median; keys of width {width}; ratio: plain / codebook")
    for name in ("keys", "1 query", "ratio", f"a query of {BATCH}", "ratio", "add", "ratio", "append", "bytes a key"):
        table.add_column(name, justify="right")
    for n, row in rows.items():
        cells = [f"{n:,}"]
        for what in ("1", str(BATCH), "add"):
            ours, theirs = median(row[f"codebook, {what}"]), median(row[f"plain, {what}"])
            cells += [f"{ours / MICRO:,.0f}", f"{theirs / ours:.2f}"]
        table.add_row(*cells, f"{row['append'][0] / MICRO:,.0f}", f"{row['bytes a key']:,.0f}")
    Console(width=120).print(table)


def draw(rows: dict[int, dict[str, Any]], path: Path) -> None:
    """Draws microseconds against keys."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for what, name in (("1", "one query"), (str(BATCH), f"a query of {BATCH}"), ("add", "add")):
        for side, line in (("codebook", "-o"), ("plain", "--s")):
            values = [median(row[f"{side}, {what}"]) / MICRO for row in rows.values()]
            axes.plot(list(rows), values, line, label=f"{side}, {name}", markersize=4)
    axes.plot(list(rows), [row["append"][0] / MICRO for row in rows.values()], ":^", label="append", markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="microseconds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
