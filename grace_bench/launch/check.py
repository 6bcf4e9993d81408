"""`grace-bench check`: whether finished runs still are what their results say (docs/reliability.md)."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grace_bench.common.files import hash_file
from grace_bench.common.terminal import table_console
from grace_bench.common.text import visible
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.stream import EditStream
from grace_bench.errors import UserError, reason_of
from grace_bench.launch.run_config import OPTIONS, YOUNG_DEFAULTS, RunConfig, hash_config, make_stream, setting_name
from grace_bench.launch.run_folder import read_plain_config
from grace_bench.models.editable import EditableModel
from grace_bench.models.loading import pick_device, pick_threads
from grace_bench.models.tasks.lookup import get_task
from grace_bench.registry import EDITORS, METRICS, STREAMS
from grace_bench.results.metric_info import MetricInfo, metric_infos
from grace_bench.results.reading import (
    RESULT_FILE,
    find_result_files,
    read_edits,
    read_evaluations,
    read_predictions,
    read_result,
)
from grace_bench.results.schema import RUN_FILES, EditRecord, Evaluation, RunResult, digest_of
from grace_bench.run.environment import describe_environment
from grace_bench.run.opening import fitted

Verdict = Literal["same", "differs", "not checked", "note"]

_STYLES: dict[Verdict, str] = {"same": "green", "differs": "bold red", "not checked": "yellow", "note": "dim"}
_SHOWN_DIGITS = 12
# A mean of recorded numbers depends on the order in which they are added, and on nothing else.
_ROUNDING = 1e-12
_ABSENT = object()
"""Stands for a value of which there is no record."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check of a run.

    Attributes:
        what: What was checked.
        verdict: `same` as recorded, `differs`, `not checked` where something the check needs is missing, or `note` for
            what may differ.
        told: The recorded value and the value now, or why it was not checked.
    """

    what: str
    verdict: Verdict
    told: str = ""

    @property
    def holds(self) -> bool:
        """Whether the recorded value still holds, or need not."""
        return self.verdict in ("same", "note")


def check_runs(paths: Sequence[Path]) -> int:
    """Checks finished runs and prints the findings, one per line.

    Args:
        paths: Run folders, or folders that hold some.

    Returns:
        0 if every recorded value was checked and holds, else 1.

    Raises:
        UserError: If a path holds no finished run; the others are checked all the same.
    """
    console, checker, holds = table_console(), Checker(), True
    failures: list[UserError] = []
    for path in paths:
        try:
            files = find_result_files([path])
        except UserError as error:
            failures.append(error)
            continue
        for file in files:
            findings = checker.check(file.parent)
            _print(console, file.parent, findings)
            holds = holds and all(finding.holds for finding in findings)
    if failures:
        others = f" (and {len(failures) - 1} more of the paths)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{others}")
    return 0 if holds else 1


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """The contents of a run's files; None for a file that cannot be read."""

    config: Mapping[str, Any] | None = None
    edits: list[EditRecord] | None = None
    evaluations: list[Evaluation] | None = None
    predictions: list[dict[str, Any]] | None = None


