"""The first command of a new user: every editor on an embedded stream."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from grace_bench.analysis.leaderboard import Leaderboard, print_leaderboard
from grace_bench.common.processes import side_by_side
from grace_bench.common.terminal import say
from grace_bench.errors import UserError
from grace_bench.launch.compose import compose
from grace_bench.launch.run_config import RunConfig
from grace_bench.launch.run_folder import folder_of, run_or_reuse
from grace_bench.registry import EDITORS, STREAMS


def demo(out: Path, *, n_edits: int) -> None:
    """Runs every registered editor on the first demo stream that it works on, and prints the leaderboards.

    As many runs go on side by side as there are cores; tiny models use one each.

    Args:
        out: Where run folders are made; finished runs there are reused.
        n_edits: Edits that an editor makes.

    Raises:
        UserError: If `out` is a file, before a process is started for each run to find out.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: Not a directory")
    if find_spec("lm_eval") is None:
        say("Without lm-eval there is no column Capability: pip install 'grace-bench[capability]'")
    else:
        # Imported once, for all processes; so is what composing their configurations needs.
        for name in ("lm_eval.evaluator", "grace_bench.evaluation.language_model"):
            import_module(name)
    configs = [demo_config(stream, editor, out=str(out), n_edits=n_edits) for stream, editor in demo_pairs()]
    folders = side_by_side(_run, configs, fork=True)
    print_leaderboard(Leaderboard.read(folders))
    say(f"\nRun folders: {out}\nThe same again: grace-bench leaderboard {out}")


def demo_pairs() -> Iterator[tuple[str, str]]:
    """Each editor with the first demo stream it works on, and the reference editors with every stream so chosen."""
    streams = {name: stream for name, stream in STREAMS.classes().items() if stream.in_demo}
    editors = EDITORS.classes()
    references = [name for name, editor in editors.items() if editor.is_reference]
    pairs: dict[tuple[str, str], None] = {}
    for name, editor in editors.items():
        fitting = (stream for stream, cls in streams.items() if works_on(editor, cls))
        stream = next(fitting, None)
        if stream is not None:
            pairs[stream, name] = None
            pairs |= {(stream, other): None for other in references}
    yield from pairs


def works_on(editor: Any, stream: Any) -> bool:
    """Whether an editor can start on a stream at once."""
    return stream.task in editor.supported_tasks and (stream.ships_networks or not editor.needs_meta_training)


def demo_config(stream: str, editor: str, *, out: str, n_edits: int) -> RunConfig:
    """Returns the configuration of one of the demo's runs."""
    # Nobody follows these runs in W&B, and its process takes longer to start than some of them take.
    fixed = [f"max_edits={n_edits}", "wandb.mode=disabled"]
    config = compose([f"stream={stream}", f"editor={editor}", *fixed, *_capability_of(stream)])
    # Not as overrides: a path may hold characters that their grammar gives a meaning. And an interrupted demo resumes.
    return replace(config, out=out, existing="resume")


def _run(config: RunConfig) -> Path:
    """Carries out one run and returns its folder."""
    # Several runs cannot each move a bar in one terminal.
    run_or_reuse(config, say=lambda line: None, console=Console(stderr=True, force_terminal=False))
    return folder_of(config)


def _capability_of(stream: str) -> list[str]:
    """The option that measures the tasks which ship with a stream, if there are any and lm-eval is installed."""
    folder = STREAMS.get(stream).capability_tasks
    if folder is None or find_spec("lm_eval") is None:
        return []
    return [f"capability.tasks=[{','.join(sorted(file.stem for file in folder.glob('*.yaml')))}]"]
