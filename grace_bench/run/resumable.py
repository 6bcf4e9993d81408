"""A run that can be interrupted at any point and resumed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_bench.common.signals import Interruption
from grace_bench.errors import MISFITS, Interrupted, RunFailure, UserError, reason_of
from grace_bench.run.checkpoint import Checkpoints
from grace_bench.run.loggers import RunLogger
from grace_bench.run.loggers.jsonl import JsonlLogger
from grace_bench.run.loop import RunLoop

# Fields that may differ between the processes of a run without changing a number.
_IGNORED_DIFFERENCES = ("command", "engine_notes", "datasets", "wandb")


class ResumableRun:
    """A run that writes checkpoints to its folder.

    Reading the state of a run changes nothing that follows (`RunLoop.state_dict`), so the result does not depend on
    when checkpoints are written.

    Args:
        folder: The run folder.
        run: The run, before its first step.
        loggers: The run's loggers that append to files in the folder.
        identity: Everything that determines what the run computes.
        environment: Its software and hardware.
    """

    def __init__(
        self,
        folder: Path,
        run: RunLoop,
        *,
        loggers: Sequence[RunLogger],
        identity: Mapping[str, Any],
        environment: Mapping[str, Any],
    ) -> None:
        self._folder = folder
        self._run = run
        self._loggers = loggers
        self._files = {file.path.relative_to(folder).as_posix(): file for logger in loggers for file in logger.files}
        self._checkpoints = Checkpoints(folder, identity=identity)
        self._environment = dict(environment)
        self._saved_at: int | None = None

    def resume(self, say: Callable[[str], None] | None = None) -> bool:
        """Restores the newest usable checkpoint, and reports what was dropped.

        The loggers cut their files back to it when they start.

        Args:
            say: Called with one line.

        Returns:
            Whether there was a usable checkpoint.

        Raises:
            UserError: If the checkpoint is from another run or schema version, or a file that the run appends to was
                cut or changed.
        """
        loaded = self._checkpoints.load()
        if loaded.state is not None:
            self._restore(loaded.state)
            self._saved_at = loaded.n_edits
            for name, file in self._files.items():
                file.start = loaded.run_files.get(name, file.start)
        dropped = [*loaded.dropped]
        for logger in self._loggers:
            if isinstance(logger, JsonlLogger):
                dropped += logger.dropped()
        self._checkpoints.drop_broken()
        if say is not None:
            where = (
                "started anew, without a whole checkpoint"
                if loaded.state is None
                else f"resumed at {loaded.n_edits} edits"
            )
            changed = self._environment.get("before_resuming")
            parts = [f"dropped {', '.join(dropped)}"] if dropped else []
            parts += [f"was computed with another {', '.join(changed)}: not bit for bit the same"] if changed else []
            say(f"{self._folder}: {'; '.join([where, *parts])}")
        return loaded.state is not None

    def run(self, *, every: int) -> None:
        """Runs to the end, with a checkpoint at the start, after every `every` edits and wherever the run stops.

        Raises:
            Interrupted: After a signal, once the checkpoint is written.
            RunFailure: At a failed edit, if the run is strict, once the checkpoint is written.
        """
        strategy = self._run.strategy
        with Interruption() as interruption:
            # A resumed run has a checkpoint already; a new run has nothing to save before its first.
            interruption.can_defer = self._saved_at is not None
            for _ in self._run.steps():
                interruption.can_defer = True
                # Fewer edits than in the newest checkpoint: a pending edit failed, and the position was set back.
                is_due = self._saved_at is None or not 0 <= strategy.n_edits - self._saved_at < every
                if is_due or interruption.is_requested or self._run.stopped is not None:
                    self.save()
                if self._run.stopped is not None:
                    raise RunFailure(
                        f"strict=true: {self._run.stopped}; `grace-bench resume {self._folder}` goes on without it"
                    )
                if interruption.is_requested:
                    raise Interrupted(
                        f"interrupted at {strategy.n_edits} edits; `grace-bench resume {self._folder}` goes on"
                    )

    def save(self) -> None:
        """Writes a checkpoint, after the files that it refers to are on disk."""
        n_edits = self._run.strategy.n_edits
        self._checkpoints.save(
            {"run": self._run.state_dict(), "environment": self._environment},
            n_edits=n_edits,
            run_files={name: file.sync() for name, file in self._files.items()},
        )
        self._saved_at = n_edits

    def clear(self) -> None:
        """Removes the checkpoints of a finished run."""
        self._checkpoints.clear()

    def environment(self) -> dict[str, Any]:
        """Returns the run's environment; `before_resuming` lists what was different in earlier processes."""
        return {**self._environment, "engine_notes": list(self._run.strategy.model.engine.notes)}

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            self._run.load_state_dict(state["run"])
            self._compare_environment(state["environment"])
        except MISFITS as error:
            raise UserError(
                f"{self._folder}: the newest checkpoint is whole but does not fit the run ({type(error).__name__}: "
                f"{reason_of(error)}); existing=rerun sets the run aside and starts over"
            ) from error

    def _compare_environment(self, earlier: Mapping[str, Any]) -> None:
        now = self._environment
        changed = {
            name: value
            for name, value in earlier.items()
            if name not in (*_IGNORED_DIFFERENCES, "before_resuming") and value != now.get(name)
        }
        changed = {**earlier.get("before_resuming", {}), **changed}
        self._environment = {
            **now,
            "command": earlier["command"],
            **({"before_resuming": changed} if changed else {}),
        }