class Checker:
    """Checks run folders without changing them; the stream and model of one run are reused for the next of the kind.

    Of a reduced run everything is checked that its files tell; what they do not, and data and models that are not on
    this machine, are notes.
    """

    def __init__(self) -> None:
        self._stream: tuple[Any, EditBenchmark] | None = None
        self._model: tuple[Any, EditableModel] | None = None

    def check(self, folder: Path) -> list[Finding]:
        """Returns the findings on a finished run, in the order in which they are printed.

        Args:
            folder: The run folder.
        """
        try:
            result = read_result(folder / RESULT_FILE)
        except UserError as error:
            return [Finding(what=RESULT_FILE, verdict="differs", told=_reason(error, folder / RESULT_FILE))]
        findings = [*_sealed(result, folder)]
        contents = _Contents(**dict(_read_files(result, folder, findings)))
        model = None
        if contents.config is not None:
            findings += _configuration(result, contents.config)
            model = self._load_again(result, folder, contents, findings)
        else:
            why = "without a configuration it is unknown what to load"
            findings += [Finding(what=what, verdict="not checked", told=why) for what in ("stream", "model", "editor")]
        if contents.edits is not None:
            findings += _candidates(result, contents.edits)
        if contents.evaluations is not None:
            findings += _evaluations(result, contents.evaluations)
            if contents.edits is not None:
                findings.append(_right_after_edits(contents.edits, contents.evaluations))
            if contents.predictions is not None:
                # A reduced run has the predictions of its last evaluation.
                evaluations = contents.evaluations[-1:] if result.is_reduced else contents.evaluations
                findings += _predictions(result, evaluations, contents.predictions)
        findings += _environment(result, contents.config, model)
        return [_as_note(finding) for finding in findings] if result.is_reduced else findings

    def _load_again(
        self, result: RunResult, folder: Path, contents: _Contents, findings: list[Finding]
    ) -> EditableModel | None:
        """Compares the stream, the model and the saved editor, and returns the model."""
        assert contents.config is not None
        try:
            config = RunConfig.from_plain(contents.config)
            stream = make_stream(config)
        except Exception as error:  # The stream or editor may no longer be installed, or take other options.
            findings += [
                Finding(what=what, verdict="not checked", told=_in_words(error))
                for what in ("stream", "model", "editor")
            ]
            return None
        benchmark: EditBenchmark | None = None
        try:
            benchmark = self._benchmark(stream, config)
        except Exception as error:  # Reading data fails in as many ways as there are libraries under it.
            findings.append(Finding(what="stream", verdict="not checked", told=_in_words(error)))
        else:
            findings.append(_compared("stream", result.stream.fingerprint, benchmark.fingerprint))
            protocol = {
                "order": benchmark.order,
                "normalise": config.protocol.normalise or stream.normalise,
                "chat": config.chat.enabled or stream.chat,
            }
            recorded = {name: getattr(result.protocol, name) for name in protocol}
            findings.append(_compared("order, normalisation and chat", recorded, protocol))
        try:
            model = self._editable(stream, config)
            if benchmark is not None:
                # A model that lacks some labels may have been spared them.
                benchmark = fitted(benchmark, stream, model, seed=config.seed, split=config.split)
        except Exception as error:  # And so does loading weights.
            findings += [
                *_order(contents, benchmark),
                *(Finding(what=what, verdict="not checked", told=_in_words(error)) for what in ("model", "editor")),
            ]
            return None
        findings += _order(contents, benchmark)
        findings += _edited(result, contents, benchmark)
        findings.append(_compared("model", result.model.fingerprint, model.fingerprint))
        findings.append(_model_config(result, model))
        findings.append(_compared("layer", result.model.layer, model.layer_name))
        if result.is_reduced:
            findings.append(_configured_editor(result, config))
        else:
            findings.append(_saved_editor(result, folder, model))
        return model

    def _benchmark(self, stream: EditStream, config: RunConfig) -> EditBenchmark:
        key = (json.dumps(config.stream.node, default=str), config.seed, config.split, config.order)
        if self._stream is None or self._stream[0] != key:
            benchmark = EditBenchmark.from_stream(stream, seed=config.seed, split=config.split, order=config.order)
            self._stream = (key, benchmark)
        return self._stream[1]

    def _editable(self, stream: EditStream, config: RunConfig) -> EditableModel:
        name = str(config.model or stream.default_model)
        options = {option: getattr(config, option) for option in ("layer", "dtype", "device_map", "load_in")}
        key = (stream.task, name, json.dumps(options))
        if self._model is None or self._model[0] != key:
            # Not two at once.
            self._model = None
            # The hash is the same everywhere, and the device of the run may not be here.
            device = "cpu" if options["device_map"] is None else "auto"
            loaded = EditableModel.from_pretrained(name, task=get_task(stream.task), device=device, **options)
            self._model = (key, loaded)
        return self._model[1]


def _order(contents: _Contents, benchmark: EditBenchmark | None) -> Iterator[Finding]:
    if contents.edits is not None and benchmark is not None:
        given = [request.id for request in benchmark.data.edits[: len(contents.edits)]]
        yield _compared("order of the candidates", [record.id for record in contents.edits], given)


def _edited(result: RunResult, contents: _Contents, benchmark: EditBenchmark | None) -> Iterator[Finding]:
    """Whether a reduced run, which has no record of its candidates, scored edits that it can have made."""
    if result.is_reduced and contents.predictions is not None and benchmark is not None:
        reached = {request.id for request in benchmark.data.edits[: int(result.metrics.get("n_candidates") or 0)]}
        edited = {row["request_id"] for row in contents.predictions if row["stream"] == "edited"}
        yield _compared("edited requests that are no candidates", [], sorted(edited - reached))


def _sealed(result: RunResult, folder: Path) -> Iterator[Finding]:
    if result.digest is None:
        yield Finding(what=RESULT_FILE, verdict="note", told="no digest was recorded")
    else:
        yield _compared(RESULT_FILE, result.digest, digest_of(json.loads((folder / RESULT_FILE).read_bytes())))
    if result.reduced_from is not None:
        told = f"from the result with the digest {_shown(result.reduced_from)}"
        yield Finding(what="reduced", verdict="note", told=told)


