"""The report: a comparison of runs on one page that needs no network.

The page answers, for each stream and model: which editor is best, whether the difference is real, when each editor
begins to forget, and what it costs.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grace_bench.analysis.leaderboard import (
    MISSING,
    Column,
    Leaderboard,
    Row,
    Table,
    cell_text,
    compare_rows,
    marked_text,
    table_notes,
)
from grace_bench.analysis.reference import find_runs
from grace_bench.analysis.scorings import scorings
from grace_bench.analysis.significance import SIGNIFICANCE_LEVEL
from grace_bench.common.files import write_atomically
from grace_bench.common.scores import score_info
from grace_bench.common.text import visible
from grace_bench.common.untrusted import check_run_folder
from grace_bench.errors import UserError
from grace_bench.registry import EDITORS
from grace_bench.results.curves import (
    FORGETTING_THRESHOLD,
    KeptEdit,
    Point,
    Series,
    age_width,
    edits_forgotten_after,
    kept_edits,
    mean_curve,
    score_by_age,
    series_of,
    thinned,
    upstream_forgotten_after,
    worst_forgotten,
)
from grace_bench.results.metric_info import MetricInfo, Metrics
from grace_bench.results.reading import read_evaluations
from grace_bench.results.rescored import all_rescored, rescored_evaluations
from grace_bench.results.schema import Evaluation, RunResult

TRAITS = {"needs_subject": "S", "needs_replay": "R", "needs_meta_training": "M", "freezes_weights": "F"}
"""The class attributes of an editor by which rows can be filtered, with their marks in a table."""

MAX_POINTS = 500
MAX_FORGOTTEN = 10
MAX_TEXT = 300

_PAGE = "index.html"
_GENERATOR = "grace-bench report"


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of a run folder.

    Attributes:
        folder: The run folder.
        result: Its `result.json`, read by the report's score.
        recorded: Its `result.json` as it is.
        evaluations: Its `metrics.jsonl`, read by the report's score.
        edits: Its edits, as they are answered at the end of the run; None for a reduced run, which has no record of
            them.
        config: Its `config.yaml` as text; empty for a run from Python, which has none.
        is_reference: Whether it ships with grace-bench.
    """

    folder: Path
    result: RunResult
    recorded: RunResult
    evaluations: Sequence[Evaluation]
    edits: Sequence[KeptEdit] | None
    config: str
    is_reference: bool = False


def write_report(paths: Sequence[Path], out: Path, *, reference: bool = False, score: str | None = None) -> Path:
    """Writes the page.

    Args:
        paths: Run folders, or folders that contain some.
        out: The folder that receives `index.html`; an earlier report there is replaced.
        reference: As in `find_runs`.
        score: As in `read_runs`.

    Returns:
        The page's path.

    Raises:
        UserError: If there is no finished run, a run folder is broken, or the page cannot be written because `out` is a
            file or its `index.html` is not a report.
    """
    page = out / _PAGE
    _refuse_foreign(page)
    html = render_report(*read_runs(paths, reference=reference, score=score), score=score)
    try:
        write_atomically(page, html)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error
    return page


def read_runs(
    paths: Sequence[Path], *, reference: bool = False, score: str | None = None
) -> tuple[list[Run], tuple[str, ...]]:
    """Reads run folders.

    Args:
        paths: Run folders, or folders that contain some.
        reference: As in `find_runs`.
        score: The score of the panel by which the runs are read; None for their main scores.

    Returns:
        The runs, and lines about those that did not record the score.

    Raises:
        UserError: If there is no finished run, none with that score, a file of one is missing or broken, naming file
            and line, or a link in a run folder points outside it.
    """
    every = find_runs(paths, reference=reference)
    for run in every:
        check_run_folder(run.file.parent)
    found, left_out = all_rescored([(run.result, run) for run in every], score)
    runs = []
    for result, run in found:
        folder, recorded = run.file.parent, run.result
        config, n_edits = folder / "config.yaml", int(result.metrics.get("n_edits") or 0)
        evaluations = read_evaluations(folder / "metrics.jsonl")
        runs.append(
            Run(
                folder=folder,
                result=result,
                recorded=recorded,
                evaluations=rescored_evaluations(evaluations, recorded.protocol, score),
                edits=None if recorded.is_reduced else kept_edits(folder, n_edits, score=score),
                config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
                is_reference=run.is_reference,
            )
        )
    return runs, left_out


