"""The summary of a finished run in two lines."""

from pathlib import Path

from grace_bench.results.metric_info import MetricInfo, metric_infos
from grace_bench.results.schema import RunResult


def summary(result: RunResult, folder: Path) -> str:
    """Returns the metrics of a run in one line, and its folder in a second."""
    metrics = metric_infos()
    shown = metrics.shown("summary")
    n_edits = result.metrics.get("n_edits")
    parts = [
        *(text for info in shown if not info.is_cost for text in _measured(info, result)),
        *([f"n_edits {n_edits:.0f}"] if n_edits is not None else []),
        *(text for info in shown if info.is_cost for text in _measured(info, result)),
    ]
    n_failed = result.metrics.get("n_failed")
    if n_failed:
        parts.append(f"{n_failed:.0f} {'edit' if n_failed == 1 else 'edits'} failed")
    upstream = metrics.mean_over("upstream").name
    if result.metrics.get(upstream) is None:
        parts.append(f"{upstream} none (no upstream data)")
    for reason, number in result.stream.left_out.items():
        parts.append(f"{number} {'record' if number == 1 else 'records'} left out ({reason})")
    return f"{result.editor.name} on {result.stream.name}: {', '.join(parts)}\n{folder}"


def _measured(info: MetricInfo, result: RunResult) -> list[str]:
    value = result.metrics.get(info.name)
    return [] if value is None else [f"{info.name} {info.text(value)}"]