def _as_note(finding: Finding) -> Finding:
    if finding.verdict != "not checked":
        return finding
    return replace(finding, verdict="note", told=f"not checked: {finding.told}")


def _read_files(result: RunResult, folder: Path, findings: list[Finding]) -> Iterator[tuple[str, Any]]:
    """Compares the run's files with their hashes, and yields the contents of those that can be read."""
    readers: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "config.yaml": ("config", read_plain_config),
        "edits.jsonl": ("edits", lambda path: [*read_edits(path).values()]),
        "metrics.jsonl": ("evaluations", read_evaluations),
        "predictions.parquet": (
            "predictions",
            lambda path: read_predictions(path, columns=["n_edits", "stream", "request_id", "score"]),
        ),
    }
    for name in RUN_FILES:
        path, recorded = folder / name, result.files.get(name)
        if not path.is_file():
            # A run that was started from Python has no configuration.
            is_missing = recorded is not None or not (name == "config.yaml" or result.is_reduced)
            told = "is not there" if is_missing or not result.is_reduced else "left out of a reduced run"
            findings.append(Finding(what=name, verdict="differs" if is_missing else "note", told=told))
            continue
        try:
            if name in readers:
                field, read = readers[name]
                yield field, read(path)
        except UserError as error:
            findings.append(Finding(what=name, verdict="differs", told=_reason(error, path)))
            continue
        if recorded is None:
            findings.append(Finding(what=name, verdict="note", told="no hash was recorded"))
        else:
            findings.append(_compared(name, recorded, hash_file(path)))


def _configuration(result: RunResult, config: Mapping[str, Any]) -> Iterator[Finding]:
    # Results that do not record the hash have its first digits in their id.
    digits = re.search(r"(?:^|/)([0-9a-f]{8})-s\d+$", result.run_id)
    recorded = result.configuration or (digits[1] if digits else None)
    if recorded is None:
        yield Finding(what="configuration", verdict="note", told="no hash was recorded")
    else:
        yield _compared("configuration", recorded, hash_config(config)[: len(recorded)])
    protocol = result.protocol.model_dump()
    settings = {"seed": result.seed}
    settings |= {name: protocol[setting_name(name)] for name, option in OPTIONS.items() if option.in_protocol}
    yield _compared("settings", settings, {name: _option_of(config, name) for name in settings})


def _option_of(config: Mapping[str, Any], name: str) -> Any:
    """The value of an option, by the name that is typed; a younger option may be missing and then has its default."""
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return YOUNG_DEFAULTS.get(name)
        value = value[part]
    return value


def _model_config(result: RunResult, model: EditableModel) -> Finding:
    what = "model's configuration and tokenizer"
    if result.model.config_fingerprint is None:
        return Finding(what=what, verdict="note", told="no hash was recorded")
    return _compared(what, result.model.config_fingerprint, model.config_fingerprint)


def _saved_editor(result: RunResult, folder: Path, model: EditableModel) -> Finding:
    """Whether the saved editor opens on the model, with the settings that the result records."""
    name = result.editor.name
    try:
        with EDITORS.get(name).from_pretrained(folder / "editor", model=model) as editor:
            settings = json.loads(json.dumps({"name": name, **editor.settings()}, default=str))
    except UserError as error:
        return Finding(what="editor", verdict="differs", told=_reason(error, folder / "editor"))
    recorded = json.loads(result.editor.model_dump_json())
    # The editor may have gained settings since.
    return _compared("editor", recorded, {option: settings.get(option) for option in recorded})


def _configured_editor(result: RunResult, config: RunConfig) -> Finding:
    """Whether the settings of an editor that is not saved are those of the configuration; null there is a default."""
    given = {name: value for name, value in config.editor.settings.items() if value is not None}
    recorded = json.loads(result.editor.model_dump_json())
    shared = {"name": config.editor.name, **{name: value for name, value in given.items() if name in recorded}}
    return _compared("editor, from config.yaml", {name: recorded[name] for name in shared}, shared)


