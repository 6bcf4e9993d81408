"""Leaderboards: what a table says of runs, what it refuses to say, and how it is written down."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from grace_bench.analysis.leaderboard import Leaderboard, Row, Table, render
from grace_bench.errors import UserError
from grace_bench.results.reading import find_result_files, read_result
from grace_bench.results.schema import RunResult

QA_PROTOCOL = {
    "split": "edits",
    "main_score": "f1",
    "higher_is_better": True,
    "max_edits": 300,
    "eval_every": 50,
    "max_upstream": None,
    "max_new_tokens": 16,
    "query": "prefix",
    "prefix_length": 8,
}
PERPLEXITY = {"main_score": "perplexity", "higher_is_better": False}
SCORES = {"TRR": 0.9, "ERR": 0.8, "Avg": 0.85, "ES": 0.95, "Holdout": 0.2, "n_edits": 300.0, "n_keys": 80.0}


def run(
    editor: str = "grace",
    *,
    seed: int = 0,
    scores: dict[str, float | None] | None = None,
    stream: str = "atlas-qa",
    model: str = "atlas-qa",
    stream_fingerprint: str = "s0",
    model_fingerprint: str = "m0",
    layer: str = "encoder.block.1",
    protocol: dict[str, Any] | None = None,
    seconds: float | None = 0.25,
    before: dict[str, float] | None = None,
    extra_parameters: int = 10,
    run_id: str | None = None,
    **settings: Any,
) -> RunResult:
    record = {
        "run_id": run_id or "/".join([stream, model, editor, *(f"{k}={v}" for k, v in settings.items()), f"s{seed}"]),
        "stream": {
            "name": stream,
            "task": "qa",
            "fingerprint": stream_fingerprint,
            "n_candidates": 900,
            "source": "GeoNames",
            "revision": "1",
            "license": "CC-BY-4.0",
        },
        "model": {
            "name": model,
            "path": model,
            "fingerprint": model_fingerprint,
            "layer": layer,
            "dtype": "float32",
            "n_parameters": 1000,
        },
        "editor": {"name": editor, **settings},
        "protocol": {**QA_PROTOCOL, **(protocol or {})},
        "seed": seed,
        "before": {"TRR": 0.98, "Holdout": 0.1} if before is None else before,
        "metrics": {**SCORES, **(scores or {})},
        "cost": {
            "seconds_per_edit_p50": seconds,
            "seconds_per_edit_p95": seconds,
            "edit_seconds": 1.0,
            "eval_seconds": 1.0,
            "peak_rss_mb": 1.0,
            "peak_gpu_mb": None,
            "extra_parameters": extra_parameters,
        },
        "environment": {"python": "3.11"},
    }
    return RunResult.model_validate(record)


def only_table(*results: RunResult, by_stream: bool = False) -> Table:
    tables = Leaderboard(results, by_stream=by_stream).tables
    assert len(tables) == 1
    return tables[0]


def marked(table: Table, column_name: str) -> set[str]:
    column = next(column for column in table.columns if column.name == column_name)
    return {table.rows[index].name for index in table.best(column)}


def row_of(table: Table, name: str) -> Row:
    return next(row for row in table.rows if row.name == name)


def write(folder: Path, result: RunResult) -> Path:
    folder.mkdir(parents=True)
    path = folder / "result.json"
    path.write_text(result.model_dump_json(), encoding="utf-8")
    return path


# --- rows: means over seeds ------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_a_row_is_mean_and_sample_deviation_over_seeds(values: list[float]) -> None:
    table = only_table(*(run(seed=seed, scores={"ERR": value}) for seed, value in enumerate(values)))
    (row,) = table.rows
    assert row.seeds == tuple(range(len(values)))
    assert row.cells["ERR"].mean == pytest.approx(sum(values) / len(values), abs=1e-6)
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    assert row.cells["ERR"].std == pytest.approx(variance**0.5, abs=1e-6)
    assert row.cells["ERR"].n == len(values)


def test_one_run_has_no_deviation() -> None:
    (row,) = only_table(run()).rows
    assert {cell.std for cell in row.cells.values()} == {None}
    assert "±" not in str(render(Leaderboard([run()]), "markdown"))


def test_a_figure_that_some_seeds_lack_says_how_many_have_it() -> None:
    results = [run(seed=0), run(seed=1, scores={"Holdout": 0.4}), run(seed=2, scores={"Holdout": None})]
    (row,) = only_table(*results).rows
    assert (row.cells["Holdout"].mean, row.cells["Holdout"].n) == (pytest.approx(0.3), 2)
    assert row.cells["Holdout"].std == pytest.approx(statistics.stdev([0.2, 0.4]))
    assert "0.300 ± 0.141 (n=2)" in str(render(Leaderboard(results), "markdown"))


def test_a_score_that_is_no_number_is_missing_rather_than_zero() -> None:
    leaderboard = Leaderboard([run(scores={"TRR": float("nan"), "ERR": None, "ES": 0.0}, seconds=None)])
    (row,) = leaderboard.tables[0].rows
    assert not {"TRR", "ERR", "seconds_per_edit"} & row.cells.keys()
    line = str(render(leaderboard, "markdown")).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "grace", "–", "–", "0.850", "0.000", "0.200", "300", "80", "–", "–", "1"
    ]  # fmt: skip


def test_seeds_make_one_row_and_the_editors_own_seed_is_no_setting() -> None:
    table = only_table(*(run(seed=seed, eps_init=1.0, n_iter=100) for seed in (2, 0, 1)))
    assert [row.seeds for row in table.rows] == [(0, 1, 2)]
    results = [run(seed=seed).model_copy(deep=True) for seed in (0, 1)]
    for result in results:
        result.editor.__pydantic_extra__ = {"seed": result.seed}
    assert len(only_table(*results).rows) == 1


def test_rows_of_one_editor_are_told_apart_by_the_settings_that_differ() -> None:
    table = only_table(
        run(eps_init=1.0, lr=1.0, distance="euclidean"),
        run(eps_init=3.0, lr=1.0, distance="euclidean"),
        run(eps_init=3, lr=1.0, distance="euclidean", seed=1),
        run(eps_init=3.0, lr=1.0, distance="cosine"),
        run("ft", lr=0.01),
    )
    assert {row.name: len(row.seeds) for row in table.rows} == {
        "grace (eps_init=1.0, distance=euclidean)": 1,
        "grace (eps_init=3.0, distance=euclidean)": 2,
        "grace (eps_init=3.0, distance=cosine)": 1,
        "ft": 1,
    }


def test_a_setting_that_only_some_runs_have_is_named() -> None:
    table = only_table(run(), run(warm=True))
    assert {row.name for row in table.rows} == {"grace (warm=–)", "grace (warm=true)"}


def test_another_layer_is_another_row() -> None:
    table = only_table(run(layer="encoder.block.1"), run(layer="encoder.block.2"))
    assert {row.settings for row in table.rows} == {"layer=encoder.block.1", "layer=encoder.block.2"}


def test_the_tuning_budget_stands_in_the_table_and_keeps_rows_apart() -> None:
    results = [run(protocol={"tuning_budget": "20 trials"}), run("ft"), run(seed=1)]
    table = only_table(*results)
    assert sorted((row.editor, row.tuning_budget or "") for row in table.rows) == [
        ("ft", ""),
        ("grace", ""),
        ("grace", "20 trials"),
    ]
    assert "| 20 trials |" in str(render(Leaderboard(results), "markdown"))
    assert {row.name for row in table.rows} == {"ft", "grace (tuning_budget=20 trials)", "grace (tuning_budget=null)"}


def test_the_tuning_budget_is_no_part_of_a_name_that_other_settings_tell_apart() -> None:
    table = only_table(run(protocol={"tuning_budget": "20 trials"}, lr=1.0), run(lr=0.1))
    assert {row.name for row in table.rows} == {"grace (lr=1.0)", "grace (lr=0.1)"}


# --- order and marks -------------------------------------------------------------------------------------------------


def test_rows_are_ranked_by_avg() -> None:
    table = only_table(
        run("a", scores={"Avg": 0.5, "ERR": 0.99}), run("b", scores={"Avg": 0.9}), run("c", scores={"Avg": None})
    )
    assert table.ranked_by == "Avg"
    assert [row.editor for row in table.rows] == ["b", "a", "c"]


def test_perplexity_is_ranked_by_err_and_lower_is_better() -> None:
    def editor(name: str, err: float, trr: float) -> RunResult:
        return run(name, protocol=PERPLEXITY, scores={"Avg": None, "ERR": err, "TRR": trr, "ARR": 10.0})

    results = [editor("a", 80.123, 15.0), editor("b", 7.139, 16.0), editor("c", 9.0, 14.0)]
    table = only_table(*results)
    assert table.ranked_by == "ERR"
    assert [row.editor for row in table.rows] == ["b", "c", "a"]
    assert marked(table, "ERR") == {"b"}
    assert marked(table, "TRR") == {"c"}
    text = str(render(Leaderboard(results), "markdown"))
    assert "**7.14**" in text
    assert "lower is better" in text
    assert "80.12 " in text


def test_the_best_of_each_score_and_the_least_time_are_marked_and_counts_are_not() -> None:
    table = only_table(
        run("a", scores={"TRR": 0.9, "ERR": 0.3, "n_keys": 5.0, "n_edits": 200.0}, seconds=0.5),
        run("b", scores={"TRR": 0.8, "ERR": 0.4, "n_keys": 9.0}, seconds=0.2),
    )
    assert marked(table, "TRR") == {"a"}
    assert marked(table, "ERR") == {"b"}
    assert marked(table, "seconds_per_edit") == {"b"}
    assert marked(table, "n_keys") == marked(table, "n_edits") == set()


def test_figures_that_print_alike_are_marked_alike() -> None:
    table = only_table(run("a", scores={"TRR": 0.90012}), run("b", scores={"TRR": 0.9}), run("c", scores={"TRR": 0.8}))
    assert marked(table, "TRR") == {"a", "b"}


def test_a_row_without_competitors_is_not_the_best() -> None:
    assert marked(only_table(run()), "TRR") == set()
    assert marked(only_table(run("a"), run("b", scores={"TRR": None})), "TRR") == set()


def test_a_run_that_left_the_model_as_it_was_is_no_competitor() -> None:
    before = {"TRR": 0.98, "Holdout": 0.1}
    floor = run("none", before=before, scores={**before, "ERR": 0.0, "ES": 0.0}, extra_parameters=0, seconds=0.0)
    table = only_table(floor, run("a", scores={"TRR": 0.7}), run("b", scores={"TRR": 0.6}))
    assert row_of(table, "none").is_floor
    assert marked(table, "TRR") == {"a"}
    assert marked(table, "seconds_per_edit") == {"a", "b"}
    moved = run("ft", before=before, scores={"TRR": 0.97}, extra_parameters=0)
    assert not only_table(moved).rows[0].is_floor


def test_optional_scores_have_a_column_where_a_run_has_them() -> None:
    names = [column.name for column in only_table(run("a"), run("b", scores={"Locality": 0.5})).columns]
    assert "Locality" in names
    assert not {"ARR", "Portability"} & set(names)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_streams_never_share_a_table_and_models_share_one_by_stream() -> None:
    results = [
        run(),
        run(model="t5-small", model_fingerprint="m1"),
        run(stream="atlas-drift", stream_fingerprint="s1", protocol={"main_score": "accuracy"}),
    ]
    apart = Leaderboard(results).tables
    assert [(table.stream, table.models) for table in apart] == [
        ("atlas-drift", ("atlas-qa",)),
        ("atlas-qa", ("atlas-qa",)),
        ("atlas-qa", ("t5-small",)),
    ]
    together = Leaderboard(results, by_stream=True)
    assert [(table.stream, table.models) for table in together.tables] == [
        ("atlas-drift", ("atlas-qa",)),
        ("atlas-qa", ("atlas-qa", "t5-small")),
    ]
    assert "| Model | Editor |" in str(render(together, "markdown"))


# --- what was measured differently -----------------------------------------------------------------------------------


def conditions(leaderboard: Leaderboard) -> list[dict[str, str]]:
    return [dict(table.conditions) for table in leaderboard.tables]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("split", "validation"),
        ("order", "stream"),
        ("normalise", "strict"),
        ("main_score", "exact_match"),
        ("higher_is_better", False),
        ("max_edits", None),
        ("eval_every", 100),
        ("max_upstream", 50),
        ("max_new_tokens", 8),
        ("query", "last_token"),
        ("prefix_length", 4),
    ],
)
@pytest.mark.parametrize("by_stream", [False, True])
def test_runs_under_two_protocols_stand_in_two_tables_that_name_the_difference(
    field: str, value: Any, by_stream: bool
) -> None:
    one, two, odd = run("grace"), run("ft"), run("memory", model="other", protocol={field: value})
    leaderboard = Leaderboard([odd, one, two], by_stream=by_stream)
    assert [[row.editor for row in table.rows] for table in leaderboard.tables] == [["ft", "grace"], ["memory"]]
    usual = json.dumps(getattr(one.protocol, field))
    assert conditions(leaderboard) == [{f"protocol.{field}": usual}, {f"protocol.{field}": json.dumps(value)}]
    shown = as_terminal(leaderboard)
    assert f"atlas-qa · atlas-qa · protocol.{field}={usual} · " in shown
    assert f"atlas-qa · other · protocol.{field}={json.dumps(value)} · " in shown
    assert f"runs that differ in protocol.{field} stand in tables of their own" in shown


def test_one_odd_run_changes_nothing_in_the_table_of_the_others() -> None:
    others = [run("grace", seed=seed) for seed in (0, 1)] + [run("ft", scores={"Avg": 0.2})]
    alone = only_table(*others)
    odd = run("memory", protocol={"eval_every": 10}, scores={"Avg": 0.99})
    first, second = Leaderboard([odd, *others]).tables
    assert [row.cells for row in first.rows] == [row.cells for row in alone.rows]
    assert first.ranked_by == alone.ranked_by
    assert [row.editor for row in second.rows] == ["memory"]
    assert second.best(second.column("TRR")) == frozenset()


def test_every_format_tells_the_tables_apart() -> None:
    leaderboard = Leaderboard([run("grace"), run("ft"), run("ft", protocol={"eval_every": 10})])
    own, other = "protocol.eval_every=50", "protocol.eval_every=10"
    markdown, latex = (str(render(leaderboard, fmt)) for fmt in ("markdown", "latex"))
    for text in (markdown, latex):
        assert own.replace("_", r"\_") in text
        assert other.replace("_", r"\_") in text
    records = json.loads(str(render(leaderboard, "json")))
    found = [(record["editor"], record["conditions"], record["rank"]) for record in records if record["n_runs"]]
    assert sorted(found) == [("ft", other, 1), ("ft", own, 1), ("grace", own, 2)]
    assert [record["conditions"] for record in csv.DictReader(io.StringIO(str(render(leaderboard, "csv"))))] == [
        record["conditions"] for record in records
    ]
    assert "conditions" not in json.loads(str(render(Leaderboard([run()]), "json")))[0]


def test_another_content_of_a_stream_stands_in_a_table_of_its_own() -> None:
    contents = "ab" * 32, "cd" * 32
    found = conditions(Leaderboard([run(name, stream_fingerprint=content) for name, content in zip("xy", contents)]))  # noqa: B905
    assert found == [{"stream.fingerprint": f'"{content[:12]}…"'} for content in contents]


def test_the_same_requests_under_another_task_stand_in_a_table_of_their_own() -> None:
    one, two = run("a"), run("b")
    two = two.model_copy(update={"stream": two.stream.model_copy(update={"task": "completion"})})
    assert conditions(Leaderboard([one, two])) == [{"stream.task": '"qa"'}, {"stream.task": '"completion"'}]


def test_another_precision_of_a_model_is_named_rather_than_the_weights_that_follow_from_it() -> None:
    one, two = run("a"), run("b")
    model = two.model.model_copy(update={"dtype": "bfloat16", "fingerprint": "other"})
    found = conditions(Leaderboard([one, two.model_copy(update={"model": model})]))
    assert found == [{"model.dtype": '"float32"'}, {"model.dtype": '"bfloat16"'}]


def test_other_weights_under_one_model_name_stand_in_a_table_of_their_own() -> None:
    results = [run("a"), run("b", model_fingerprint="m9"), run("c", model="t5", model_fingerprint="t0")]
    apart = Leaderboard(results)
    assert [[row.editor for row in table.rows] for table in apart.tables] == [["a"], ["b"], ["c"]]
    together = Leaderboard(results, by_stream=True)
    assert [[row.editor for row in table.rows] for table in together.tables] == [["a", "c"], ["b"]]
    assert [set(found) for found in conditions(together)] == [{"model.fingerprint of atlas-qa"}] * 2


def test_every_field_that_differs_is_named() -> None:
    found = conditions(Leaderboard([run(), run("ft", protocol={"eval_every": 10, "prefix_length": 4})]))
    assert [set(fields) for fields in found] == [{"protocol.eval_every", "protocol.prefix_length"}] * 2


def test_the_value_of_a_field_stays_on_its_line() -> None:
    text = str(render(Leaderboard([run("a"), run("ft", stream_fingerprint="x\ny\x1b[2J")]), "markdown"))
    assert "\x1b" not in text
    assert r'"x\\ny\\u001b\[2J"' in text


def test_a_run_given_twice_counts_once() -> None:
    (row,) = only_table(run(seed=0), run(seed=1), run(seed=0)).rows
    assert row.seeds == (0, 1)


def write_with_config(folder: Path, result: RunResult, **options: Any) -> None:
    write(folder, result)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": result.seed, "out": str(folder), **options}))


def test_two_runs_that_differ_in_an_option_are_two_rows_that_name_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_with_config(tmp_path / f"small-{seed}", run(seed=seed, scores={"ERR": 0.7}, run_id="a"), batch_size=8)
    write_with_config(tmp_path / "large", run(seed=0, run_id="b"), batch_size=64)
    write_with_config(tmp_path / "ft", run("ft", seed=0), batch_size=64)
    (table,) = Leaderboard.read([tmp_path]).tables
    assert {row.name: row.seeds for row in table.rows} == {
        "grace (batch_size=8)": (0, 1),
        "grace (batch_size=64)": (0,),
        "ft": (0,),
    }
    assert row_of(table, "grace (batch_size=8)").cells["ERR"].mean == 0.7
    assert row_of(table, "grace (batch_size=64)").cells["ERR"].mean == 0.8
    assert table.left_out == ()


def test_options_that_differ_between_seeds_alone_keep_no_rows_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_with_config(tmp_path / str(seed), run(seed=seed), batch_size=8 * (seed + 1))
    (row,) = Leaderboard.read([tmp_path]).tables[0].rows
    assert (row.name, row.seeds) == ("grace", (0, 1))


def test_of_two_results_for_one_configuration_and_seed_the_first_is_shown_and_the_other_named(tmp_path: Path) -> None:
    write_with_config(tmp_path / "a", run(run_id="one"), batch_size=8)
    write_with_config(tmp_path / "b", run(run_id="two", scores={"ERR": 0.7}), batch_size=8)
    write_with_config(tmp_path / "c", run("ft"), batch_size=8)
    leaderboard = Leaderboard.read([tmp_path])
    (table,) = leaderboard.tables
    assert row_of(table, "grace").cells["ERR"].mean == 0.8
    reason = (
        f"run two in {tmp_path / 'b'}: has the settings and the seed (0) of one, but metrics.ERR is 0.7 instead of 0.8"
    )
    assert table.left_out == (reason,)
    assert f"left out: {reason}" in as_terminal(leaderboard, width=500)


def test_without_their_configurations_two_results_are_told_apart_by_what_the_results_say() -> None:
    table = only_table(run(run_id="one"), run(run_id="two"), run("ft"))
    assert [row.name for row in table.rows] == ["ft", "grace"]
    (reason,) = table.left_out
    assert reason.endswith('but run_id is "two" instead of "one"')


def test_no_runs_make_no_leaderboard() -> None:
    with pytest.raises(UserError, match="at least one"):
        Leaderboard([])


# --- finding results -------------------------------------------------------------------------------------------------


def found(*paths: Path) -> list[RunResult]:
    return [read_result(file) for file in find_result_files(paths)]


def test_results_are_found_by_file_by_run_folder_and_at_any_depth(tmp_path: Path) -> None:
    first, second = run(seed=0), run(seed=1)
    path = write(tmp_path / "runs" / "qa" / "h-s0", first)
    write(tmp_path / "runs" / "qa" / "deep" / "er" / "h-s1", second)
    assert found(path) == found(path.parent) == [first]
    assert sorted(result.seed for result in found(tmp_path)) == [0, 1]
    assert found(path, path.parent, tmp_path / "runs", tmp_path / "runs" / ".." / "runs")[0] == first
    assert len(found(path, path.parent, tmp_path / "runs", tmp_path / "runs" / ".." / "runs")) == 2


def test_the_inside_of_a_run_and_hidden_folders_are_not_searched(tmp_path: Path) -> None:
    write(tmp_path / "a", run(seed=0))
    write(tmp_path / "a" / "wandb" / "files", run(seed=1))
    write(tmp_path / ".old" / "a", run(seed=2))
    assert [result.seed for result in found(tmp_path)] == [0]
    assert [result.seed for result in found(tmp_path / ".old")] == [2]


def test_paths_without_results_are_refused_in_one_line(tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").write_text("")
    for path, reason in ((tmp_path / "nowhere", "no such file or folder"), (unfinished, "holds no finished run")):
        with pytest.raises(UserError) as caught:
            find_result_files([path])
        assert str(caught.value).startswith(f"{path}: {reason}")


def test_a_broken_result_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a", run())
    path.write_text(path.read_text().replace('"eval_every":50', '"eval_every":"often"'))
    with pytest.raises(UserError) as caught:
        Leaderboard.read([tmp_path])
    assert str(caught.value).startswith(f"{path}: field 'protocol.eval_every")


# --- formats ---------------------------------------------------------------------------------------------------------

NASTY = "a|b&c_d<e>\\f%g#h{i}~j^k[bold]l*m`n$o\x1b[31m\n\u202e"


def nasty() -> Leaderboard:
    return Leaderboard([run(NASTY, model=NASTY), run("ft", model="x"), run("b", model="x")], by_stream=True)


def as_terminal(leaderboard: Leaderboard, *, width: int = 250) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    console.print(render(leaderboard, "table"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_markdown_is_a_table_whose_cells_cannot_break_out() -> None:
    text = str(render(nasty(), "markdown"))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    unescaped = {line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines}
    assert len(lines) == 2 + 3
    assert len(unescaped) == 1
    assert r"a\|b&amp;c\_d&lt;e&gt;\\f%g\#h{i}\~j^k\[bold\]l\*m\`n\$o\\x1b\[31m\\n\\u202e" in text
    assert "\x1b" not in text


def test_latex_is_escaped() -> None:
    results = [run(NASTY, seed=seed, scores={"TRR": 0.9 + seed / 100}) for seed in (0, 1)]
    text = str(render(Leaderboard([*results, run("b", scores={"ERR": None})]), "latex"))
    escaped = (
        r"a\textbar{}b\&c\_d\textless{}e\textgreater{}\textbackslash{}f\%g\#h\{i\}\textasciitilde{}"
        r"j\textasciicircum{}k[bold]l*m`n\$o\textbackslash{}x1b[31m\textbackslash{}n\textbackslash{}u202e"
    )
    assert f"\n{escaped} & " in text
    assert r"\textbf{0.905 $\pm$ 0.007}" in text
    assert "& -- &" in text
    body = text.partition(r"\midrule")[2].rpartition(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {4}
    assert text.isascii() or "·" not in text


def latex_rows(text: str) -> dict[str, str]:
    """The cells of a LaTeX table by method, with spaces between."""
    body = text.partition("\\midrule\n")[2].partition("\\bottomrule")[0]
    cells = [line.removesuffix(r" \\").split(" & ") for line in body.splitlines()]
    return {method: " ".join(figures) for method, *figures in cells}


def test_latex_is_one_table_of_methods_by_streams_as_in_the_paper() -> None:
    perplexity: dict[str, Any] = {"protocol": PERPLEXITY, "stream": "hallucination", "model": "gpt2"}
    results = [
        run("ft", scores={"Avg": 0.3, "TRR": 0.2}),
        run("grace"),
        run("grace", scores={"Avg": None, "ERR": 7.14, "TRR": 15.84, "ARR": 10.0, "n_edits": 1392.0}, **perplexity),
        run("memory", scores={"Avg": None, "ERR": 9.5, "TRR": 20.0, "ARR": None}, **perplexity),
    ]
    text = str(render(Leaderboard(results), "latex"))
    lines = text.splitlines()
    assert r"\begin{tabular}{lrrrrrrrr}" in lines
    titles = next(line for line in lines if "multicolumn" in line)
    assert r"\multicolumn{4}{c}{atlas-qa (atlas-qa; f1 $\uparrow$)}" in titles
    assert r"\multicolumn{4}{c}{hallucination (gpt2; perplexity $\downarrow$)}" in titles
    assert r"\cmidrule(lr){2-5} \cmidrule(lr){6-9}" in lines
    assert r"Method & TRR & ERR & Avg. & \#E & TRR & ERR & ARR & \#E \\" in lines
    assert latex_rows(text) == {
        "grace": r"\textbf{0.900} \textbf{0.800} \textbf{0.850} 300 \textbf{15.84} \textbf{7.14} 10.00 1392",
        "ft": r"0.200 \textbf{0.800} ? 0.300 300 -- -- -- --",
        "memory": "-- -- -- -- 20.00 ? 9.50 -- 300",
    }


def test_the_caption_in_latex_tells_seeds_and_budgets() -> None:
    results = [run(seed=seed, protocol={"tuning_budget": "5 trials"}) for seed in (0, 1)]
    text = str(render(Leaderboard([*results, run("ft", scores={"Avg": 0.1})]), "latex"))
    assert "atlas-qa: n = 2 (grace), 1 (ft); tuning 5 trials (grace), -- (ft)." in text


@pytest.mark.parametrize("fmt", ["table", "markdown"])
def test_an_editor_without_a_run_on_a_stream_is_shown_as_missing_there(fmt: Any) -> None:
    leaderboard = Leaderboard([run("grace"), run("ft"), run("grace", stream="scotus"), run("a|b", stream="scotus")])
    assert [table.missing for table in leaderboard.tables] == [("a|b",), ("ft",)]
    shown = as_terminal(leaderboard) if fmt == "table" else str(render(leaderboard, "markdown"))
    assert "– no run here: ft" in shown
    assert r"– no run here: a\|b".replace("\\", "\\" if fmt == "markdown" else "") in shown


def test_the_terminal_shows_names_and_obeys_none() -> None:
    text = as_terminal(nasty())
    assert "[bold]" in text
    assert r"\x1b[31m" in text
    assert "\x1b[31m" not in text
    assert "\u202e" not in text


def test_the_terminal_marks_the_best_in_bold() -> None:
    text = as_terminal(Leaderboard([run("a", scores={"ERR": 0.123}), run("b", scores={"ERR": 0.456})]))
    assert "\x1b[1m0.456\x1b[0m" in text
    assert "\x1b[1m0.123" not in text


@pytest.mark.parametrize("width", [80, 100])
def test_in_a_narrow_terminal_no_figure_is_cut(width: int) -> None:
    optional = {"ARR": 0.5, "Locality": 0.625, "Portability": 0.75}
    results = [
        run(editor, seed=seed, scores={**optional, "TRR": 0.123 + seed / 10}, eps_init=radius)
        for editor, radius in (("grace", 1.0), ("grace", 3.0), ("ft", None))
        for seed in (0, 1)
    ]
    assert as_terminal(Leaderboard(results)).count("0.173 ±0.071") == 3
    text = Text.from_ansi(as_terminal(Leaderboard(results), width=width)).plain
    assert max(map(len, text.splitlines())) <= width
    for figure in (" 0.173", " ±0.071", " 0.500", " 0.625", " 0.750", " 300", " 80", " 0.250"):
        assert text.count(figure) == 3
    assert {"Portability", "s/edit", "tuning", "runs"} <= set(text.split())


def test_csv_and_json_carry_mean_deviation_and_n_at_full_precision() -> None:
    values = [0.1234567890123, 0.2345678901234, 0.9876543210987]
    results = [run(NASTY, seed=seed, scores={"ERR": value, "TRR": None}) for seed, value in enumerate(values)]
    results += [run("ft", stream="other", scores={"ARR": 0.5}, protocol={"tuning_budget": "5 trials"})]
    leaderboard = Leaderboard(results)
    from_json = json.loads(str(render(leaderboard, "json")))
    from_csv = list(csv.DictReader(io.StringIO(str(render(leaderboard, "csv")))))
    assert len(from_json) == len(from_csv) == 4
    assert list(from_json[0]) == list(from_json[1]) == list(from_csv[0])
    first, missing_there, second, missing_here = from_json
    assert (missing_there["stream"], missing_there["editor"]) == ("atlas-qa", "ft")
    assert (missing_here["stream"], missing_here["editor"]) == ("other", NASTY)
    for record in (missing_there, missing_here):
        assert (record["rank"], record["n_runs"], record["ERR_mean"], record["ERR_n"]) == (None, 0, None, 0)
    assert first["editor"] == NASTY
    assert (first["seeds"], from_csv[0]["seeds"]) == ([0, 1, 2], "0 1 2")
    for record in (first, from_csv[0]):
        assert float(record["ERR_mean"]) == statistics.fmean(values)
        assert float(record["ERR_std"]) == statistics.stdev(values)
        assert int(record["ERR_n"]) == 3
    assert (first["TRR_mean"], first["TRR_std"], first["TRR_n"]) == (None, None, 0)
    assert (from_csv[0]["TRR_mean"], from_csv[0]["ARR_mean"]) == ("", "")
    assert (second["ARR_mean"], second["ARR_std"], second["ARR_n"]) == (0.5, None, 1)
    assert second["tuning_budget"] == "5 trials"
    assert "\x1b" not in str(render(leaderboard, "csv"))
    assert str(render(leaderboard, "json")).isascii()


def test_an_unknown_format_is_answered_with_the_closest_one() -> None:
    with pytest.raises(UserError, match=r"format='markdwn' is not known; did you mean 'markdown'\?"):
        render(Leaderboard([run()]), "markdwn")  # type: ignore[arg-type]
