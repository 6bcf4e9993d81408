"""What every registered stream promises of which a run needs nothing but the name."""

import json
from collections import Counter
from functools import cache
from typing import Any, get_args

import datasets
import pytest

from grace_bench.data.benchmark import EditBenchmark, fingerprint_requests
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.data.stream import EditStream, StreamData
from grace_bench.errors import UserError
from grace_bench.models.tasks.lookup import get_task
from grace_bench.models.zoo import known_models
from grace_bench.registry import STREAMS

ROLES = ("edits", "upstream", "holdout", "validation", "train", "accurate")


@cache
def without_options(name: str) -> EditStream | UserError:
    try:
        stream: EditStream = STREAMS.get(name)()
    except UserError as error:
        return error
    return stream


@cache
def loaded(name: str) -> StreamData:
    stream = without_options(name)
    assert isinstance(stream, EditStream)
    return stream.load()


SELF_CONTAINED = [name for name in STREAMS.entries() if STREAMS.get(name).default_model is not None]
OTHERS = [name for name in STREAMS.entries() if name not in SELF_CONTAINED]
each_self_contained = pytest.mark.parametrize("name", SELF_CONTAINED)


def requests_of(data: StreamData) -> list[tuple[str, EditRequest]]:
    return [(role, request) for role in ROLES for request in getattr(data, role)]


def facts_of(requests: tuple[EditRequest, ...]) -> set[str]:
    return {request.fact for request in requests}


def test_the_embedded_streams_need_no_options() -> None:
    assert {"atlas-qa", "atlas-drift", "atlas-text", "toy"} <= set(SELF_CONTAINED)


@pytest.mark.parametrize("name", OTHERS)
def test_a_stream_that_needs_an_option_or_the_hub_names_the_option_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        STREAMS.get(name)().load()
    assert "stream.path=" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(STREAMS.entries()))
def test_the_class_of_a_stream_is_fit_to_be_registered(name: str) -> None:
    assert STREAMS.get(name).check_class() is None


@pytest.mark.parametrize("name", list(STREAMS.entries()))
def test_a_stream_says_whom_to_cite_unless_its_data_are_the_users(name: str) -> None:
    cls = STREAMS.get(name)
    assert bool(cls.metadata.citation.strip()) == hasattr(cls, "task")


@pytest.mark.parametrize("name", list(STREAMS.entries()))
def test_a_stream_names_the_main_score_of_its_task(name: str) -> None:
    cls = STREAMS.get(name)
    # Only where the user chooses the task is there none.
    assert cls.metadata.main_score == (get_task(cls.task).main_score if hasattr(cls, "task") else None)


@each_self_contained
def test_ids_are_unique_within_a_role_and_edits_share_none_with_validation(name: str) -> None:
    data = loaded(name)
    for role in ROLES:
        counts = Counter(request.id for request in getattr(data, role))
        assert [key for key, count in counts.items() if count > 1] == []
    assert not {r.id for r in data.edits} & {r.id for r in (*data.validation, *data.train)}


@each_self_contained
def test_what_is_tuned_or_trained_on_shares_no_fact_with_what_is_edited(name: str) -> None:
    data = loaded(name)
    edits, validation, train = facts_of(data.edits), facts_of(data.validation), facts_of(data.train)
    assert not edits & validation
    assert not edits & train
    assert not validation & train


@each_self_contained
def test_the_holdout_asks_about_edited_facts_in_other_words(name: str) -> None:
    data = loaded(name)
    assert facts_of(data.holdout) <= facts_of(data.edits)
    assert not {request.prompt for request in data.holdout if request.prompt} & {r.prompt for r in data.edits}


@each_self_contained
def test_loading_again_gives_the_same_requests_in_the_same_order(name: str) -> None:
    again = STREAMS.get(name)().load()
    assert again == loaded(name)
    assert fingerprint_requests(again) == fingerprint_requests(loaded(name))


@each_self_contained
def test_a_changed_target_changes_the_fingerprint(name: str) -> None:
    data = loaded(name)
    changed = data.edits[0].model_copy(update={"target": f"{data.edits[0].target}x"})
    other = StreamData(**{**vars(data), "edits": (changed, *data.edits[1:])})
    assert fingerprint_requests(other) != fingerprint_requests(data)


@each_self_contained
def test_a_subject_occurs_in_its_prompt(name: str) -> None:
    for role, request in requests_of(loaded(name)):
        if request.subject is not None:
            assert request.subject in request.prompt, (role, request.id)


@each_self_contained
def test_prompts_targets_and_labels_fit_the_task(name: str) -> None:
    stream, data = without_options(name), loaded(name)
    assert isinstance(stream, EditStream)
    assert stream.task in get_args(TaskName)
    assert stream.max_new_tokens == "auto" or stream.max_new_tokens >= 1
    assert data.edits
    for role, request in requests_of(data):
        where = (role, request.id)
        if stream.task == "classification":
            assert isinstance(request.target, int), where
            assert 0 <= request.target < len(data.label_names), where
        else:
            assert isinstance(request.target, str), where
            assert request.target.strip(), where
        assert request.prompt.strip() or stream.task == "language_modelling", where
        assert json.loads(json.dumps(request.metadata)) == request.metadata, where


@each_self_contained
def test_a_seed_orders_the_edits_and_nothing_else(name: str) -> None:
    stream, data = without_options(name), loaded(name)
    assert isinstance(stream, EditStream)
    first, same, other = (EditBenchmark.from_stream(stream, seed=seed).data for seed in (0, 0, 1))
    assert first == same
    assert first.edits != other.edits
    assert sorted(r.id for r in first.edits) == sorted(r.id for r in other.edits) == sorted(r.id for r in data.edits)
    for role in ROLES[1:]:
        assert getattr(first, role) == getattr(other, role) == getattr(data, role)


@each_self_contained
def test_the_benchmark_holds_a_stream_a_role_and_an_experience_an_edit(name: str) -> None:
    stream, data = without_options(name), loaded(name)
    assert isinstance(stream, EditStream)
    benchmark: Any = EditBenchmark.from_stream(stream, seed=0)
    assert len(benchmark.streams["edits"]) == len(data.edits)
    for role in ROLES[1:]:
        requests = getattr(data, role)
        assert (role in benchmark.streams) == bool(requests)
        if requests:
            (experience,) = benchmark.streams[role]
            assert experience.requests == requests
    assert benchmark.fingerprint == fingerprint_requests(data)


@each_self_contained
def test_the_streams_own_model_ships_with_the_package(name: str) -> None:
    assert STREAMS.get(name).default_model in known_models()


@each_self_contained
def test_validation_can_be_edited_in_place_of_the_edits(name: str) -> None:
    stream, data = without_options(name), loaded(name)
    assert isinstance(stream, EditStream)
    tuned = EditBenchmark.from_stream(stream, seed=0, split="validation").data
    assert facts_of(tuned.edits) == facts_of(data.validation)
    assert not facts_of(tuned.holdout) & facts_of(data.edits)
