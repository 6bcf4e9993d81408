"""`grace-bench meta-train`: an editor meta-trained for the runs of a configuration."""

from collections.abc import Callable

from grace_bench.common.terminal import progress_bars, say
from grace_bench.launch.arguments import run_arguments
from grace_bench.launch.run_config import RunConfig
from grace_bench.registry import EDITORS
from grace_bench.run.meta_training import meta_train


def meta_train_editor(config: RunConfig, *, say: Callable[[str], None]) -> None:
    """Meta-trains the editor of a configuration on the stream's requests for training, and reports the figures.

    Args:
        config: The configuration, the same as for a run.
        say: Takes lines for the user.

    Raises:
        UserError: If the editor needs no meta-training, or an option has a value that it cannot have.
    """
    stream, arguments = run_arguments(config)
    with progress_bars() as progress:
        figures = meta_train(stream, **arguments, progress=progress)
    for name, value in figures.items():
        say(f"{name} {value:.4g}")


def meta_train_if_needed(config: RunConfig) -> None:
    """Meta-trains the editor of a configuration if it must be before its first edit.

    Raises:
        UserError: As `meta_train_editor` does.
    """
    if EDITORS.get(config.editor.name).needs_meta_training:
        meta_train_editor(config, say=say)
