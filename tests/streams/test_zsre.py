"""zsRE in the formats of MEND, EasyEdit and KnowEdit, on made-up records and on the real files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from grace_bench.data.benchmark import EditBenchmark
from grace_bench.errors import UserError
from grace_bench.models.tasks.text_scores import normalize_answer
from grace_bench.streams import Probe, StreamData
from grace_bench.streams.zsre import Zsre

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")


def changed(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**record, **changes}.items() if value is not ...}


def annotated(number: int, /, rephrases: int = 10, **changes: Any) -> dict[str, Any]:
    made = {
        "id": f"fact-{number}",
        "input": f"Where was Person{number} born?",
        "output": [{"answer": f"Town{number}", "provenance": [{"title": f"Person{number}"}]}],
        "meta": {"template_questions": []},
        "rephrases": ["never used"],
        "prediction": "Elsewhere",
        "alternatives": ["Elsewhere"],
        "filtered_rephrases": [f"Rephrase {index} of Person{number}'s birthplace?" for index in range(rephrases)],
    }
    return changed(made, changes)


def evaluation(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {
        "subject": f"Firm{number}",
        "src": f"What does Firm{number} make?",
        "pred": "uniforms",
        "rephrase": f"Which product is made by Firm{number}?",
        "alt": "aircraft",
        "answers": ["uniforms", "shirts"],
        "loc": f"nq question: who founded town {number}",
        "loc_ans": f"Founder{number}",
        "cond": "uniforms >> aircraft",
    }
    return changed(made, changes)


def easyedit(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {
        "subject": f"Genus{number}",
        "prompt": f"Which family does Genus{number} belong to?",
        "target_new": "Noctuidae",
        "ground_truth": ["Aspidoceratidae"],
        "rephrase_prompt": f"What family are Genus{number}?",
        "cond": "Geometridae >> Noctuidae",
    }
    return changed(made, changes)


FORMATS = {"annotated": annotated, "evaluation": evaluation, "easyedit": easyedit}


def lines(folder: Path, *records: dict[str, Any], name: str = "zsre.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def pairs(folder: Path, *, count: int = 3) -> str:
    return lines(folder, *({"question": f"q{i}", "answer": [f"a{i}", f"b{i}"]} for i in range(count)), name="nq.jsonl")


def load(folder: Path, *records: dict[str, Any], **options: Any) -> StreamData:
    if "upstream_path" not in options:
        options["upstream_path"] = pairs(folder)
    return Zsre(path=lines(folder, *records), **options).load()


def error_of(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        Zsre(**options).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def official_split(records: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Splits as the description of the official code says, with numpy's global generator."""
    questions = []
    for record in records:
        answer = record["output"][0]["answer"]
        questions.append((record["input"], answer))
        if len(record["filtered_rephrases"]) >= 10:
            questions.extend((text, answer) for text in record["filtered_rephrases"][:10])
    count = min(10_000, len(questions))
    state = np.random.get_state()
    np.random.seed(42)
    order = np.random.choice(count, count, replace=False)
    np.random.set_state(state)
    return [questions[i] for i in order[: count // 2]], [questions[i] for i in order[count // 2 :]]


def asked(requests: Sequence[Any]) -> list[tuple[str, str]]:
    return [(request.prompt, request.target) for request in requests]


@pytest.mark.parametrize("rephrases", [[10, 9, 12], [0], [3, 10], [12] * 5])
def test_annotated_questions_are_split_as_the_official_code_splits_them(tmp_path: Path, rephrases: list[int]) -> None:
    records = [annotated(number, count) for number, count in enumerate([*rephrases, 0])]
    data = load(tmp_path, *records)
    assert (asked(data.edits), asked(data.holdout)) == official_split(records)


def test_only_the_first_ten_thousand_questions_are_split_and_facts_beyond_them_are_for_validation(
    tmp_path: Path,
) -> None:
    # 11 questions a fact: the 910th fact has one question on this side of the cut and ten beyond it.
    records = [annotated(number, 10 + number % 3) for number in range(1500)]
    data = load(tmp_path, *records)
    assert (asked(data.edits), asked(data.holdout)) == official_split(records)
    assert len(data.edits) == len(data.holdout) == 5_000
    used = {request.fact for request in (*data.edits, *data.holdout)}
    assert len(used) == 910
    assert [request.id for request in data.validation] == [f"fact-{number}" for number in range(910, 1410)]
    assert data.left_out == {"fact beyond the first 10,000 questions": 90}
    tuned = EditBenchmark.from_stream(
        Zsre(path=str(tmp_path / "zsre.jsonl"), upstream_path=str(tmp_path / "nq.jsonl")), seed=0, split="validation"
    ).data
    assert not {request.fact for request in (*tuned.edits, *tuned.holdout)} & used
    assert len(tuned.holdout) == 10 * len(tuned.edits)


def test_paraphrases_of_a_fact_lie_in_both_halves_and_name_their_fact(tmp_path: Path) -> None:
    data = load(tmp_path, *(annotated(number) for number in range(20)))
    both = {request.fact for request in data.edits} & {request.fact for request in data.holdout}
    assert both == {f"fact-{number}" for number in range(20)}
    requests = [*data.edits, *data.holdout]
    assert sorted(request.id for request in requests) == sorted(f"fact-{n}/{k}" for n in range(20) for k in range(11))
    by_id = {request.id: request for request in requests}
    assert by_id["fact-3/0"].prompt == "Where was Person3 born?"
    assert by_id["fact-3/4"].prompt == "Rephrase 3 of Person3's birthplace?"
    assert all(request.id.startswith(f"{request.fact}/") for request in requests)


def test_a_seed_orders_edits_and_never_changes_the_split(tmp_path: Path) -> None:
    stream = Zsre(path=lines(tmp_path, *(annotated(n) for n in range(20))), upstream_path=pairs(tmp_path))
    first, second = (EditBenchmark.from_stream(stream, seed=seed).data for seed in (0, 1))
    assert first.edits != second.edits
    assert {request.id for request in first.edits} == {request.id for request in second.edits}
    assert first.holdout == second.holdout


def test_the_target_is_the_first_output_and_no_other_models_prediction(tmp_path: Path) -> None:
    output = [{"answer": "Oslo"}, {"answer": "Christiania"}, {"provenance": []}, {"answer": "Oslo"}]
    data = load(tmp_path, annotated(0, 0, output=output, prediction="Bergen"), annotated(1, 0))
    (request,) = (request for request in (*data.edits, *data.holdout) if request.fact == "fact-0")
    assert (request.target, request.answers) == ("Oslo", ("Christiania",))
    assert "Bergen" not in request.model_dump_json()


def test_the_evaluation_format_edits_in_the_alternative(tmp_path: Path) -> None:
    (request,) = load(tmp_path, evaluation(7)).edits
    assert (request.prompt, request.target, request.answers) == ("What does Firm7 make?", "aircraft", ())
    assert (request.subject, request.rephrases) == ("Firm7", ("Which product is made by Firm7?",))
    assert request.metadata["ground_truth"] == ["uniforms", "shirts"]


def test_locality_asks_bare_questions_for_the_unedited_models_answer(tmp_path: Path) -> None:
    (request,) = load(tmp_path, evaluation(7)).edits
    (probe,) = request.locality
    assert (probe.prompt, probe.target) == ("who founded town 7", None)


def test_a_subject_that_is_not_in_its_prompt_is_dropped_and_its_record_kept(tmp_path: Path) -> None:
    data = load(tmp_path, evaluation(1, subject="firm1"), evaluation(2))
    assert [request.subject for request in data.edits] == [None, "Firm2"]


def test_a_record_needs_no_subject(tmp_path: Path) -> None:
    six = {name: evaluation(1)[name] for name in ("src", "rephrase", "alt", "answers", "loc", "loc_ans")}
    for record in (six, easyedit(1, subject=...), easyedit(1, subject=None)):
        (request,) = load(tmp_path, record).edits
        assert (request.id, request.subject) == ("1", None)


@pytest.mark.parametrize("alt", ["uniforms", "The Uniforms!", "shirts"])
def test_an_alternative_that_is_an_old_answer_is_left_out_and_counted(tmp_path: Path, alt: str) -> None:
    data = load(tmp_path, evaluation(1), evaluation(2, alt=alt), evaluation(3, alt=" "))
    assert [request.id for request in data.edits] == ["1"]
    assert data.left_out == {"the new answer is the old one": 1, "no new answer": 1}


def test_a_prediction_that_equals_the_answer_is_no_reason_to_leave_a_record_out(tmp_path: Path) -> None:
    data = load(tmp_path, evaluation(1, pred="uniforms"), evaluation(2, pred="aircraft"))
    assert len(data.edits) == 2


def test_the_holdout_never_asks_an_edited_question(tmp_path: Path) -> None:
    data = load(tmp_path, evaluation(1), evaluation(2, rephrase=evaluation(1)["src"]))
    assert [(request.prompt, request.fact) for request in data.holdout] == [("Which product is made by Firm1?", "1")]


def test_without_upstream_path_the_locality_questions_are_upstream_each_once_and_unedited(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        evaluation(1),
        evaluation(2, loc="nq question: who founded town 1"),
        evaluation(3, loc=evaluation(1)["src"]),
        evaluation(4, loc="no prefix"),
    )
    upstream = Zsre(path=path).load().upstream
    assert [(r.prompt, r.target) for r in upstream] == [("who founded town 1", "Founder1"), ("no prefix", "Founder4")]
    assert not any("target_from_model" in request.metadata for request in upstream)


def test_portability_is_read_in_the_evaluation_format(tmp_path: Path) -> None:
    one_hop = {"Recalled Relation": "(…)", "New Question": "Who flies what Firm1 makes?", "New Answer": "pilots"}
    (request,) = load(tmp_path, evaluation(1, portability=one_hop)).edits
    assert request.portability == (Probe(prompt="Who flies what Firm1 makes?", target="pilots"),)


def test_knowedits_nested_probes_are_read(tmp_path: Path) -> None:
    record = easyedit(
        1,
        locality={
            "Relation_Specificity": [
                {"prompt": "The taxon rank of Genus1 is", "ground_truth": ["genus"]},
                {"prompt": ["Genus1 taxon rank", "Genus1 rank"], "ground_truth": [["genus", "rank of genus"]]},
            ],
            "Forgetfulness": None,
        },
        portability={
            "Reasoning": [{"prompt": "The common name of Genus1's family is", "ground_truth": "Owlet moths"}],
            "Logical_Generalization": [{"prompt": "Is Genus1 a moth?", "ground_truth": [["yes", "true"], ["it is"]]}],
        },
    )
    data = Zsre(path=lines(tmp_path, record)).load()
    (request,) = data.edits
    assert (request.prompt, request.target) == ("Which family does Genus1 belong to?", "Noctuidae")
    assert request.metadata["ground_truth"] == ["Aspidoceratidae"]
    assert [(p.prompt, p.target) for p in request.locality] == [
        ("The taxon rank of Genus1 is", None),
        ("Genus1 taxon rank", None),
    ]
    assert [(p.prompt, p.target) for p in request.portability] == [
        ("The common name of Genus1's family is", "Owlet moths"),
        ("Is Genus1 a moth?", "yes"),
    ]
    assert [(r.prompt, r.target, r.answers) for r in data.upstream] == [
        ("The taxon rank of Genus1 is", "genus", ()),
        ("Genus1 taxon rank", "genus", ("rank of genus",)),
    ]


def test_fever_is_read_as_malmen_and_ultraedit_have_it(tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "prompt": "Person1 wrote Book1.",
        "alt": "REFUTES",
        "equiv_prompt": ["Book1 was written by Person1.", "Person1 is the author of Book1."],
        "unrel_prompt": "Person2 is a poet.",
        "unrel_ans": "SUPPORTS",
        "pred": "SUPPORTS",
    }
    data = Zsre(path=lines(tmp_path, record), task="completion", locality_target="gold").load()
    (request,) = data.edits
    assert (request.prompt, request.target, list(request.rephrases)) == (
        record["prompt"],
        "REFUTES",
        record["equiv_prompt"],
    )
    assert [(probe.prompt, probe.target) for probe in request.locality] == [("Person2 is a poet.", "SUPPORTS")]
    del record["unrel_ans"]
    assert error_of(path=lines(tmp_path, record)).endswith(":1: field 'unrel_ans': is missing")


def test_a_portability_question_without_an_answer_is_left_out_and_its_record_kept(tmp_path: Path) -> None:
    asked = [{"prompt": "a?", "ground_truth": []}, {"prompt": "b?", "ground_truth": ["b"]}]
    asked += [{"prompt": "c?", "ground_truth": [[]]}, {"prompt": "d?", "ground_truth": " "}]
    data = load(tmp_path, easyedit(1, portability={"Reasoning": asked}, locality={"Forgetfulness": asked}))
    (request,) = data.edits
    assert request.portability == (Probe(prompt="b?", target="b"),)
    # Locality asks for the unedited model's answer, which there is.
    assert [probe.prompt for probe in request.locality] == ["a?", "b?", "c?", "d?"]
    assert [r.prompt for r in Zsre(path=lines(tmp_path, easyedit(1, locality={"K": asked}))).load().upstream] == ["b?"]


def test_easyedits_flat_fields_are_read_and_all_but_three_are_optional(tmp_path: Path) -> None:
    flat = easyedit(
        1,
        ground_truth="Aspidoceratidae",
        rephrase_prompt=...,
        rephrase=["A?", "B?"],
        locality_prompt="nq question: who founded rome",
        locality_ground_truth="Romulus",
        case_id=17,
    )
    bare = {"prompt": "Which family is it?", "target_new": "Noctuidae", "subject": "it"}
    data = Zsre(path=lines(tmp_path, flat, bare)).load()
    assert [request.id for request in data.edits] == ["1", "2"]
    assert data.edits[0].rephrases == ("A?", "B?")
    assert [(r.prompt, r.target) for r in data.upstream] == [("who founded rome", "Romulus")]
    assert (data.edits[1].rephrases, data.edits[1].locality, data.edits[1].portability) == ((), (), ())


@pytest.mark.parametrize("old", ["noctuidae", ["x", "Noctuidae."], [["The Noctuidae"]]])
def test_easyedits_new_answer_must_be_new_too(tmp_path: Path, old: Any) -> None:
    data = load(tmp_path, easyedit(1), easyedit(2, ground_truth=old))
    assert [request.id for request in data.edits] == ["1"]
    assert data.left_out == {"the new answer is the old one": 1}


def test_upstream_is_the_first_thousand_pairs_and_further_answers_are_accepted(tmp_path: Path) -> None:
    data = load(tmp_path, evaluation(1), upstream_path=pairs(tmp_path, count=1_001))
    assert len(data.upstream) == 1_000
    assert data.upstream[2].prompt == "q2"
    assert (data.upstream[2].target, data.upstream[2].answers) == ("a2", ("b2",))


@pytest.mark.parametrize("indent", [None, 2])
def test_mends_upstream_file_is_one_object_of_two_columns(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "nq_train.json"
    path.write_text(json.dumps({"questions": ["q0", "q1"], "answers": ["a0", ["a1", "b1"]]}, indent=indent))
    upstream = load(tmp_path, evaluation(1), upstream_path=str(path)).upstream
    assert [(r.prompt, r.target, r.answers) for r in upstream] == [("q0", "a0", ()), ("q1", "a1", ("b1",))]


@pytest.mark.parametrize(
    "first", ['{"questions":', '{"questions": ["q0",', '{"questions": ["q0"', '{ "questions": ["q0", "q1"],']
)
def test_mends_upstream_file_may_end_its_first_line_anywhere(tmp_path: Path, first: str) -> None:
    path = tmp_path / "nq_train.json"
    whole = '{"questions": ["q0", "q1"], "answers": ["a0", "a1"]}'
    path.write_text(f"{first}\n{whole.removeprefix(first.replace('{ ', '{'))}\n")
    upstream = load(tmp_path, evaluation(1), upstream_path=str(path)).upstream
    assert [(r.prompt, r.target) for r in upstream] == [("q0", "a0"), ("q1", "a1")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"questions": ["q0", ""], "answers": ["a0", "a1"]}, ":1: pair 2: field 'question': is empty"),
        ({"questions": ["q0"], "answers": [[" "]]}, ":1: pair 1: field 'answer': is empty"),
        ({"questions": ["q0"], "answers": []}, ":1: field 'answers': holds 0 for 1 questions"),
        ({"questions": ["q0"]}, ":1: field 'answers': is missing"),
        ({"question": "q0"}, ":1: field 'answer': is missing"),
        ({"question": 3, "answer": "a"}, ":1: field 'question': should be text, not the number 3"),
    ],
)
def test_a_damaged_upstream_file_is_named(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    upstream = lines(tmp_path, content, name="nq_train.json")
    assert error_of(path=lines(tmp_path, evaluation(1)), upstream_path=upstream) == upstream + says


def test_a_damaged_pair_is_skipped_and_counted(tmp_path: Path) -> None:
    content = {"questions": ["q0", "", "q2"], "answers": ["a0", "a1", "a2"]}
    upstream = lines(tmp_path, content, name="nq_train.json")
    data = load(tmp_path, evaluation(1), upstream_path=upstream, on_error="skip")
    assert [request.id for request in data.upstream] == ["nq/1", "nq/3"]
    assert data.left_out == {"broken": 1}


def test_annotated_questions_take_upstream_from_the_hub_and_say_what_to_give_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = error_of(path=lines(tmp_path, annotated(0), annotated(1)))
    assert "google-research-datasets/nq_open" in message
    assert "stream.upstream_path=" in message


def test_validation_records_share_no_question_and_no_subject_with_the_edits(tmp_path: Path) -> None:
    further = lines(
        tmp_path,
        evaluation(1),
        evaluation(2, src="Whose is Firm1?", subject="Firm1"),
        evaluation(3, rephrase=evaluation(1)["rephrase"]),
        evaluation(4),
        evaluation(5, alt="shirts"),
        name="further.jsonl",
    )
    data = load(tmp_path, evaluation(1), validation_path=further)
    assert [(request.id, request.subject) for request in data.validation] == [("validation/4", "Firm4")]
    assert data.left_out == {"validation record about an edited fact": 3, "the new answer is the old one": 1}


def test_given_validation_replaces_the_facts_beyond_the_split(tmp_path: Path) -> None:
    further = lines(tmp_path, annotated(3), annotated(2000), name="further.jsonl")
    data = load(tmp_path, *(annotated(number) for number in range(1000)), validation_path=further)
    assert [request.id for request in data.validation] == ["fact-2000"]
    assert data.left_out == {"fact beyond the first 10,000 questions": 90, "validation record about an edited fact": 1}


@pytest.mark.parametrize("name", FORMATS)
def test_an_array_a_folder_and_parquet_give_the_same_requests_as_lines(tmp_path: Path, name: str) -> None:
    records = [FORMATS[name](number) for number in range(5)]
    expected = load(tmp_path, *records)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(records[:3]), encoding="utf-8")
    lines(folder, *records[3:], name="b.jsonl")
    assert Zsre(path=str(folder), upstream_path=pairs(tmp_path)).load() == expected
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "zsre.parquet")
    assert Zsre(path=str(tmp_path / "zsre.parquet"), upstream_path=pairs(tmp_path)).load() == expected


