"""A W&B workspace, a report and a sweep for the runs of a project, made with wandb-workspaces."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grace_bench.common.files import write_atomically
from grace_bench.common.wandb_account import check_project, logged_in, quieten
from grace_bench.errors import UserError, reason_of
from grace_bench.results.metric_info import metric_infos

COST = "cost/seconds_per_edit_p50"
NAME = "grace-bench: editors compared"

SWEEP = """\
# wandb sweep sweep.yaml, then on any number of machines the `wandb agent` line that it prints.
# Every parameter is an option of `grace-bench run`; change them as you like.
project: {project}
{entity}name: GRACE by its radius
method: grid
metric:
  name: {metric}
  goal: maximize
command:
  - ${{env}}
  - grace-bench
  - run
  - ${{args_no_hyphens}}
parameters:
  stream:
    value: atlas-qa
  editor:
    value: grace
  editor.eps_init:
    values: [0.5, 1.0, 3.0, 10.0]
  seed:
    values: [0, 1, 2]
  max_edits:
    value: 100
  wandb.project:
    value: {project}
"""

Say = Callable[[str], None]


def dashboard(project: str, *, entity: str | None, group: str | None, out: Path, say: Say) -> None:
    """Writes the specification of a workspace and a report, and a sweep; publishes the first two if logged in.

    Args:
        project: The W&B project.
        entity: Its owner; None for the user who is logged in.
        group: Show only the runs of this W&B group; None for all.
        out: The folder for `workspace.json`, `report.json` and `sweep.yaml`; an existing sweep is not overwritten.
        say: Called with each line for the user.

    Raises:
        UserError: If W&B takes no project of this name, wandb-workspaces is missing, a file cannot be written, or W&B
            rejects what is published.
    """
    check_project("project", project)
    try:
        import wandb
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(f'{error.name} is missing: pip install "grace-bench[dashboard]"') from error
    try:
        quieten()
        publishes = logged_in()
        owner = entity or ((wandb.Api().default_entity or "") if publishes else "")
    except Exception as error:
        raise UserError(f"W&B: {reason_of(error)}") from error
    workspace = make_workspace(project, entity=owner, group=group)
    report = make_report(project, entity=owner, group=group)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, view in (("workspace", workspace), ("report", report)):
            write_atomically(out / f"{name}.json", json.dumps(specification(view), indent=2) + "\n")
            say(f"written: {out / name}.json")
        sweep = out / "sweep.yaml"
        if sweep.exists():
            say(f"kept: {sweep}")
        else:
            line = f"entity: {json.dumps(owner)}\n" if owner else ""
            write_atomically(sweep, SWEEP.format(metric=_best(), project=json.dumps(project), entity=line))
            say(f"written: {sweep}")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error
    if not publishes:
        say("nobody is logged in to W&B, so nothing was published: wandb login, then the same command again")
        return
    for name, view in (("workspace", workspace), ("report", report)):
        try:
            say(f"{name}: {view.save().url}")
        except Exception as error:
            raise UserError(f"W&B did not take the {name}: {reason_of(error)}") from error


def make_workspace(project: str, *, entity: str, group: str | None) -> Any:
    """Returns a `wandb_workspaces.workspaces.Workspace` with every panel, editors side by side.

    Args:
        project: The W&B project.
        entity: Its owner; empty for a specification that is not published.
        group: Show only the runs of this W&B group; None for all.
    """
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(
            name=title,
            panels=panels,
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=min(3, len(panels)), rows=-(-len(panels) // 3)),
        )
        for title, _, panels in _sections()
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="n_edits", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_filters(group),
            groupby=[ws.Metric("Group"), ws.Metric("JobType"), ws.Config("row")],
            order=[ws.Ordering(ws.Summary(f"final/{_best()}"), ascending=False)],
            pinned_columns=[f"summary:{name}" for name in _table()],
        ),
    )


def make_report(project: str, *, entity: str, group: str | None) -> Any:
    """Returns a `wandb_workspaces.reports.v2.Report` with the same panels, each section explained.

    Args:
        project: The W&B project.
        entity: Its owner; empty for a specification that is not published.
        group: Show only the runs of this W&B group; None for all.
    """
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = []
    for title, text, panels in _sections():
        runs = wr.Runset(
            name="runs",
            filters=_filters(group),
            groupby=["run.group", "run.jobType", "config.row"],
            order=[wr.OrderBy(wr.SummaryMetric(f"final/{_best()}"), ascending=False)],
            pinned_columns=["run:displayName", *(f"summary:{name}" for name in _table())],
            lock_columns=True,
        )
        blocks += [wr.H2(title), wr.P(text), wr.PanelGrid(runsets=[runs], panels=panels)]
    shown = f"group {group}" if group else "all groups"
    return wr.Report(
        project=project,
        entity=entity,
        title=NAME,
        description=f"Runs of project {project}, {shown}. Bands: one standard deviation over seeds.",
        blocks=blocks,
        width="fluid",
    )


def specification(view: Any) -> dict[str, Any]:
    """Returns a workspace or report as the JSON that W&B stores; the library has no public function for this."""
    model: dict[str, Any] = view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return model


def _best() -> str:
    """The metric that ranks runs."""
    return metric_infos().ranking[0].name


def _table() -> list[str]:
    """The columns of the table of runs."""
    metrics = metric_infos()
    shown = sorted(metrics.shown("dashboard"), key=lambda info: (info.is_cost, info.order))
    scores, costs = ([info.name for info in shown if info.is_cost is is_cost] for is_cost in (False, True))
    return [*(f"final/{name}" for name in dict.fromkeys([_best(), *scores, "n_edits", *costs])), COST]


def _sections() -> list[tuple[str, str, list[Any]]]:
    """Returns titles, explanations and fresh panels.

    Panels inherit their grouping from the table of runs, by W&B group, editor and row of the leaderboard: a panel's own
    grouping has a single key, and a sweep over streams or settings has one group.
    """
    import wandb_workspaces.reports.v2 as wr

    def curve(name: str, *, x: str = "n_edits") -> Any:
        return wr.LinePlot(
            title=name,
            x=x,
            y=[name],
            title_x=x,
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            max_runs_to_show=100,
        )

    def bars(name: str) -> Any:
        return wr.BarPlot(
            title=name,
            metrics=[name],
            orientation="h",
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            max_runs_to_show=100,
        )

    def against_cost(name: str) -> Any:
        return wr.ScatterPlot(
            title=f"{name} by seconds an edit", x=wr.SummaryMetric(COST), y=wr.SummaryMetric(name), log_x=True
        )

    metrics = metric_infos()
    curves = metrics.shown("dashboard")
    best, *others = metrics.ranking
    edited = metrics.mean_over("edited").name
    fallback = f" Perplexity has no {best.name}: read {others[0].name} there." if others else ""
    return [
        (
            "Leaderboard",
            f"Means over seeds after the last edit; the table holds the rest.{fallback}",
            [bars(f"final/{name}") for name in (best.name, *best.averages)],
        ),
        (
            "Learning curves",
            "Over edits: " + "; ".join(f"{info.name}, {info.caption or info.summary}" for info in curves) + ".",
            [curve(info.name) for info in curves],
        ),
        (
            f"{edited} by age of the edit",
            f"The age of an edit is the number of edits made after it; {edited} after the last edit, in tenths of the "
            "run.",
            [curve("ERR_by_age", x="age")],
        ),
        (
            "Cost against quality",
            "A point per run; the median seconds of an edit, scoring excluded.",
            [against_cost(f"final/{info.name}") for info in metrics.ranking],
        ),
        *(
            (*info.section, [curve(name) for name in (info.name, *(f"{info.name}/{part}" for part in info.parts))])
            for info in metrics
            if info.section is not None
        ),
    ]


def _filters(group: str | None) -> Any:
    from wandb_workspaces import expr

    return [expr.Metric("Group") == group] if group else []
