"""A run that is kept on disk as it goes on, so that it may be stopped anywhere."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_bench.common.signals import Interruption
from grace_bench.errors import MISFITS, Interrupted, RunFailure, UserError, reason_of
from grace_bench.run.checkpoint import Checkpoints
from grace_bench.run.loggers import RunLogger
from grace_bench.run.loggers.jsonl import JsonlLogger, PredictionsLogger
from grace_bench.run.loop import RunLoop

# What may differ between the processes of one run without any of its numbers differing.
_UNCOUNTED = ("command", "engine_notes", "datasets", "wandb")


class KeptRun:
    """A run with its checkpoints.

    Asking a run for its state changes nothing that follows (`RunLoop.state_dict`), so when checkpoints are written
    never shows in the result.

    Args:
        folder: The run folder.
        run: The run, at its start.
        loggers: Those of the run that write files or keep anything.
        identity: Everything that decides what the run computes.
        environment: What it is computed with.
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
        self._checkpoints = Checkpoints(folder, identity=identity)
        self._environment = dict(environment)
        self._saved_at: int | None = None

    def take_up(self, say: Callable[[str], None] | None = None) -> bool:
        """Takes up the newest whole checkpoint, and says what else there was.

        Args:
            say: Takes one line.

        Returns:
            Whether there was a whole one.

        Raises:
            UserError: If it is of another run than this one, or another schema version.
        """
        loaded = self._checkpoints.load()
        if loaded.state is not None:
            self._take(loaded.state)
            self._saved_at = loaded.n_edits
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

    def carry_out(self, *, every: int) -> None:
        """Goes on to the run's end, with a checkpoint at its start, after every so many edits and wherever it stops.

        Raises:
            Interrupted: After a signal, once the checkpoint is written.
            RunFailure: At an edit that cannot be made, if the run is strict, once the checkpoint is written.
        """
        strategy = self._run.strategy
        with Interruption() as interruption:
            # What was taken up is on disk already; before that there is nothing to save.
            interruption.can_wait = self._saved_at is not None
            for _ in self._run.steps():
                interruption.can_wait = True
                # Fewer edits than in the newest checkpoint: some of those failed, and the run went back.
                is_due = self._saved_at is None or not 0 <= strategy.n_edits - self._saved_at < every
                if is_due or interruption.is_asked or self._run.stopped is not None:
                    self.save()
                if self._run.stopped is not None:
                    raise RunFailure(
                        f"strict=true: {self._run.stopped}; `grace-bench resume {self._folder}` goes on without it"
                    )
                if interruption.is_asked:
                    raise Interrupted(
                        f"interrupted at {strategy.n_edits} edits; `grace-bench resume {self._folder}` goes on"
                    )

    def save(self) -> None:
        """Writes a checkpoint."""
        states = {type(logger).__name__: logger.state_dict() for logger in self._loggers}
        n_edits = self._run.strategy.n_edits
        self._checkpoints.save(
            {"run": self._run.state_dict(), "loggers": states, "environment": self._environment},
            n_edits=n_edits,
            beside=states.get(PredictionsLogger.__name__),
        )
        self._saved_at = n_edits

    def clear(self) -> None:
        """Removes the checkpoints of a run that is finished."""
        self._checkpoints.clear()

    def environment(self) -> dict[str, Any]:
        """Returns what the run was computed with, under `before_resuming` also what was otherwise for a part of it."""
        return {**self._environment, "engine_notes": list(self._run.strategy.model.engine.notes)}

    def _take(self, state: Mapping[str, Any]) -> None:
        try:
            self._run.load_state_dict(state["run"])
            for logger in self._loggers:
                own = state["loggers"].get(type(logger).__name__)
                if own is not None:
                    logger.load_state_dict(own)
            self._take_environment(state["environment"])
        except MISFITS as error:
            raise UserError(
                f"{self._folder}: the newest checkpoint is whole but does not fit the run ({type(error).__name__}: "
                f"{reason_of(error)}); existing=rerun sets the run aside and starts anew"
            ) from error

    def _take_environment(self, earlier: Mapping[str, Any]) -> None:
        now = self._environment
        changed = {
            name: value
            for name, value in earlier.items()
            if name not in (*_UNCOUNTED, "before_resuming") and value != now.get(name)
        }
        changed = {**earlier.get("before_resuming", {}), **changed}
        self._environment = {
            **now,
            "command": earlier["command"],
            **({"before_resuming": changed} if changed else {}),
        }
