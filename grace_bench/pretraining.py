"""`grace-bench pretrain`: an embedded stream's model again from nothing."""

from pathlib import Path

from grace_bench.errors import UserError
from grace_bench.registry import STREAMS
from grace_bench.terminal import progress_bars
from grace_bench.zoo import mark_checkpoint


def pretrain(stream: str, out: Path, *, seed: int) -> None:
    """Trains a stream's model, saves it to a folder that `model=` takes, and prints its figures.

    Raises:
        UserError: If there is no such stream or it has no model of its own.
    """
    cls = STREAMS.get(stream)
    if cls.default_model is None:
        raise UserError(f"stream '{stream}' has no model of its own to pretrain")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error
    with progress_bars() as progress:
        figures = cls.pretrain(out, seed=seed, progress=progress)
    mark_checkpoint(out, stream)
    for name, value in figures.items():
        print(f"{name} {value:.4f}")
    print(f"saved to {out}: grace-bench run stream={stream} model={out}")