def render_report(runs: Sequence[Run], left_out: Sequence[str] = (), *, score: str | None = None) -> str:
    """Returns the page as HTML.

    Args:
        runs: The runs, at least one.
        left_out: Lines about runs that are not shown.
        score: The score by which the runs were read; None for their main scores.

    Raises:
        UserError: If there are no runs.
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    board = Leaderboard(
        [run.result for run in runs],
        folders=[run.folder for run in runs],
        reference=[run.is_reference for run in runs],
        score=score,
        left_out=left_out,
    )
    by_result = {id(run.result): run for run in runs}
    labels = sorted({(row.editor, row.name) for table in board.tables for row in table.rows})
    index = {name: number for number, (_, name) in enumerate(labels)}
    groups = [
        _Group(table, by_result, index, board.metrics).context(number) for number, table in enumerate(board.tables)
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("grace_bench.analysis", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Everything a template shows passes through here, so no text of a data set can escape it.
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}

    def asset(name: str) -> str:
        assert environment.loader is not None
        return environment.loader.get_source(environment, name)[0]

    scripts = [get_plotlyjs(), asset("report.js")]
    return environment.get_template("report.html.jinja").render(
        groups=groups,
        data={
            "rows": [row for group in groups for row in group["rows"]],
            "charts": [chart for group in groups for chart in group["charts"]],
            "labels": [{"name": visible(name), **_style(number)} for number, (_, name) in enumerate(labels)],
        },
        editors=sorted({editor for editor, _ in labels}),
        styles={editor: _style(index[name]) for editor, name in reversed(labels)},
        streams=list(dict.fromkeys(table.stream for table in board.tables)),
        models=sorted({model for table in board.tables for model in table.models}),
        traits=TRAITS,
        n_runs=sum(len(row.seeds) for table in board.tables for row in table.rows),
        generator=_GENERATOR,
        version=version("grace-bench"),
        limits={"points": MAX_POINTS, "forgotten": MAX_FORGOTTEN, "text": MAX_TEXT},
        threshold=FORGETTING_THRESHOLD,
        css=Markup(asset("report.css")),
        scripts=[Markup(script) for script in scripts],
        script_hashes=[_hash(script) for script in scripts],
    )


def _refuse_foreign(page: Path) -> None:
    """Raises if the page would replace something that is not a report."""
    if not page.parent.is_dir() and page.parent.exists():
        raise UserError(f"--out {page.parent}: is a file, not a folder")
    if not page.exists():
        return
    try:
        head = page.read_bytes()[:2000]
    except OSError as error:
        raise UserError(f"{page}: {error.strerror or error}") from error
    if f'<meta name="generator" content="{_GENERATOR}">'.encode() not in head:
        raise UserError(f"{page}: exists and is not a report of grace-bench; choose another folder with --out")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _traits(editor: str) -> Mapping[str, bool] | None:
    """An editor's traits; None if the editor is not installed here."""
    if editor not in EDITORS.entries():
        return None
    return {trait: EDITORS.attribute(editor, trait) for trait in TRAITS}