def _candidates(result: RunResult, edits: Sequence[EditRecord]) -> Iterator[Finding]:
    edited = [record for record in edits if record.edited]
    n_edits = [*accumulate(int(record.edited) for record in edits)]
    if result.protocol.edits_at_once > 1:
        # An editor of batches has made all edits of a batch before the first of them is recorded.
        batches = [[*batch] for _, batch in groupby(edits, key=lambda record: record.n_edits)]
        ends = accumulate(sum(record.edited for record in batch) for batch in batches)
        n_edits = [end for end, batch in zip(ends, batches, strict=True) for _ in batch]
    yield _compared("index of each candidate", [record.index for record in edits], [*range(len(edits))])
    yield _compared("n_edits of each candidate", [record.n_edits for record in edits], n_edits)
    counted = {
        "n_candidates": len(edits),
        "n_edits": len(edited),
        "n_failed": sum(record.failed is not None for record in edited),
    }
    yield _compared("counts", {name: result.metrics.get(name) for name in counted}, counted)
    seconds = [record.seconds for record in edited]
    p50, p95 = np.quantile(seconds, [0.5, 0.95]).tolist() if seconds else (None, None)
    times = {"edit_seconds": sum(seconds), "seconds_per_edit_p50": p50, "seconds_per_edit_p95": p95}
    yield _compared("seconds of the edits", {name: getattr(result.cost, name) for name in times}, times)


def _evaluations(result: RunResult, evaluations: Sequence[Evaluation]) -> Iterator[Finding]:
    n_edits, every = int(result.metrics.get("n_edits") or 0), result.protocol.eval_every
    found = [evaluation.n_edits for evaluation in evaluations]
    if every == "step" or result.protocol.edits_at_once > 1:
        # An evaluation waits for the end of a batch or a time step, which the run folder does not name.
        clocks = sorted({0, *(n for n in found if 0 < n < n_edits), n_edits})
    else:
        clocks = sorted({*range(0, n_edits + 1, every), n_edits})
    yield _compared("evaluations", found, clocks)
    own = {name for name, entry in METRICS.entries().items() if entry.origin == "grace_bench"}
    for what, recorded, of in (
        ("before", result.before, evaluations[:1]),
        ("metrics", result.metrics, evaluations[-1:]),
    ):
        line = dict(of[0].metrics) if of else {}
        # What is absent from the one is null in the other; a metric from elsewhere may count on after the last line.
        names = [name for name in dict.fromkeys([*recorded, *line]) if name.partition("/")[0] in own]
        yield _compared(what, {name: recorded.get(name) for name in names}, {name: line.get(name) for name in names})


def _right_after_edits(edits: Sequence[EditRecord], evaluations: Sequence[Evaluation]) -> Finding:
    scores = [(record.n_edits, record.score_after) for record in edits if record.edited]
    now = {}
    for evaluation in evaluations:
        known = [score for n, score in scores if n <= evaluation.n_edits and score is not None]
        now[evaluation.n_edits] = fmean(known) if known else None
    name = metric_infos().right_after_edit.name
    return _compared(f"{name}, from edits.jsonl", _over_time(name, evaluations), now)


def _predictions(
    result: RunResult, evaluations: Sequence[Evaluation], rows: Iterable[Mapping[str, Any]]
) -> Iterator[Finding]:
    scores: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    sizes: Counter[tuple[int, str]] = Counter()
    for row in rows:
        where = (row["n_edits"], row["stream"])
        sizes[where] += 1
        if row["score"] is not None and not math.isnan(row["score"]):
            scores[where].append(row["score"])
    n_edits = [evaluation.n_edits for evaluation in evaluations]
    metrics = metric_infos()
    means = {info.name for info in metrics if info.is_mean}
    # An evaluation without a mean had nothing to score, as before the first edit of a run without upstream data.
    scored = [evaluation.n_edits for evaluation in evaluations if means & evaluation.metrics.keys()]
    yield _compared("evaluations of predictions.parquet", scored, sorted({n for n, _ in sizes}))
    for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics):
        info = metrics.get(name)
        if info is not None and info.is_mean and info.stream is not None:
            now = {n: fmean(scores[n, info.stream]) if scores[n, info.stream] else None for n in n_edits}
            yield _compared(f"{name}, from predictions.parquet", _over_time(name, evaluations), now)
    for info in metrics:
        if info.averages:
            yield _average(info, evaluations)
    n_kept = sizes[n_edits[-1], "edited"] if n_edits else 0
    n_made, n_superseded = (int(result.metrics.get(name) or 0) for name in ("n_edits", "n_superseded"))
    what = f"edited requests that {metrics.mean_over('edited').name} is taken over"
    yield _compared(what, n_made - n_superseded, n_kept)


def _average(info: MetricInfo, evaluations: Sequence[Evaluation]) -> Finding:
    recorded = {n: value for n, value in _over_time(info.name, evaluations).items() if value is not None}
    parts = [_over_time(name, evaluations) for name in info.averages]
    known = {n: [value for part in parts if (value := part[n]) is not None] for n in recorded}
    now = {n: fmean(values) if len(values) == len(parts) else None for n, values in known.items()}
    return _compared(f"{info.name}, from {' and '.join(info.averages)}", recorded, now)


