"""A run of a sweep, what is done for it, and its outcome."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grace_bench.common.credentials import without_secrets
from grace_bench.common.terminal import say
from grace_bench.errors import RunFailure, UserError, reason_of
from grace_bench.launch.compose import one_line, resolved
from grace_bench.launch.run_config import RunConfig
from grace_bench.launch.run_folder import folder_of, run_or_reuse


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended.

    Attributes:
        state: `done`, `reused` (the run was finished before) or `failed`.
        reason: Why it failed, in one line.
        is_mistake: Whether it failed by a mistake of the user's.
    """

    state: Literal["done", "reused", "failed"]
    reason: str | None = None
    is_mistake: bool = False

    @classmethod
    def of_mistake(cls, error: UserError | OmegaConfBaseException) -> "Outcome":
        """Returns the outcome of a run that was asked for wrongly."""
        return cls("failed", str(error) if isinstance(error, UserError) else one_line(error), is_mistake=True)


@dataclass
class SweepRun:
    """One run of a sweep.

    Attributes:
        overrides: The overrides that describe the run.
        config: The configuration; None if an option has a value that it cannot have.
        folder: The run folder; None if there can be none.
        outcome: How the run ended; None until then.
    """

    overrides: list[str]
    config: RunConfig | None = None
    folder: Path | None = None
    outcome: Outcome | None = None

    @property
    def label(self) -> str:
        """The run folder, or the overrides where there can be no folder."""
        return str(self.folder) if self.folder is not None else " ".join(self.overrides)

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds a finished run that the configuration lets be reused."""
        assert self.config is not None
        assert self.folder is not None
        return self.config.existing != "rerun" and (self.folder / "result.json").is_file()


@dataclass(frozen=True)
class RunTask:
    """What a launcher does for every run, on this machine or another.

    Args:
        folder: The working folder of the command, to which paths are relative.
        command: The command as typed; results record it.
        prepare: Called with the configuration before the run; None for nothing to prepare.
    """

    folder: str = field(default_factory=os.getcwd)
    command: list[str] = field(default_factory=lambda: list(sys.argv))
    prepare: Callable[[RunConfig], None] | None = None

    def __call__(self, config: RunConfig | DictConfig, *, again: bool = False) -> Outcome:
        """Carries out a run.

        Args:
            config: The configuration, or as one of Hydra's launchers composed it.
            again: Whether this sweep has started the run before, in a process that died.
        """
        own = sys.argv
        try:
            if Path.cwd() != Path(self.folder):
                os.chdir(self.folder)
            if isinstance(config, DictConfig):
                config = resolved(config)
            # Slurm counts how often it has put a job back into its queue.
            if (again or int(os.environ.get("SLURM_RESTART_COUNT", "0"))) and is_interrupted(folder_of(config)):
                config = replace(config, existing="resume")
            sys.argv = self.command
            if self.prepare is not None:
                self.prepare(config)
            run_or_reuse(config, say=say)
        except (UserError, OmegaConfBaseException) as error:
            return Outcome.of_mistake(error)
        except RunFailure as error:
            return Outcome("failed", without_secrets(str(error)))
        except Exception as error:
            return Outcome("failed", without_secrets(f"{type(error).__name__}: {reason_of(error)}"))
        finally:
            sys.argv = own
        return Outcome("done")


def is_interrupted(folder: Path) -> bool:
    """Returns whether a folder holds a run that was started and is not finished."""
    return folder.exists() and not (folder / "result.json").is_file()
