"""Gold answers of locality questions, kept where the unedited model's own answer is the target."""

import json
from pathlib import Path
from typing import Any

import pytest

from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.derived import probe_requests
from grace_bench.data.requests import EditRequest, Probe, content_of
from grace_bench.registry import STREAMS

RECORDS: dict[str, dict[str, Any]] = {
    "wikibigedit": {
        "prompt": "Where is Ormley?",
        "target_new": "Kent",
        "locality_prompt": "Where is Bure?",
        "locality_ground_truth": "Norfolk",
    },
    "qaedit": {
        "id": "1",
        "prompt": "Where is Ormley?",
        "target": "Kent",
        "locality": [{"loc": "Where is Bure?", "loc_ans": "Norfolk"}],
    },
    "counterfact": {
        "case_id": 1,
        "prompt": "Ormley is in",
        "target_new": "Kent",
        "subject": "Ormley",
        "ground_truth": "Essex",
        "locality_prompt": "Bure is in",
        "locality_ground_truth": "Norfolk",
    },
    "zsre": {
        "input": "Where is Ormley?",
        "subject": "Ormley",
        "src": "Where is Ormley?",
        "alt": "Kent",
        "answers": ["Essex"],
        "pred": "Essex",
        "rephrase": "In what county is Ormley?",
        "loc": "nq question: where is bure",
        "loc_ans": "Norfolk",
    },
}


def stream_of(name: str, folder: Path, **options: Any) -> Any:
    path = folder / f"{name}.json"
    path.write_text(json.dumps([RECORDS[name]]), encoding="utf-8")
    return STREAMS.get(name)(path=str(path), **options)


@pytest.mark.parametrize("name", RECORDS)
def test_a_locality_question_keeps_its_gold_answer_beside_the_unedited_models(name: str, tmp_path: Path) -> None:
    found = {}
    for target in ("unedited", "gold"):
        data = stream_of(name, tmp_path, locality_target=target).load()
        (found[target],) = probe_requests(data.edits, "locality")
    assert found["unedited"].target_from_model
    assert (found["unedited"].gold, found["unedited"].reference) == (("Norfolk",), "Norfolk")
    assert found["unedited"].answers == (), "a gold answer is not accepted in place of the unedited model's"
    assert (found["gold"].target, found["gold"].gold, found["gold"].target_from_model) == ("Norfolk", (), False)


def test_gold_answers_do_not_change_what_a_stream_is_known_by() -> None:
    plain = EditRequest(id="1", prompt="p", target="t", locality=(Probe(prompt="q"),))
    with_gold = plain.model_copy(update={"locality": (Probe(prompt="q", gold=("a",)),)})
    assert content_of(plain) == content_of(with_gold)
    assert Probe(prompt="q").model_dump() == {"prompt": "q", "target": None, "contrast": None, "metadata": {}}


def test_a_file_may_give_gold_answers(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    record = {"id": "1", "prompt": "p", "target": "t", "locality": [{"prompt": "q", "gold": ["a", "b"]}]}
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    stream = STREAMS.get("jsonl")(path=str(path), task="completion")
    (probe,) = probe_requests(EditBenchmark.from_stream(stream, seed=0).data.edits, "locality")
    assert probe.gold == ("a", "b")