def _over_time(name: str, evaluations: Sequence[Evaluation]) -> dict[int, float | None]:
    """A metric at every evaluation, by the number of edits."""
    return {evaluation.n_edits: evaluation.metrics.get(name) for evaluation in evaluations}


def _environment(result: RunResult, config: Mapping[str, Any] | None, model: EditableModel | None) -> Iterator[Finding]:
    device, threads = pick_device("auto"), torch.get_num_threads()
    # The device that the run asked for may not be on this machine.
    with suppress(UserError):
        device = pick_device("auto" if config is None else config.get("device", "auto"))
    with suppress(UserError):
        threads = threads if config is None or model is None else pick_threads(model, config.get("threads", "auto"))
    now = describe_environment(device, threads=threads, classes=_parts(result))
    recorded = result.environment
    changed = {name: value for name, value in now.items() if name in recorded and recorded[name] != value}
    if not changed:
        yield Finding(what="environment", verdict="note", told="as when it ran")
    for name, value in changed.items():
        yield Finding(what=name, verdict="note", told=_difference(recorded[name], value))
    for name, value in recorded.get("before_resuming", {}).items():
        yield Finding(what=name, verdict="note", told=f"{_shown(value)} before the run was resumed")


def _parts(result: RunResult) -> Iterator[type]:
    """The classes of a run's stream, editor and metrics that are still registered."""
    wanted = (
        (EDITORS, result.editor.name),
        (STREAMS, result.stream.name),
        *((METRICS, name) for name in METRICS.entries()),
    )
    for registry, name in wanted:
        with suppress(UserError):
            yield registry.get(name)


def _compared(what: str, recorded: Any, now: Any) -> Finding:
    """Compares a recorded value with the value now; for lists and mappings, reports the first place that differs."""
    if _equal(recorded, now):
        return Finding(what=what, verdict="same", told=_shown(recorded) if isinstance(recorded, str) else "")
    where = ""
    if isinstance(recorded, list) and isinstance(now, list):
        if len(recorded) != len(now):
            return Finding(what=what, verdict="differs", told=_difference(f"{len(recorded)} items", f"{len(now)}"))
        where = "item "
        recorded, now = dict(enumerate(recorded)), dict(enumerate(now))
    if isinstance(recorded, Mapping) and isinstance(now, Mapping):
        pairs = {
            name: (recorded.get(name, _ABSENT), now.get(name, _ABSENT)) for name in dict.fromkeys([*recorded, *now])
        }
        different = [name for name, pair in pairs.items() if not _equal(*pair)]
        others = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        where += f"{different[0]}{others}: "
        recorded, now = pairs[different[0]]
    return Finding(what=what, verdict="differs", told=f"{where}{_difference(recorded, now)}")


def _equal(recorded: Any, now: Any) -> bool:
    if isinstance(recorded, Mapping) and isinstance(now, Mapping):
        return recorded.keys() == now.keys() and all(_equal(value, now[name]) for name, value in recorded.items())
    if isinstance(recorded, list) and isinstance(now, list):
        return len(recorded) == len(now) and all(map(_equal, recorded, now))
    # A score that is not a number is recorded as null.
    recorded, now = (None if isinstance(x, float) and not math.isfinite(x) else x for x in (recorded, now))
    # For Python, True equals 1.
    if isinstance(recorded, bool) or isinstance(now, bool):
        return recorded is now
    if isinstance(recorded, float) and isinstance(now, int | float):
        return math.isclose(recorded, now, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
    return bool(recorded == now)


def _difference(recorded: Any, now: Any) -> str:
    return f"recorded {_shown(recorded)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    """A value in a few characters; for a hash its first digits."""
    if value is _ABSENT:
        return "nothing"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,64}", value):
        return value[:_SHOWN_DIGITS]
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items()) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _reason(error: UserError, path: Path) -> str:
    """What is wrong with a file, without its name."""
    return str(error).removeprefix(str(path)).lstrip(": ")


def _in_words(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return f"{type(cause).__name__}: {reason_of(cause)}"


def _print(console: Console, folder: Path, findings: Sequence[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(Text(finding.verdict, style=_STYLES[finding.verdict]), finding.what, Text(visible(finding.told)))
    counts = Counter(finding.verdict for finding in findings)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _STYLES if counts[verdict] and verdict != "note")
    console.print(Text(visible(str(folder)), style="bold"), soft_wrap=True)
    console.print(table)
    console.print(f"{told}\n", highlight=False)