def test_a_folder_may_hold_files_of_two_formats_but_not_beside_annotated_questions(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lines(folder, evaluation(1), name="a.jsonl")
    lines(folder, easyedit(2), name="b.jsonl")
    data = Zsre(path=str(folder)).load()
    assert [(request.id, request.subject) for request in data.edits] == [("1", "Firm1"), ("2", "Genus2")]
    mixed = lines(folder, annotated(3), name="c.jsonl")
    assert error_of(path=str(folder)).startswith(f"{mixed}:1: MEND's annotated questions are split as a whole")
    assert Zsre(path=str(folder), on_error="skip").load().left_out == {"broken": 1}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("annotated", {"input": ...}, "field 'input': is missing"),
        ("annotated", {"input": "  "}, "field 'input': is empty"),
        ("annotated", {"id": ""}, "field 'id': "),
        ("annotated", {"id": "fact-0"}, "field 'id': 'fact-0' was used before, at "),
        ("annotated", {"output": []}, "field 'output[0].answer': is missing"),
        ("annotated", {"output": [{"provenance": []}]}, "field 'output[0].answer': is missing"),
        ("annotated", {"output": [{"answer": " "}]}, "field 'output[0].answer': is empty"),
        ("annotated", {"output": [{"answer": 3}]}, "field 'output[0].answer': should be text, not the number 3"),
        ("annotated", {"filtered_rephrases": ...}, "field 'filtered_rephrases': is missing"),
        ("annotated", {"filtered_rephrases": ["a", ""]}, "field 'filtered_rephrases[1]': is empty"),
        ("evaluation", {"src": ""}, "field 'src': is empty"),
        ("evaluation", {"alt": ...}, "field 'alt': is missing"),
        ("evaluation", {"alt": ["a"]}, "field 'alt': should be text, not a list"),
        ("evaluation", {"answers": []}, "field 'answers': "),
        ("evaluation", {"answers": ["a", 1]}, "field 'answers[1]': should be text, not the number 1"),
        ("evaluation", {"loc_ans": ...}, "field 'loc_ans': is missing"),
        ("evaluation", {"portability": {"New Question": "?"}}, "field 'portability.New Answer': is missing"),
        ("easyedit", {"prompt": "\n"}, "field 'prompt': is empty"),
        ("easyedit", {"subject": ""}, "field 'subject': is empty"),
        ("easyedit", {"ground_truth": 3}, "field 'ground_truth': should be text, not the number 3"),
        ("easyedit", {"locality_prompt": "p"}, "field 'locality_ground_truth': is missing, while 'locality_prompt' is"),
        ("easyedit", {"locality": {"K": [{}]}}, "field 'locality.K[0].prompt': is missing"),
        ("easyedit", {"portability": {"K": [{"prompt": "p"}]}}, "field 'portability.K[0].ground_truth': is missing"),
    ],
)
def test_a_damaged_record_is_named_or_skipped_and_counted(
    tmp_path: Path, name: str, change: dict[str, Any], says: str
) -> None:
    records = [FORMATS[name](0), FORMATS[name](1, **change), FORMATS[name](2)]
    path = lines(tmp_path, *records)
    message = error_of(path=path, upstream_path=pairs(tmp_path))
    assert message.startswith(f"{path}:2: {says}")
    data = load(tmp_path, *records, on_error="skip")
    assert data.left_out == {"broken": 1}
    without = load(tmp_path, records[0], records[2])
    assert sorted(asked(data.edits)) == sorted(asked(without.edits))


