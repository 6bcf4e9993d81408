"""`show` finds any request of a run, shows its answers by name, and says which file is not what it should be."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from grace_bench import run_benchmark
from grace_bench.analysis.show import show_request
from grace_bench.data.requests import EditRequest
from grace_bench.errors import UserError
from grace_bench.registry import STREAMS
from grace_bench.results.reading import read_edits
from grace_bench.results.schema import EditRecord

POINTS = ("(-1.2000, 1.8000)", "(-1.0000, 1.9000)")
"""The toy model says 1 to these."""


def run(folder: Path, *ids: str, editor: str = "ft", label_names: tuple[str, ...] = ()) -> None:
    """Asks for class 0 at points under these ids."""
    path = folder / "requests.jsonl"
    requests = [EditRequest(id=name, prompt=point, target=0) for name, point in zip(ids, POINTS, strict=False)]
    path.write_text("".join(request.model_dump_json() + "\n" for request in requests), encoding="utf-8")
    run_benchmark(
        STREAMS.get("jsonl")(path=str(path), task="classification", label_names=label_names),
        model="toy",
        layer="second",
        editor=editor,
        folder=folder,
    )


def told(capsys: pytest.CaptureFixture[str], folder: Path, name: str) -> list[str]:
    show_request(folder, name)
    return capsys.readouterr().out.split("\n")


@pytest.mark.parametrize("name", ["a b", "a\u2028b", "a\u0085b", "fact[0]", "[/b]", "Zürich: ¿qué?"], ids=ascii)
def test_a_request_is_found_by_its_id_whatever_characters_it_has(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "another", name, editor="none")
    index = {known: record.index for known, record in read_edits(tmp_path / "edits.jsonl").items()}
    assert set(index) == {"another", name}
    lines = told(capsys, tmp_path, name)
    assert any(line.rstrip().endswith(f", candidate {index[name]}") for line in lines)
    assert ["before", "1", "0.000"] in [line.split() for line in lines]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\u2028b", r"a\u2028b"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("[red]x[/red]", "[red]x[/red]"),
        ("[/b]", "[/b]"),
        ("\\[x]", "\\[x]"),
    ],
    ids=ascii,
)
def test_an_id_is_shown_letter_by_letter_on_one_line(
    name: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, name)
    assert told(capsys, tmp_path, name)[0].rstrip() == f"{shown}, candidate 0"


def test_why_an_edit_failed_is_shown_letter_by_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "values of shape [b, t] are not finite [/x]"
    record = EditRecord(
        index=0,
        id="p",
        was_error=True,
        edited=True,
        n_edits=1,
        before_text="above",
        after_text="above",
        score_before=0.0,
        score_after=0.0,
        failed=reason,
    )
    (tmp_path / "edits.jsonl").write_text(record.model_dump_json() + "\n", encoding="utf-8")
    assert any(line.rstrip().endswith(f"failed {reason}") for line in told(capsys, tmp_path, "p"))


def test_classes_are_shown_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "p", label_names=("below", "above"))
    lines = [line.split() for line in told(capsys, tmp_path, "p")]
    assert ["wanted", "below"] in lines
    assert ["before", "above", "0.000"] in lines
    assert ["after", "its", "edit", "below", "1.000"] in lines
    assert ["after", "1", "edits", "below", "1.000"] in lines


@pytest.mark.parametrize(
    "change",
    [
        {"drop": "request_id"},
        {"drop": "stream"},
        {"drop": "n_edits"},
        {"drop": "score"},
        {"drop": "text"},
        {"set": ("request_id", 7)},
        {"set": ("stream", 7)},
        {"set": ("n_edits", "many")},
        {"set": ("n_edits", None)},
        {"set": ("score", "good")},
        {"set": ("text", 7)},
    ],
    ids=str,
)
def test_predictions_without_the_right_columns_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, "p")
    path = tmp_path / "predictions.parquet"
    table = pd.read_parquet(path)
    if "drop" in change:
        table = table.drop(columns=change["drop"])
    else:
        name, value = change["set"]
        table[name] = value
    table.to_parquet(path)
    with pytest.raises(UserError) as caught:
        show_request(tmp_path, "p")
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert message.startswith(f"{path}: ")


def test_a_run_without_predictions_yet_shows_what_the_edit_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "p")
    (tmp_path / "predictions.parquet").unlink()
    lines = [line.split() for line in told(capsys, tmp_path, "p")]
    assert ["after", "its", "edit", "0", "1.000"] in lines
    assert not any(line[:2] == ["after", "1"] for line in lines)
