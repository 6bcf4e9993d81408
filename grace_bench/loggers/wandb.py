"""Weights & Biases: a view of the run, never its truth. Whatever goes wrong here, the run goes on."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from avalanche.evaluation.metric_results import MetricValue

from grace_bench.files import write_atomically
from grace_bench.loggers import RunLogger, RunPlan
from grace_bench.results import EditRecord, RunResult, read_edits
from grace_bench.strategy import EditorStrategy

Mode = Literal["auto", "online", "offline", "disabled"]


class WandbLogger(RunLogger):
    """Logs the configuration, every metric against `n_edits`, one table of edits, and the run folder as an artifact.

    Avalanche's own `WandBLogger` does not work with current wandb and loses tables and strings.

    The id of the W&B run stands in `wandb/run-id`, so that a run that goes on is the same one there; what it logged
    between its last checkpoint and its end is logged again, at the same `n_edits`.

    Args:
        folder: The run folder, which the table of edits is read from; `wandb/` is made in it.
        mode: `auto` is what `WANDB_MODE` says if it is set, else online if someone is logged in, else offline.
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
        self._values: dict[str, Any] = {}

    def start(self, plan: RunPlan) -> None:  # noqa: D102
        if self._mode != "disabled":
            self._guard(lambda: self._open(plan))

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:  # noqa: D102
        self._values[name] = value

    def after_candidate(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Logs what the edit changed."""
        self._send(strategy.n_edits)

    def after_eval(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Logs the evaluation."""
        self._send(strategy.n_edits)

    def finish(self, result: RunResult | None) -> None:  # noqa: D102
        if self._run is not None:
            self._guard(lambda: self._close(result))

    def _open(self, plan: RunPlan) -> None:
        import wandb

        mode: Mode | None = self._mode
        if mode == "auto":
            # None leaves it to W&B's own switch.
            chosen = os.environ.get("WANDB_MODE")
            mode = None if chosen else "online" if wandb.login(prompt=False, verify=False) else "offline"
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = self._folder / "wandb" / "run-id"
        self._run = wandb.init(
            project=self._project,
            group=self._group or f"{plan.stream}/{plan.model}",
            name=plan.run_id,
            id=kept.read_text(encoding="utf-8") if kept.exists() else None,
            resume="allow",
            job_type=plan.editor,
            config=plan.config,
            dir=str(self._folder),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        if kept.parent.is_dir():
            write_atomically(kept, self._run.id)
        self._run.define_metric("n_edits")
        self._run.define_metric("*", step_metric="n_edits")

    def _send(self, n_edits: int) -> None:
        values, self._values = self._values, {}
        if self._run is not None and values:
            self._guard(lambda: self._run.log({**values, "n_edits": n_edits}))

    def _close(self, result: RunResult | None) -> None:
        import wandb

        run, self._run = self._run, None
        if result is not None:
            records = read_edits(self._folder / "edits.jsonl").values()
            rows = [list(record.model_dump(mode="json").values()) for record in records]
            run.log({"edits": wandb.Table(columns=list(EditRecord.model_fields), data=rows)})
            run.summary.update({f"final/{name}": value for name, value in result.metrics.items()})
            artifact = wandb.Artifact(f"{result.stream.name}-{result.editor.name}-s{result.seed}", type="run")
            for path in sorted(self._folder.rglob("*")):
                relative = path.relative_to(self._folder)
                if path.is_file() and relative.parts[0] != "wandb" and not relative.name.startswith("."):
                    artifact.add_file(str(path), name=relative.as_posix())
            run.log_artifact(artifact)
        run.finish(exit_code=0 if result is not None else 1)

    def _guard(self, action: Callable[[], None]) -> None:
        """Carries out an action on W&B; at the first failure says so once and leaves W&B alone from then on."""
        run = self._run
        try:
            action()
        except Exception as error:
            self._run, self._mode = None, "disabled"
            if run is not None:
                # An open run would take in what the next one logs.
                with suppress(Exception):
                    run.finish(exit_code=1)
            reason = str(error).strip().splitlines()
            print(
                f"grace-bench: W&B is off for this run ({reason[0] if reason else type(error).__name__})",
                file=sys.stderr,
            )