# Distinguishable without colour, too. The counts have no common divisor, so a style repeats only after 504 editors.
_N_COLOURS = 7
_DASHES = {
    "solid": "none",
    "dash": "6 3",
    "dot": "2 2.5",
    "dashdot": "6 2.5 2 2.5",
    "longdash": "10 3",
    "5px,2px,2px,2px,2px,2px": "5 2 2 2 2 2",
    "1px,5px": "1 4",
    "12px,3px,4px,3px": "12 3 4 3",
}
_SYMBOLS = {
    "circle": "M17 4a4 4 0 1 1 0 8a4 4 0 1 1 0-8z",
    "square": "M13.5 4.5h7v7h-7z",
    "diamond": "M17 3l5 5l-5 5l-5-5z",
    "triangle-up": "M17 3.5l4.8 8.5h-9.6z",
    "cross": "M15.6 3.5h2.8v3.1h3.1v2.8h-3.1v3.1h-2.8v-3.1h-3.1v-2.8h3.1z",
    "triangle-down": "M17 12.5l4.8-8.5h-9.6z",
    "x": "M14 3.5l3 3l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3l-3-3z",
    "star": "M17 3l1.3 3.4l3.6.2l-2.8 2.3l.9 3.5l-3-2l-3 2l.9-3.5l-2.8-2.3l3.6-.2z",
    "pentagon": "M17 3.4l4.6 3.4l-1.8 5.4h-5.6l-1.8-5.4z",
}


def _style(number: int) -> dict[str, Any]:
    dash, symbol = list(_DASHES)[number % len(_DASHES)], list(_SYMBOLS)[number % len(_SYMBOLS)]
    return {
        "colour": number % _N_COLOURS,
        "dash": dash,
        "symbol": symbol,
        "stroke": _DASHES[dash],
        "path": _SYMBOLS[symbol],
    }


