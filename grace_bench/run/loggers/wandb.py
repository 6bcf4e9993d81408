"""Weights & Biases: a view of the run; whatever goes wrong here, the run continues."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

from pydantic import ValidationError

from grace_bench.common.credentials import without_secrets
from grace_bench.common.files import write_atomically
from grace_bench.common.text import on_one_line
from grace_bench.common.wandb_account import logged_in, quieten
from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import first_error, reason_of
from grace_bench.results.curves import kept_edits, score_by_age
from grace_bench.results.reading import read_edits
from grace_bench.results.schema import EditRecord, EvaluationRecord, RunResult
from grace_bench.run.loggers import RunLogger, RunPlan

Mode = Literal["auto", "online", "offline", "disabled"]
INIT_TIMEOUT = 30.0
"""Seconds that a run waits for W&B to answer at its start, unless WANDB_INIT_TIMEOUT is set."""
FINISH_TIMEOUT = 120.0
"""Seconds that a run waits at its end for W&B to upload the rest, unless WANDB_FINISH_TIMEOUT is set."""


class WandbLogger(RunLogger):
    """Logs the configuration, every metric against `n_edits`, a table of edits, and the run folder as an artifact.

    At the end it adds ERR by the age of the edit, the final metrics as `final/NAME` and the costs as `cost/NAME`.

    Avalanche's own `WandBLogger` does not work with current wandb and loses tables and strings.

    The id of the W&B run is kept in `wandb/run-id`, so that a resumed run stays the same W&B run. What was logged after
    the last checkpoint is logged again, at the same `n_edits`.

    Args:
        folder: The run folder; the table of edits is read from it, and `wandb/` is made in it.
        mode: `auto` uses `WANDB_MODE` if it is set; otherwise it is online if a user is logged in, and offline if not.
        project: The W&B project.
        group: The W&B group; stream and model by default.
    """

    def __init__(
        self, folder: Path, *, mode: Mode = "auto", project: str = "grace-bench", group: str | None = None
    ) -> None:
        super().__init__()
        self._folder = folder
        self._mode = mode
        self._project = project
        self._group = group
        self._run: Any = None

    def start(self, plan: RunPlan) -> None:  # noqa: D102
        if self._mode != "disabled":
            self._guard(lambda: self._open(plan))

    def after_candidate(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Logs the metric values that follow every candidate."""
        self._send({metric.name: metric.value for metric in metric_values}, strategy.n_edits)

    def log_evaluation(self, record: EvaluationRecord) -> None:
        """Logs the evaluation."""
        self._send(record.metrics, record.n_edits)

    def finish(self, result: RunResult | None) -> None:  # noqa: D102
        if self._run is not None:
            self._guard(lambda: self._close(result))

    def _open(self, plan: RunPlan) -> None:
        quieten()
        self._folder.mkdir(parents=True, exist_ok=True)
        mode: str = self._mode
        try:
            if mode == "auto":
                # W&B's own switch comes first.
                mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
            self._run = self._start(plan, mode)
        except Exception as error:
            if mode in ("offline", "disabled") or isinstance(error, ImportError):
                raise
            # W&B's own process would keep the id of the run that it failed to open.
            _leave()
            self._run = self._start(plan, "offline")
            _say(f"W&B does not take this run ({reason_of(error)}): logged offline, {_sync(self._run)} sends it")

    def _start(self, plan: RunPlan, mode: Any) -> Any:
        import wandb

        timeout = _seconds("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)
        id_file = self._folder / "wandb" / "run-id"
        if not id_file.exists() and mode != "disabled":
            # Before W&B knows the run, so that one killed in between is resumed under the same id.
            write_atomically(id_file, token_hex(4))
        wandb_id = id_file.read_text(encoding="utf-8") if id_file.exists() else None
        if wandb_id is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", wandb_id):
            raise ValueError(f"{id_file} holds no id of a run")
        run = wandb.init(
            project=self._project,
            group=self._group or f"{plan.stream}/{plan.model}",
            name=plan.run_id,
            id=wandb_id,
            resume="allow",
            job_type=plan.editor,
            config={**plan.config, "row": _row(plan.run_id)},
            dir=str(self._folder),
            mode=mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                # W&B keeps the user name in a remote's URL, and that may be a token.
                disable_git=_remote_holds_secrets(),
                init_timeout=timeout,
                # A single request may not take longer than opening the run.
                x_graphql_timeout_seconds=timeout,
                finish_timeout=_seconds("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT),
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("n_edits")
        run.define_metric("*", step_metric="n_edits")
        run.define_metric("age")
        run.define_metric("ERR_by_age", step_metric="age")
        return run

    def _send(self, values: Mapping[str, float], n_edits: int) -> None:
        if self._run is not None and values:
            self._guard(lambda: self._run.log({**values, "n_edits": n_edits}))

    def _close(self, result: RunResult | None) -> None:
        import wandb

        run, self._run = self._run, None
        if result is not None:
            records = read_edits(self._folder / "edits.jsonl").values()
            for age, score in err_by_age(self._folder, int(result.metrics["n_edits"] or 0)):
                run.log({"age": age, "ERR_by_age": score})
            # A table takes no dictionaries; the other scores after an edit are in the run folder.
            columns = [name for name in EditRecord.model_fields if name != "scores_after"]
            rows = [[*record.model_dump(mode="json", include={*columns}).values()] for record in records]
            run.log({"edits": wandb.Table(columns=columns, data=rows)})
            run.summary.update({f"final/{name}": value for name, value in result.metrics.items()})
            run.summary.update({f"cost/{name}": value for name, value in result.cost.model_dump().items()})
            artifact = wandb.Artifact(f"{result.stream.name}-{result.editor.name}-s{result.seed}", type="run")
            for path in sorted(self._folder.rglob("*")):
                relative = path.relative_to(self._folder)
                if path.is_file() and relative.parts[0] != "wandb" and not relative.name.startswith("."):
                    artifact.add_file(str(path), name=relative.as_posix())
            run.log_artifact(artifact)
        run.finish(exit_code=0 if result is not None else 1)

    def _guard(self, action: Callable[[], None]) -> None:
        """Runs an action on W&B; the first failure is reported in one line and disables W&B for the rest of the run."""
        run = self._run
        try:
            action()
        except Exception as error:
            self._run, self._mode = None, "disabled"
            if run is not None:
                # An open run would receive what the next run logs.
                with suppress(Exception):
                    run.finish(exit_code=1)
            if isinstance(error, ConnectionError):
                # W&B's own process has died; the next run, and the end of the program, would fail without it.
                _leave()
            recovery = "" if run is None or run.disabled else f"; {_sync(run)} sends what it has"
            reason = first_error(error) if isinstance(error, ValidationError) else reason_of(error)
            _say(f"W&B is off for this run ({reason}){recovery}")


def err_by_age(folder: Path, n_edits: int) -> list[tuple[float, float]]:
    """Returns the mean score of the last evaluation by the age of the edit, in tenths of the run.

    The age of an edit is the number of edits made after it; each tenth is placed at the middle of its ages.

    Args:
        folder: The run folder.
        n_edits: Edits that the run made.
    """
    tenths = score_by_age([kept_edits(folder, n_edits)], width=max(1, math.ceil(n_edits / 10)))
    return [(point.x, point.mean) for point, _ in tenths.values()]


def _leave() -> None:
    """Ends W&B's own process; the next run starts a new one."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=1)
    quieten()


def _row(run_id: str) -> str:
    """Returns the leaderboard row that a run belongs to: its id without the seed.

    >>> _row("toy/toy/grace/0a1b2c3d-s12"), _row("my-stream/toy/grace/s0"), _row("first-sketch")
    ('toy/toy/grace/0a1b2c3d', 'my-stream/toy/grace', 'first-sketch')
    """
    return re.sub(r"[-/]s\d+$", "", run_id)


def _remote_holds_secrets() -> bool:
    """Returns whether a remote of the current Git repository has a password or a token in its URL."""
    command = ["git", "config", "--get-regexp", r"^remote\..*\.url$"]
    try:
        remotes = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return False
    return without_secrets(remotes) != remotes


def _sync(run: Any) -> str:
    return f"wandb sync {run.settings.sync_dir}"


def _seconds(variable: str, default: float) -> float:
    return float(os.environ.get(variable, default))


def _say(text: str) -> None:
    print(f"grace-bench: {on_one_line(without_secrets(text))}", file=sys.stderr)
