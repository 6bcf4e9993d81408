"""`grace-bench pretrain`: trains the model that a stream edits."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from grace_bench.common.terminal import progress_bars, say
from grace_bench.data.stream import EditStream
from grace_bench.errors import UserError
from grace_bench.launch.compose import compose
from grace_bench.launch.run_config import make_stream
from grace_bench.models.zoo import mark_checkpoint, resolve_model
from grace_bench.registry import STREAMS


def pretrain(stream: str, overrides: Sequence[str], out: Path, *, seed: int) -> None:
    """Trains a stream's model, saves it to a folder that `model=` takes, and prints its figures.

    Args:
        stream: The stream's name.
        overrides: The stream's options, and `model=` for the model to start from, as on a run's command line.
        out: The folder to write.
        seed: Seeds initialisation, data order and dropout.

    Raises:
        UserError: If there is no such stream, it has no model of its own, or the options do not fit it.
    """
    if STREAMS.get(stream).pretrain is EditStream.pretrain:
        raise UserError(f"stream '{stream}' has no model of its own to pretrain")
    options = [override for override in overrides if override.startswith("stream.")]
    for override in overrides:
        if override not in options and not override.startswith("model="):
            raise UserError(f"pretrain has no option {override} (it takes stream.NAME=, model=, --out and --seed)")
    config = compose([f"stream={stream}", *overrides])
    source = make_stream(config)
    base = None if config.model is None else _base(str(config.model))
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error
    try:
        with progress_bars() as progress:
            figures = source.pretrain(out, base=base, seed=seed, progress=progress)
    except UserError:
        if is_new:
            with suppress(OSError):
                out.rmdir()
        raise
    mark_checkpoint(out, stream)
    for name, value in figures.items():
        say(f"{name} {value:.4f}")
    say(f"saved to {out}: {' '.join(['grace-bench run', f'stream={stream}', *options, f'model={out}'])}")


def _base(model: str) -> str:
    """Returns the folder of the model to start from, which holds its tokenizer too."""
    weights, vocabulary = resolve_model(model).fetch()
    if weights != vocabulary:
        raise UserError(
            f"model={model}: the hub does not hold its safetensors and its tokenizer in one place; put both into one "
            f"folder (docs/offline-models.md) and give that as model="
        )
    return weights