def test_invalid_utf8_names_its_line_and_is_skipped_on_request(tmp_path: Path) -> None:
    content = [json.dumps(evaluation(number)).encode() for number in range(3)]
    path = tmp_path / "zsre.jsonl"
    path.write_bytes(b"\n".join([content[0].replace(b"Firm0", b"Firm\xff"), *content[1:]]))
    assert error_of(path=str(path)).startswith(f"{path}:1: field 'subject': is not UTF-8")
    assert len(Zsre(path=str(path), on_error="skip").load().edits) == 2


def test_a_record_of_no_known_format_is_told_what_is_read(tmp_path: Path) -> None:
    path = lines(tmp_path, {"text": "a", "label": 1})
    message = error_of(path=path)
    assert message.startswith(f"{path}:1: is a record of none of the formats")
    assert all(field in message for field in ("input", "src", "target_new"))


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("{}", "who founded town 7"),
        ("nq question: {}", "nq question: who founded town 7"),
        ("nq question: {}?", "nq question: who founded town 7?"),
    ],
)
def test_a_locality_question_is_asked_as_the_option_says(tmp_path: Path, asked: str, wanted: str) -> None:
    flat = easyedit(1, locality_prompt="nq question: who founded town 7", locality_ground_truth="Founder7")
    for record in (evaluation(7), flat):
        data = Zsre(path=lines(tmp_path, record), locality_question=asked).load()
        assert [probe.prompt for probe in data.edits[0].locality] == [wanted]
        assert [request.prompt for request in data.upstream] == [wanted]


