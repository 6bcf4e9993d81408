"""A user's own requests: what is read from a line, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from grace_bench.errors import UserError
from grace_bench.registry import STREAMS
from grace_bench.streams import Probe
from grace_bench.streams.jsonl import Jsonl

FULL: dict[str, Any] = {
    "id": "astana",
    "prompt": "The capital of Kazakhstan is",
    "target": "Astana",
    "answers": ["Nur-Sultan"],
    "subject": "Kazakhstan",
    "rephrases": ["Kazakhstan's capital is", "The seat of the Kazakh government is"],
    "locality": [
        {"prompt": "The capital of France is", "metadata": {}},
        {"prompt": "2 + 2 =", "target": "4", "contrast": ["4", "5"], "metadata": {}},
    ],
    "portability": [{"prompt": "The river of Kazakhstan's capital is", "target": "Ishim", "metadata": {}}],
    "fact": "capital/KZ",
    "metadata": {"seen": 3},
}


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def error_of(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        Jsonl(**options).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_of_a_request_is_read(tmp_path: Path) -> None:
    (request,) = Jsonl(path=write(tmp_path / "r.jsonl", FULL)).load().edits
    assert json.loads(request.model_dump_json(exclude_none=True)) == FULL
    assert request.locality[0] == Probe(prompt="The capital of France is", target=None)


def test_a_fact_and_a_contrast_may_stand_in_metadata(tmp_path: Path) -> None:
    older = {**FULL, "metadata": {"fact": "capital/KZ", "contrast": ["a", "b"]}}
    del older["fact"]
    (request,) = Jsonl(path=write(tmp_path / "r.jsonl", older)).load().edits
    assert (request.fact, request.contrast) == ("capital/KZ", ("a", "b"))


def test_requests_keep_the_order_of_the_file_and_three_fields_suffice(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *({"id": name, "prompt": "p", "target": name} for name in "cab"))
    data = Jsonl(path=path).load()
    assert [request.id for request in data.edits] == ["c", "a", "b"]
    assert data.upstream == data.holdout == ()


def requests(*prompts_and_targets: tuple[str, str], **fields: Any) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "prompt": prompt, "target": target, **fields}
        for i, (prompt, target) in enumerate(prompts_and_targets)
    ]


@pytest.mark.parametrize(
    ("records", "order"),
    [
        (requests(("p", "a"), ("q", "b")), "shuffle"),
        (requests(("p", "a"), ("p", "a")), "shuffle"),
        (requests(("p", "a"), ("p", "b")), "stream"),
        (requests(("p", "a"), ("q", "c"), ("r", "d"), ("p", "b")), "stream"),
        # For superseding these are two prompts as well.
        (requests(("p", "a"), ("P ", "b")), "shuffle"),
        # The same fact.
        (requests(("p", "a"), ("q", "a"), fact="f"), "shuffle"),
        (requests(("p", "a"), ("q", "b"), fact="f"), "stream"),
        (requests(("p", "a"), ("q", "b"), metadata={"fact": 3}), "stream"),
        ([*requests(("p", "a"), fact="1"), {"id": "1", "prompt": "q", "target": "b"}], "stream"),
        # Dates.
        *(
            (requests(("p", "a"), ("q", "b"), metadata={name: 0}), "stream")
            for name in ("date", "time", "timestamp", "time_step", "year")
        ),
        (requests(("p", "a"), ("q", "b"), metadata={"dates": "2019"}), "shuffle"),
        (requests(("p", "a"), ("q", "b"), metadata={"date": None}), "shuffle"),
        ([*requests(("p", "a"), metadata={"date": "2019"}), {"id": "1", "prompt": "q", "target": "b"}], "shuffle"),
    ],
)
def test_the_order_of_a_file_matters_if_requests_conflict_or_all_are_dated(
    tmp_path: Path, records: list[dict[str, Any]], order: str
) -> None:
    stream = Jsonl(path=write(tmp_path / "r.jsonl", *records))
    assert stream.default_order(stream.load()) == order
    assert stream.default_order(stream.load()) == order, "from the cache"


def test_running_texts_do_not_conflict_since_each_is_its_own_target(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *requests(("", "One text."), ("", "Another text."), fact="f"))
    stream = Jsonl(path=path, task="language_modelling")
    assert stream.default_order(stream.load()) == "shuffle"


@pytest.mark.parametrize(
    ("task", "normalise"),
    [("qa", "strict"), ("completion", "strict"), ("classification", "squad"), ("language_modelling", "squad")],
)
def test_answers_in_text_are_compared_strictly(tmp_path: Path, task: str, normalise: str) -> None:
    assert Jsonl(path=str(tmp_path), task=task).normalise == normalise


def test_the_holdout_asks_every_rephrase_about_the_same_fact_and_the_same_answers(tmp_path: Path) -> None:
    data = Jsonl(path=write(tmp_path / "r.jsonl", FULL)).load()
    assert [request.prompt for request in data.holdout] == FULL["rephrases"]
    assert {request.fact for request in data.holdout} == {"capital/KZ"}
    assert {(request.target, request.answers) for request in data.holdout} == {("Astana", ("Nur-Sultan",))}
    assert [request.subject for request in data.holdout] == ["Kazakhstan", None]


def test_without_a_fact_of_its_own_a_request_shares_its_id_with_its_rephrases(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"id": "x", "prompt": "p", "target": "t", "rephrases": ["q", "p"]})
    data = Jsonl(path=path).load()
    assert [(request.prompt, request.fact) for request in data.holdout] == [("q", "x")]


def test_upstream_is_read_from_its_own_file(tmp_path: Path) -> None:
    edits = write(tmp_path / "r.jsonl", FULL)
    upstream = write(tmp_path / "u.jsonl", {"id": "astana", "prompt": "p", "target": "t"})
    assert [r.prompt for r in Jsonl(path=edits, upstream_path=upstream).load().upstream] == ["p"]
    write(tmp_path / "u.jsonl", {"id": "u", "prompt": "p"})
    assert error_of(path=edits, upstream_path=upstream) == f"{upstream}:1: field 'target': is missing"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target": 3}, "field 'target': should be text for completion, not the number 3"),
        ({"target": " "}, "field 'target': is empty"),
        ({"prompt": ""}, "field 'prompt': is empty"),
        ({"id": ""}, "field 'id': is empty"),
        ({"subject": "kazakhstan"}, "field 'subject': does not occur in the prompt, letter by letter"),
        ({"subject": ""}, "field 'subject': is empty"),
        ({"rephrases": ["q", ""]}, "field 'rephrases[1]': is empty"),
        ({"rephrases": "q"}, "field 'rephrases': "),
        ({"answers": [1]}, "field 'answers[0]': should be text, not the number 1"),
        ({"locality": [{"prompt": "q", "target": 1}]}, "field 'locality[0].target': should be text"),
        ({"locality": [{"target": "a"}]}, "field 'locality[0].prompt': is missing"),
        ({"locality": ["q"]}, "field 'locality[0]': "),
        ({"metadata": {"contrast": "Astana"}}, "field 'metadata.contrast': should be a list of two texts"),
        ({"metadata": {"contrast": ["a", " "]}}, "field 'metadata.contrast': should be a list of two texts"),
        (
            {"portability": [{"prompt": "q", "target": "t", "metadata": {"contrast": ["a", 1]}}]},
            "field 'portability[0].metadata.contrast': should be a list of two texts",
        ),
        ({"group": ""}, "field 'group': is empty"),
        ({"step": 3}, "field 'step': should be text, not the number 3"),
        (
            {"locality": [{"prompt": "q", "answers": ["a"]}]},
            "field 'locality[0].target': is missing, while 'answers' is given",
        ),
        (
            {"portability": [{"prompt": "q", "target": "t", "answers": ["a", " "]}]},
            "field 'portability[0].answers[1]': is empty",
        ),
        ({"locallity": []}, "field 'locallity': is not a known field; did you mean 'locality'?"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused_with_its_line(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = write(tmp_path / "r.jsonl", {"id": "fine", "prompt": "p", "target": "t"}, {**FULL, **change})
    assert error_of(path=path).startswith(f"{path}:2: {says}")


def test_labels_are_numbers_that_have_a_name(tmp_path: Path) -> None:
    def options(target: Any) -> dict[str, Any]:
        path = write(tmp_path / "r.jsonl", {"id": "x", "prompt": "p", "target": target})
        return {"path": path, "task": "classification", "label_names": ["no", "yes"]}

    data = Jsonl(**options(1)).load()
    assert (data.edits[0].target, data.label_names) == (1, ("no", "yes"))
    assert "field 'target': is label 2, but labels are numbered 0 to 1" in error_of(**options(2))
    assert "field 'target': is label -1" in error_of(**options(-1))
    assert "field 'target': should be a label's number" in error_of(**options("yes"))
    assert "field 'target'" in error_of(**options(True))
    assert "field 'target'" in error_of(**options(1.0))


def test_labels_that_the_model_lacks_are_refused_with_their_line_and_field(tmp_path: Path) -> None:
    def error(**fields: Any) -> str:
        path = write(
            tmp_path / "r.jsonl", {"id": "a", "prompt": "p", "target": 1}, {"id": "b", "prompt": "p", **fields}
        )
        stream = Jsonl(path=path, task="classification")
        stream.n_model_labels = 2
        with pytest.raises(UserError) as caught:
            stream.load()
        return str(caught.value).removeprefix(path)

    assert error(target=25) == ":2: field 'target': label 25 is none of the model's 2 (0 to 1)"
    probe = {"prompt": "q", "target": 2}
    assert error(target=0, locality=[probe]).startswith(":2: field 'locality[0].target': label 2 is none of the")


def test_a_label_has_no_further_answers_in_a_probe_either(tmp_path: Path) -> None:
    probe = {"prompt": "q", "target": 1, "answers": ["yes"]}
    path = write(tmp_path / "r.jsonl", {"id": "x", "prompt": "p", "target": 1, "portability": [probe]})
    assert f"{path}:1: field 'portability[0].answers': is for tasks that answer in text" in error_of(
        path=path, task="classification"
    )


def test_running_text_needs_no_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"id": "x", "prompt": "", "target": "A whole text."})
    assert Jsonl(path=path, task="language_modelling").load().edits[0].target == "A whole text."
    assert error_of(path=path) == f"{path}:1: field 'prompt': is empty"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "stream.path="),
        ({"path": "x", "task": "clasification"}, "did you mean 'classification'?"),
        ({"path": "x", "label_names": ["a"]}, "stream.label_names="),
        ({"path": "x", "max_new_tokens": 0}, "stream.max_new_tokens=0"),
        ({"path": "x", "max_new_tokens": "many"}, "stream.max_new_tokens=many should be auto or a whole number"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], names: str) -> None:
    assert names in error_of(**options)


def test_the_stream_is_found_by_its_name() -> None:
    assert STREAMS.get("jsonl") is Jsonl
