"""One request of a run: the model's answers before its edit, after it, and at the end."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from grace_bench.common.terminal import table_console
from grace_bench.common.text import visible
from grace_bench.errors import UserError, did_you_mean
from grace_bench.results.reading import read_edits, read_predictions


def show_request(folder: Path, request_id: str) -> None:
    """Prints one candidate of a run.

    Raises:
        UserError: If the folder contains no run, or the run did not reach the request.
    """
    records = read_edits(folder / "edits.jsonl")
    record = records.get(request_id)
    if record is None:
        raise UserError(
            f"{folder}: no candidate '{request_id}' among {len(records)}{did_you_mean(request_id, records)}"
        )
    title = _visible(f"{record.id}, candidate {record.index}")
    table = Table("", "text", "score", box=None, title=title, title_justify="left")
    for what, text in (("prompt", record.prompt), ("wanted", record.target)):
        if text is not None:
            table.add_row(what, _visible(text))
    table.add_row("before", _visible(record.before_text), _score(record.score_before))
    if record.edited:
        table.add_row("after its edit", _visible(record.after_text), _score(record.score_after))
        last = _last_prediction(folder / "predictions.parquet", record.id)
        if last is not None:
            n_edits, score, text = last
            table.add_row(f"after {n_edits} edits", _visible(text), _score(score))
    console = table_console()
    console.print(table)
    if not record.edited:
        console.print("Not edited: the model, as edited so far, already answered it.")
        return
    facts = record.model_dump(include={"op", "key", "distance", "loss", "steps", "seconds", "failed"})
    shown = {"edit": record.n_edits} | {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in facts.items()}
    told = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
    console.print(_visible(told), highlight=False)


def _last_prediction(path: Path, request_id: str) -> tuple[int, float, str | None] | None:
    if not path.is_file():
        return None
    rows = read_predictions(
        path,
        columns=["n_edits", "score", "text"],
        filters=[("request_id", "=", request_id), ("stream", "=", "edited")],
    )
    if not rows:
        return None
    row = max(rows, key=lambda row: row["n_edits"])
    return row["n_edits"], row["score"], row["text"]


def _visible(text: str | None) -> Text:
    return Text("" if text is None else visible(text))


def _score(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}"