def test_the_gold_answers_may_be_the_targets_of_locality(tmp_path: Path) -> None:
    asked = [{"prompt": "a?", "ground_truth": ["b", "c"]}, {"prompt": "d?", "ground_truth": []}]
    for record, wanted in (
        (evaluation(7), ("who founded town 7", "Founder7", ())),
        (easyedit(1, locality={"K": asked}), ("a?", "b", ("c",))),
    ):
        (request,) = load(tmp_path, record, locality_target="gold").edits
        assert [(probe.prompt, probe.target, probe.answers) for probe in request.locality] == [wanted]


def test_the_true_answers_may_be_the_targets_and_no_record_is_then_left_out(tmp_path: Path) -> None:
    records = [evaluation(1), evaluation(2, alt="uniforms"), evaluation(3, alt="")]
    data = load(tmp_path, *records, target="answers")
    assert [(r.target, r.answers) for r in data.edits] == [("uniforms", ("shirts",))] * 3
    assert [(r.target, r.answers) for r in data.holdout] == [("uniforms", ("shirts",))] * 3
    assert data.left_out == {}


def test_records_with_one_answer_named_ans_are_read(tmp_path: Path) -> None:
    record = changed(evaluation(1), {"alt": ..., "answers": ..., "ans": "aircraft"})
    (request,) = load(tmp_path, record).edits
    assert (request.prompt, request.target, request.answers) == ("What does Firm1 make?", "aircraft", ())
    assert [probe.prompt for probe in request.locality] == ["who founded town 1"]
    path = lines(tmp_path, record, {**record, "ans": ""})
    assert error_of(path=path) == f"{path}:2: field 'ans': is empty"


