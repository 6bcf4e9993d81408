"""atlas-drift: its table, its splits and its shipped model."""

import csv
import json
from collections import defaultdict
from datetime import date, timedelta
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open

from grace_bench.models.editable import EditableModel
from grace_bench.registry import STREAMS
from grace_bench.streams import EditRequest, StreamData, atlas_drift
from helpers import module_at

ROOT = Path(__file__).parents[2]
CHECKPOINT = Path(atlas_drift.__file__).parent / "checkpoints" / "atlas-drift"
CHANGES = ROOT.parent / "shared" / "data" / "cldr_currency_changes.jsonl"
DERIVED_FROM_BABEL = "2.18.0"

Tenders = dict[str, list[tuple[str, str, str]]]


@pytest.fixture(scope="module")
def data() -> StreamData:
    return atlas_drift.AtlasDrift().load()


@pytest.fixture(scope="module")
def tenders() -> Tenders:
    """English name of a place to currency, first and last day."""
    found = defaultdict(list)
    with atlas_drift.TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            span = row["currency_name"], row["valid_from"] or "0000", row["valid_to"] or "9999"
            found[row["territory_name"]].append(span)
    return found


def valid_on(tenders: Tenders, place: str, day: date) -> set[str]:
    return {name for name, first, last in tenders[place] if first <= day.isoformat() <= last}


def script() -> ModuleType:
    return module_at(ROOT / "scripts" / "derive_atlas_drift.py")


def test_the_script_reproduces_the_table_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        installed = version("babel")
    except PackageNotFoundError:
        pytest.skip("babel is not installed")
    if installed != DERIVED_FROM_BABEL:
        pytest.skip(f"the table was derived from babel {DERIVED_FROM_BABEL}, {installed} is installed")
    out = tmp_path / "table.csv"
    monkeypatch.setattr("sys.argv", ["derive_atlas_drift.py", str(out)])
    script().main()
    assert out.read_bytes() == atlas_drift.TABLE.read_bytes()


def test_there_are_enough_requests_of_each_kind(data: StreamData) -> None:
    assert len(data.edits) >= 400
    assert len(data.holdout) >= 400
    assert 500 <= len(data.upstream) <= 1000
    assert len(data.validation) >= 100
    assert len(data.train) >= 100


def test_every_label_is_the_only_legal_tender_on_every_day_of_the_year(data: StreamData, tenders: Tenders) -> None:
    asked = {
        (request.subject, request.metadata["year"], data.label_names[int(request.target)])
        for requests in (data.edits, data.holdout, data.validation, data.train, data.upstream)
        for request in requests
    }
    for place, year, currency in asked:
        day = date(year, 1, 1)
        while day.year == year:
            assert valid_on(tenders, str(place), day) == {currency}, (place, day)
            day += timedelta(days=1)


def test_the_stream_asks_for_what_came_after_the_era_and_differs_from_it(data: StreamData, tenders: Tenders) -> None:
    for request in (*data.edits, *data.holdout, *data.validation, *data.train):
        assert request.metadata["year"] > max(atlas_drift.ERA)
        assert data.label_names[int(request.target)] not in valid_on(tenders, str(request.subject), date(1990, 7, 1))
    assert {request.metadata["year"] for request in data.upstream} <= set(atlas_drift.ERA)


def test_the_euro_is_a_label_that_the_era_never_used(data: StreamData) -> None:
    euro = data.label_names.index("Euro")
    assert len(set(data.label_names)) == len(data.label_names)
    assert sum(request.target == euro for request in data.edits) >= 100
    assert all(request.target != euro for request in data.upstream)


def test_prompts_name_place_and_year_in_at_least_six_phrasings(data: StreamData) -> None:
    requests = (*data.edits, *data.holdout, *data.upstream)
    for request in requests:
        assert request.subject
        assert request.subject in request.prompt
        assert str(request.metadata["year"]) in request.prompt
    phrasings = {
        r.prompt.replace(str(r.subject), "{place}").replace(str(r.metadata["year"]), "{year}") for r in requests
    }
    assert len(phrasings) >= 6


def test_the_holdout_asks_the_same_changes_in_other_years_and_other_phrasings(data: StreamData) -> None:
    def seen(requests: tuple[EditRequest, ...], what: int) -> dict[str, set[str]]:
        found = defaultdict(set)
        for request in requests:
            found[request.fact].add(request.id.split("/")[what])
        return found

    for part in (-2, -1):
        edits, holdout = seen(data.edits, part), seen(data.holdout, part)
        assert edits.keys() == holdout.keys()
        assert all(not edits[fact] & holdout[fact] for fact in edits)
    assert not {r.prompt for r in data.edits} & {r.prompt for r in data.holdout}


def test_no_place_is_in_two_of_edits_validation_and_train(data: StreamData) -> None:
    splits = [{request.subject for request in split} for split in (data.edits, data.validation, data.train)]
    assert all(not one & other for one, other in combinations(splits, 2))


def test_every_load_gives_the_same_requests_with_ids_of_their_own(data: StreamData) -> None:
    assert data == atlas_drift.AtlasDrift().load()
    everything = (*data.edits, *data.holdout, *data.upstream, *data.validation, *data.train)
    assert len({request.id for request in everything}) == len(everything)


@pytest.mark.skipif(not CHANGES.is_file(), reason=f"the list of dated changes is not at {CHANGES}")
def test_every_change_is_in_an_independent_list_before_the_years_asked_about(data: StreamData) -> None:
    first_day: dict[tuple[str, str], str] = {}
    places = set()
    for line in CHANGES.read_text(encoding="utf-8").splitlines():
        change = json.loads(line)
        places.add(change["subject"])
        key = change["subject"], change["new"]
        first_day[key] = min(change["date"], first_day.get(key, "9999"))
    listed = [
        (r.metadata["year"], first_day.get((str(r.subject), data.label_names[int(r.target)])))
        for r in (*data.edits, *data.validation, *data.train)
    ]
    dated = [(year, day) for year, day in listed if day is not None]
    assert len(dated) >= 0.7 * len(listed)
    assert all(day < f"{year}-01-01" or day == f"{year}-01-01" for year, day in dated)


@pytest.mark.parametrize("name", ["upstream", "edits", "holdout", "validation", "train"])
def test_the_shipped_model_knows_its_era_and_not_what_came_after(data: StreamData, name: str) -> None:
    stream = STREAMS.get("atlas-drift")
    model = EditableModel.from_pretrained("atlas-drift", task=stream.task)
    requests = getattr(data, name)
    answers = [
        label
        for start in range(0, len(requests), 64)
        for label in model.logits(model.encode_batch([r.prompt for r in requests[start : start + 64]]))
        .argmax(dim=-1)
        .tolist()
    ]
    accuracy = sum(a == r.target for a, r in zip(answers, requests, strict=True)) / len(requests)
    figures = json.loads((CHECKPOINT / "figures.json").read_text(encoding="utf-8"))
    assert accuracy == pytest.approx(figures[f"{name}_accuracy"], abs=2.5 / len(requests))
    assert accuracy >= 0.95 if name == "upstream" else accuracy <= 0.4


def test_the_checkpoint_is_small_in_half_precision_and_reads_years_digit_by_digit() -> None:
    from transformers import AutoTokenizer

    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 3_000_000
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype.itemsize for name in weights.keys()} == {2}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Spain in 2004: which currency?")["input_ids"])
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    assert [token for token in tokens if token.isdigit()] == ["2", "0", "0", "4"]
    assert tokenizer.unk_token not in tokens