class _Group:
    """A table of the leaderboard as a section of the page.

    Args:
        table: The table.
        by_result: The runs by the `id()` of their results.
        index: The number of each row's name, which determines its style on the whole page.
        metrics: The descriptions of all registered metrics.
    """

    def __init__(self, table: Table, by_result: Mapping[int, Run], index: Mapping[str, int], metrics: Metrics) -> None:
        self.table = table
        self.runs = [[by_result[id(result)] for result in row.results] for row in table.rows]
        self.index = index
        self.higher = table.protocol.higher_is_better
        self.metrics = metrics
        self.upstream, self.edited = metrics.mean_over("upstream"), metrics.mean_over("edited")
        self.learned = metrics.right_after_edit

    def context(self, number: int) -> dict[str, Any]:
        """Returns the variables of the template, as plain values."""
        table = self.table
        name = f"g{number}"
        return {
            "id": name,
            "stream": table.stream,
            "title": " · ".join(dict.fromkeys(part for part in (*_names(table), table.distinction) if part)),
            "upstream": self.upstream.header,
            "edited": self.edited.header,
            "learned": self.learned.header,
            "protocol": table.protocol,
            "higher": self.higher,
            "ranked_by": table.ranked_by,
            "columns": [self._column(column) for column in table.columns],
            "rows": [self._row(name, row) for row in table.rows],
            "body": [self._cells(position, row) for position, row in enumerate(table.rows)],
            "glance": self._glance(),
            "notes": table_notes(table),
            "differences": list(self._differences()),
            "scorings": list(self._scorings()),
            "forgetting": [self._forgetting(row, runs) for row, runs in zip(table.rows, self.runs, strict=True)],
            "charts": [{"group": name, **chart} for chart in (*self._curves(name), *self._others(name))],
            "runs": [self._run(row, run) for row, runs in zip(table.rows, self.runs, strict=True) for run in runs],
        }

    def _column(self, column: Column) -> dict[str, Any]:
        return {"header": column.header, "descending": column.higher_is_better is True}

    def _row(self, group: str, row: Row) -> dict[str, Any]:
        traits = _traits(row.editor)
        words = [self.table.stream, row.model, row.name, row.tuning_budget or ""]
        return {
            "group": group,
            "label": self.index[row.name],
            "editor": visible(row.editor),
            "stream": visible(self.table.stream),
            "model": visible(row.model),
            "traits": traits,
            "text": visible(" ".join(words)).lower(),
        }

    def _cells(self, position: int, row: Row) -> dict[str, Any]:
        cells = []
        for column in self.table.columns:
            cell = row.cells.get(column.name)
            is_best = position in self.table.best(column)
            cells.append({"cell": cell, "text": marked_text(self.table, row, column), "is_best": is_best})
        traits = _traits(row.editor)
        return {
            "name": row.name,
            "style": _style(self.index[row.name]),
            "cells": cells,
            "tuning": row.tuning_budget,
            "n_runs": len(row.seeds),
            "traits": None if traits is None else [trait for trait in TRAITS if traits[trait]],
        }

    def _glance(self) -> dict[str, Any] | None:
        """The best editor and its runner-up, except for the floor; None if no row has the ranking figure."""
        ranked = [
            (row, runs)
            for row, runs in zip(self.table.rows, self.runs, strict=True)
            if self.table.ranked_by in row.cells and not row.is_floor
        ]
        if not ranked:
            return None
        (best, runs), others = ranked[0], [row for row, _ in ranked[1:]]
        column = self.table.column(self.table.ranked_by)
        figure = best.cells[column.name].mean

        def apart(row: Row) -> dict[str, str]:
            lead = abs(figure - row.cells[column.name].mean)
            return {"name": row.name, "lead": f"{lead:.{column.decimals}f}", "verdict": self._verdict(best, row)}

        floor = next((row for row in self.table.rows if row.is_floor and column.name in row.cells), None)
        beaten = floor is not None and not (
            figure > floor.cells[column.name].mean if self.higher else figure < floor.cells[column.name].mean
        )
        return {
            "best": best.name,
            "figure": cell_text(best, column),
            "second": apart(others[0]) if others else None,
            "floor": apart(floor) if floor and beaten else None,
            "forgetting": self._forgetting(best, runs),
            "cost": ", ".join(self._cost_facts(best)),
        }

    def _verdict(self, one: Row, two: Row) -> str:
        """Whether the difference of two rows in the ranking score is real, in words."""
        try:
            p_value = self._p_value(one, two)
        except UserError as error:
            return f"not compared ({error})"
        is_real = p_value < SIGNIFICANCE_LEVEL
        return f"{'a real difference' if is_real else 'not shown to be a real difference'} (p = {p_value:.2g})"

    def _p_value(self, one: Row, two: Row) -> float:
        others = [row for row in (one, two) if row is not self.table.rows[0]]
        if len(others) == 1 and others[0].p_holm is not None:
            return others[0].p_holm
        return compare_rows(one, two, self.table.column(self.table.ranked_by)).p_value

    def _differences(self) -> Iterator[dict[str, Any]]:
        """Yields the difference of the first row from every other row."""
        for row in self.table.rows:
            if (found := row.comparison) is not None and row.p_holm is not None:
                yield {
                    "label": self.index[row.name],
                    "name": row.name,
                    "style": _style(self.index[row.name]),
                    # A comparison is the row minus the first. Not -x: a zero has no sign.
                    "difference": 0.0 - found.difference,
                    "low": 0.0 - found.high,
                    "high": 0.0 - found.low,
                    "p_value": row.p_holm,
                    "is_real": row.p_holm < SIGNIFICANCE_LEVEL,
                    "n_items": found.n_items,
                    "n_seeds": found.n_seeds,
                }

    def _scorings(self) -> Iterator[dict[str, Any]]:
        """Yields how far the scores of the panel lie apart, a table a metric."""
        for found in scorings([[run.recorded for run in runs] for runs in self.runs], self.metrics):
            decimals = [score_info(score).decimals for score in found.scores]
            yield {
                "metric": found.metric.header,
                "scores": found.scores,
                "lines": [
                    {
                        "label": self.index[row.name],
                        "name": row.name,
                        "style": _style(self.index[row.name]),
                        "values": [
                            {"value": value, "text": MISSING if value is None else f"{value:.{digits}f}"}
                            for value, digits in zip(values, decimals, strict=True)
                        ],
                        "apart": {"value": apart, "text": MISSING if apart is None else f"{apart:.3f}"},
                    }
                    for row, values, apart in zip(self.table.rows, found.values, found.apart, strict=True)
                ],
            }

    def _forgetting(self, row: Row, runs: Sequence[Run]) -> dict[str, Any]:
        def series(info: MetricInfo) -> list[Series]:
            return [series_of(run.evaluations, info.name) for run in runs]

        def ends(info: MetricInfo) -> list[str]:
            curve = mean_curve(series(info))
            return [f"{point.mean:.{self._decimals}f}" for point in (curve[0], curve[-1])] if curve else ["–", "–"]

        upstream = [upstream_forgotten_after(one, higher_is_better=self.higher) for one in series(self.upstream)]
        edits = [
            edits_forgotten_after(learned, kept, higher_is_better=self.higher)
            for learned, kept in zip(series(self.learned), series(self.edited), strict=True)
        ]
        known = [run for run in runs if run.edits is not None]
        n_edits = sum(int(run.result.metrics.get("n_edits") or 0) for run in known)
        n_lost = sum(len(worst_forgotten(run.edits or (), higher_is_better=self.higher)) for run in known)
        return {
            "label": self.index[row.name],
            "name": row.name,
            "style": _style(self.index[row.name]),
            "is_floor": row.is_floor,
            "upstream": _onset(upstream),
            "upstream_ends": ends(self.upstream),
            "edits": _onset(edits) if self._learned(runs) else {"text": "too little learned", "first": None},
            "learned_end": ends(self.learned)[1],
            "edited_end": ends(self.edited)[1],
            "lost": f"{n_lost} of {n_edits}" if known else MISSING,
            "lost_share": n_lost / n_edits if n_edits else 0.0,
        }

    def _learned(self, runs: Sequence[Run]) -> bool:
        """Whether there is anything to forget: a score below the threshold cannot fall by more than the threshold."""
        learned = [figure for run in runs for _, figure in series_of(run.evaluations, self.learned.name)]
        return not self.higher or max(learned, default=0.0) > FORGETTING_THRESHOLD

    @property
    def _decimals(self) -> int:
        return self.table.columns[0].decimals

    def _curves(self, group: str) -> list[dict[str, Any]]:
        charts = []
        for info in self.metrics.shown("report"):
            series, n_points = [], 0
            for row, runs in zip(self.table.rows, self.runs, strict=True):
                curve = mean_curve([series_of(run.evaluations, info.name) for run in runs])
                n_points = max(n_points, len(curve))
                if curve:
                    series.append(self._series(row, thinned(curve, MAX_POINTS)))
            if series:
                charts.append(
                    {
                        "id": f"{group}-{info.name}",
                        "kind": "curve",
                        "title": info.header,
                        "note": info.caption or info.summary,
                        "x": "edits",
                        "y": self.table.protocol.main_score if info.is_main_score else info.header,
                        "log": info.is_main_score and not self.higher,
                        "share": info.is_main_score and self.higher,
                        "thinned": n_points if n_points > MAX_POINTS else None,
                        "series": series,
                    }
                )
        return charts

    def _others(self, group: str) -> list[dict[str, Any]]:
        charts = [self._by_age(group), self._cost(group)]
        return [chart for chart in charts if chart["series"]]

    def _by_age(self, group: str) -> dict[str, Any]:
        edits = [[run.edits or () for run in runs] for runs in self.runs]
        width = age_width(max((edit.age for runs in edits for run in runs for edit in run), default=0))
        series = []
        for row, runs in zip(self.table.rows, edits, strict=True):
            bins = score_by_age(runs, width=width)
            if bins:
                points = [point for point, _ in bins.values()]
                spans = [_span(number * width, (number + 1) * width - 1) for number in bins]
                notes = [f"{span} edits ago, {n} edits" for span, (_, n) in zip(spans, bins.values(), strict=True)]
                series.append({**self._series(row, points), "note": notes})
        return {
            "id": f"{group}-age",
            "kind": "curve",
            "title": f"{self.edited.header} by age of the edit",
            "note": "score at the end against how many edits ago the edit was made: right is oldest",
            "x": f"edits made since, in bins of {width}" if width > 1 else "edits made since",
            "y": self.table.protocol.main_score,
            "log": not self.higher,
            "share": self.higher,
            "thinned": None,
            "series": series,
        }

    def _cost(self, group: str) -> dict[str, Any]:
        ranked_by = self.table.ranked_by
        series = []
        for row in self.table.rows:
            seconds, quality = row.cells.get("seconds_per_edit"), row.cells.get(ranked_by)
            if seconds is None or quality is None or seconds.mean <= 0:
                continue
            figures = [value for result in row.results if (value := result.metrics.get(ranked_by)) is not None]
            point = Point.of(seconds.mean, figures)
            series.append({**self._series(row, [point]), "note": [", ".join(self._cost_facts(row))]})
        return {
            "id": f"{group}-cost",
            "kind": "scatter",
            "title": "Cost against quality",
            "note": f"{ranked_by} at the end against the median time of an edit; bars from the worst seed to the best",
            "x": "seconds an edit (median)",
            "y": ranked_by if self.higher else f"{ranked_by} ({self.table.protocol.main_score}, lower is better)",
            "log": not self.higher,
            "share": self.higher,
            "thinned": None,
            "series": series,
        }

    def _cost_facts(self, row: Row) -> list[str]:
        seconds = row.cells.get("seconds_per_edit")
        counts = [
            f"{column.metric.text(row.cells[column.name].mean)} {column.header}"
            for column in self.table.columns
            if column.metric is not None and column.metric.is_cost and column.name in row.cells
        ]
        extra = max(result.cost.extra_parameters for result in row.results)
        return [
            *([f"{seconds.mean:.3g} s an edit (median)"] if seconds else []),
            *counts,
            f"{extra:,} numbers added to the model",
        ]

    def _series(self, row: Row, points: Sequence[Point]) -> dict[str, Any]:
        return {
            "label": self.index[row.name],
            "x": [_short(point.x) for point in points],
            "y": [_short(point.mean) for point in points],
            "low": [_short(point.low) for point in points],
            "high": [_short(point.high) for point in points],
            "n": [point.n for point in points],
        }

    def _run(self, row: Row, run: Run) -> dict[str, Any]:
        forgotten = worst_forgotten(run.edits or (), higher_is_better=self.higher)
        result = run.result
        return {
            "label": self.index[row.name],
            "name": row.name,
            "seed": result.seed,
            "id": result.run_id,
            "settings": _flat(result.editor.model_dump(mode="json", exclude={"name"})),
            "facts": {
                "model": _flat(result.model.model_dump(mode="json")),
                "stream": _flat(result.stream.model_dump(mode="json")),
                "protocol": _flat(result.protocol.model_dump(mode="json")),
                "cost": _flat(result.cost.model_dump(mode="json")),
                "environment": _flat(result.environment),
                "metrics at the end": _flat(result.metrics),
            },
            "config": run.config.splitlines(),
            "n_edits": int(result.metrics.get("n_edits") or 0),
            "n_forgotten": None if run.edits is None else len(forgotten),
            "forgotten": [self._edit(edit) for edit in forgotten[:MAX_FORGOTTEN]],
        }

    def _edit(self, edit: KeptEdit) -> dict[str, Any]:
        return {
            "id": _clipped(edit.id),
            "n_edits": edit.n_edits,
            "age": edit.age,
            "prompt": _clipped(edit.prompt or ""),
            "target": _clipped(edit.target or ""),
            "texts": [_clipped(text or "") for text in (edit.before_text, edit.after_text, edit.end_text)],
            "score_after": f"{edit.score_after:.{self._decimals}f}",
            "score_end": f"{edit.score_end:.{self._decimals}f}",
        }


def _names(table: Table) -> tuple[str, str]:
    return table.stream, ", ".join(table.models)


def _onset(found: Sequence[int | None]) -> dict[str, Any]:
    """Returns when forgetting begins over the seeds, in words and as a number to sort by."""
    known = sorted(n for n in found if n is not None)
    if not known:
        return {"text": "never", "first": None}
    text = f"after {_span(known[0], known[-1])}"
    if len(found) > 1 and len(known) < len(found):
        text += f" ({len(known)} of {len(found)} seeds)"
    return {"text": text, "first": known[0]}


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _short(value: float) -> float | None:
    """Rounds to six digits, more than a screen shows."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _clipped(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT} more characters)"


def _flat(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in record.items()
    }