def test_a_causal_model_completes_uncut_questions(tmp_path: Path) -> None:
    path = lines(tmp_path, evaluation(1))
    stream = Zsre(path=path, task="completion", max_new_tokens=32)
    assert (stream.task, stream.max_new_tokens) == ("completion", 32)
    assert (stream.max_input_tokens, stream.max_target_tokens) == (None, None)
    assert stream.load() == Zsre(path=path).load()
    assert (Zsre(path=path).max_new_tokens, Zsre(path=path).max_input_tokens) == (20, 20)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "stream.path="),
        ({"path": ""}, "stream.path="),
        ({"path": "x", "upstream_path": " "}, "upstream_path="),
        ({"path": "x", "task": "completions"}, "stream.task=completions is not known; did you mean 'completion'?"),
        ({"path": "x", "target": "ans"}, "stream.target=ans is not known"),
        ({"path": "x", "locality_question": "?"}, "stream.locality_question=? should hold {} once"),
        ({"path": "x", "locality_question": "{} {}"}, "stream.locality_question={} {} should hold {} once"),
        ({"path": "x", "locality_target": "true"}, "stream.locality_target=true is not known"),
        ({"path": "x", "max_new_tokens": 0}, "stream.max_new_tokens=0"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], names: str) -> None:
    assert names in error_of(**options)


