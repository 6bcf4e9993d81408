"""Chooses each editor's hyperparameters on a stream's validation split, with the same budget for every editor.

    python benchmarks/tune.py atlas-qa --editors grace ft

Prints a line a trial and, for each editor, the best by Avg; for perplexity by the geometric mean of ERR, ARR and TRR.
The best become files of `grace_bench/conf/tuned`. The `edits` split is never touched.
"""

import argparse
import itertools
import math
from pathlib import Path

from grace_bench.jobs import compose, execute, execute_meta_training
from grace_bench.registry import EDITORS
from grace_bench.results import RunResult

LAYERS = {
    "atlas-qa": [f"encoder.block.{block}.layer.1.DenseReluDense.wo" for block in (1, 2)],
    "atlas-drift": [f"bert.encoder.layer.{block}.output.dense" for block in (1, 2)],
    "toy": ["second"],
    "atlas-text": [f"transformer.h.{block}.mlp.c_fc" for block in (0, 1, 2)],
}
# ROME reads a feed-forward block's second map as a memory of facts (Meng et al. 2022, section 3.1); MEND edits several
# of the last feed-forward maps at once (Mitchell et al. 2022, section 5).
LAYERS_OF_ONE_EDITOR = {
    "rome": {"atlas-text": {"layer": [f"transformer.h.{block}.mlp.c_proj" for block in (0, 1, 2)]}},
    "mend": {
        "atlas-qa": {
            "editor.layers": [
                "[encoder.block.2.layer.1.DenseReluDense.wo]",
                "[encoder.block.1.layer.1.DenseReluDense.wo,encoder.block.2.layer.1.DenseReluDense.wo,"
                "decoder.block.0.layer.2.DenseReluDense.wo]",
            ]
        },
        "atlas-drift": {
            "editor.layers": [
                "[bert.encoder.layer.2.output.dense]",
                "[bert.encoder.layer.1.output.dense,bert.encoder.layer.2.output.dense,bert.pooler.dense]",
            ]
        },
        "atlas-text": {
            "editor.layers": [
                "[transformer.h.1.mlp.c_fc]",
                "[transformer.h.2.mlp.c_proj]",
                "[transformer.h.1.mlp.c_fc,transformer.h.2.mlp.c_fc,transformer.h.2.mlp.c_proj]",
            ]
        },
    },
}
LEARNING_RATES = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5]
GRIDS = {
    "grace": {"editor.eps_init": [0.5, 1.0, 3.0], "editor.replacement": ["replace_prompt", "replace_last"]},
    "ft": {"editor.lr": LEARNING_RATES},
    "ft_ewc": {"editor.lr": [1e-3, 3e-4, 3e-5], "editor.ewc_lambda": [0.1, 1e4]},
    "ft_retrain": {"editor.lr": LEARNING_RATES},
    "defer": {"editor.lr": [0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]},
    "memory": {"editor.lr": [0.1, 0.01, 0.001], "editor.replacement": ["replace_all", "replace_prompt"]},
    "lora": {"editor.lr": LEARNING_RATES},
    "mend": {"editor.c_edit": [0.1, 0.3, 1.0], "editor.edit_lr": [1e-3, 1e-2]},
    "rome": {"editor.clamp": [4.0, 1.0], "editor.n_prefixes": [10, 2, 0]},
}
"""Six settings an editor on each layer, or for MEND on each set of layers: the same budget for all."""


def main() -> None:
    """Runs the grids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", choices=LAYERS)
    parser.add_argument("--editors", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    options = parser.parse_args()
    for editor in options.editors:
        trials: list[tuple[float, tuple[str, ...]]] = []
        layers = LAYERS_OF_ONE_EDITOR.get(editor, {}).get(options.stream, {"layer": LAYERS[options.stream]})
        grid = {**layers, **GRIDS[editor]}
        for values in itertools.product(*grid.values()):
            chosen = tuple(f"{name}={value}" for name, value in zip(grid, values, strict=True))
            fixed = [f"stream={options.stream}", f"editor={editor}", "split=validation", "wandb.mode=disabled"]
            length = [f"max_edits={options.edits}", f"eval_every={options.edits}"]
            config = compose([*fixed, *length, f"out={options.out}", *chosen])
            if EDITORS.get(editor).needs_meta_training:
                execute_meta_training(config, say=lambda line: None)
            result = execute(config, say=lambda line: None)
            trials.append((quality(result), chosen))
            print(f"{trials[-1][0]:.4f}", editor, *chosen, figures(result), flush=True)
        # Of equals the first: the order of the grid is the order of preference.
        best, chosen = max(trials, key=lambda trial: trial[0])
        print(f"best of {len(trials)} for {editor}: {best:.4f} {' '.join(chosen)}", flush=True)


def quality(result: RunResult) -> float:
    """Returns what is maximised: Avg, or for perplexity minus the mean logarithm of ERR, ARR and TRR."""
    metrics = result.metrics
    if metrics.get("Avg") is not None:
        return float(metrics["Avg"] or 0.0)
    return -sum(math.log(metrics[name] or math.inf) for name in ("ERR", "ARR", "TRR")) / 3


def figures(result: RunResult) -> str:
    """Returns the metrics a person wants to see beside the setting."""
    names = ("TRR", "ERR", "ES", "Holdout", "ARR", "n_edits", "n_keys")
    return " ".join(f"{name}={result.metrics[name]:.3f}" for name in names if result.metrics.get(name) is not None)


if __name__ == "__main__":
    main()