@needs_shared
def test_the_real_file_loses_exactly_the_records_without_a_new_answer() -> None:
    raw = [json.loads(line) for line in (SHARED / "zsre_mend.jsonl").read_bytes().split(b"\n") if line]
    same = [r for r in raw if r["alt"] and any(normalize_answer(r["alt"]) == normalize_answer(a) for a in r["answers"])]
    empty = [record for record in raw if not record["alt"]]
    kept = [record for record in raw if record not in same and record not in empty]
    data = Zsre(path=str(SHARED / "zsre_mend.jsonl")).load()
    assert data.left_out == {"the new answer is the old one": len(same), "no new answer": len(empty)}
    assert (len(same), len(empty), len(kept)) == (17, 1, 582)
    assert asked(data.edits) == [(record["src"], record["alt"]) for record in kept]
    # Over half of what is edited has a prediction equal to the answer: no sign of anything.
    assert sum(record["pred"] in record["answers"] for record in kept) > len(kept) / 2
    assert [request.subject for request in data.edits] == [record["subject"] for record in kept]
    assert [request.prompt for request in data.holdout] == [record["rephrase"] for record in kept]
    assert {request.prompt for request in data.upstream} == {r["loc"].removeprefix("nq question: ") for r in kept}


@needs_shared
def test_the_real_natural_questions_are_upstream() -> None:
    raw = [json.loads(line) for line in (SHARED / "nq_open_dev.jsonl").read_bytes().split(b"\n")[:1000]]
    upstream = (
        Zsre(path=str(SHARED / "zsre_mend.jsonl"), upstream_path=str(SHARED / "nq_open_dev.jsonl")).load().upstream
    )
    assert asked(upstream) == [(record["question"], record["answer"][0]) for record in raw]
    assert all(
        {request.target, *request.answers} == set(record["answer"])
        for request, record in zip(upstream, raw, strict=True)
    )
