"""Fields say what a request is; metadata is the user's and changes nothing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from grace_bench import EditRequest, RunSettings, Schedule, run_benchmark
from grace_bench.analysis.significance import compare
from grace_bench.data.benchmark import EditBenchmark, fingerprint_requests
from grace_bench.data.derived import probe_requests
from grace_bench.data.requests import Probe, content_of
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.editors.grace import Grace
from grace_bench.errors import UserError

POINTS = [(-1.2 + 0.1 * i, 1.8 - 0.1 * i) for i in range(6)]


def point(number: int, **fields: Any) -> EditRequest:
    x, y = POINTS[number]
    return EditRequest(**{"id": f"p{number}", "prompt": f"({x:.4f}, {y:.4f})", "target": 0, **fields})


class Points(EditStream):
    """Points of the plane with the class that each should have."""

    registered_name = "points"
    task = "classification"
    metadata = StreamMetadata(source="this test", revision="1", license="MIT")
    default_model = "toy"
    default_layer = "second"

    def __init__(self, **roles: tuple[EditRequest, ...]) -> None:
        self._roles = roles

    def load(self) -> StreamData:
        return StreamData(**{"edits": (point(0), point(1)), **self._roles})  # type: ignore[arg-type]


def run(stream: EditStream, folder: Path, editor: Any = "none") -> Any:
    settings = RunSettings(schedule=Schedule(max_edits=4))
    return run_benchmark(stream, editor=editor, settings=settings, folder=folder)


def test_a_metadata_key_edit_leaves_the_ids_of_requests_as_they_are(tmp_path: Path) -> None:
    edits = tuple(point(i, metadata={"edit": "v2"}) for i in range(4))
    # Of small radius, so that every point is edited.
    grace = partial(Grace, eps_init=1e-3, replacement="replace_last")
    for name, editor in {"none": "none", "grace": grace}.items():
        run(Points(edits=edits, upstream=(point(5),)), tmp_path / name, editor)
    rows = pq.read_table(tmp_path / "none" / "predictions.parquet").to_pylist()
    assert {row["request_id"] for row in rows if row["stream"] == "edited"} == {"p0", "p1", "p2", "p3"}
    comparison = compare(
        [tmp_path / "none"], [tmp_path / "grace"], streams=("edited",), metric="ERR", names=("none", "grace")
    )
    assert comparison.n_items == 4
    assert comparison.difference == -1.0


def test_a_metadata_key_target_from_model_leaves_the_target_as_it_is(tmp_path: Path) -> None:
    wrong = point(5, metadata={"target_from_model": True})
    right = wrong.model_copy(update={"target": 1})
    scores = [
        run(Points(upstream=(request,)), tmp_path / str(request.target)).metrics["TRR"] for request in (wrong, right)
    ]
    assert sorted(scores) == [0.0, 1.0], "one of the two classes is not what the model answers"


@pytest.mark.parametrize("role", ["edits", "upstream", "holdout", "validation", "train", "accurate"])
def test_an_id_that_two_requests_of_a_role_share_is_refused_with_both_places(role: str, tmp_path: Path) -> None:
    stream = Points(**{role: (point(2), point(3), point(4, id="p2"))})
    with pytest.raises(
        UserError, match=rf"stream 'points': {role}\[2\]: field 'id': 'p2' is the id of {role}\[0\] too"
    ):
        run(stream, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_id_in_two_roles_is_no_mistake(tmp_path: Path) -> None:
    assert run(Points(upstream=(point(0),)), tmp_path / "run").metrics["TRR"] is not None


@pytest.mark.parametrize("given", [("Rome", "Paris"), ["Rome", "Paris"]])
def test_a_fact_and_a_contrast_may_stand_in_fields_or_as_before_in_metadata(given: Any) -> None:
    of_fields = EditRequest(
        id="1",
        prompt="q",
        target="Rome",
        fact="capital",
        contrast=given,
        locality=(Probe(prompt="p", contrast=given),),
    )
    of_metadata = EditRequest(
        id="1",
        prompt="q",
        target="Rome",
        locality=(Probe(prompt="p", metadata={"contrast": [*given]}),),
        metadata={"fact": "capital", "contrast": [*given]},
    )
    for request in (of_fields, of_metadata):
        assert (request.fact, request.fact_id, request.contrast) == ("capital", "capital", ("Rome", "Paris"))
        assert request.locality[0].contrast == ("Rome", "Paris")
    assert content_of(of_fields) == content_of(of_metadata)
    assert fingerprint_requests(StreamData(edits=(of_fields,))) == fingerprint_requests(
        StreamData(edits=(of_metadata,))
    )


def test_a_request_without_a_fact_stands_for_itself() -> None:
    assert (point(0).fact, point(0).fact_id) == (None, "p0")


@pytest.mark.parametrize("contrast", ["Rome", ["Rome"], ["Rome", 3], ["Rome", " "], ["a", "b", "c"], {"a": "b"}])
def test_a_contrast_is_two_texts(contrast: Any) -> None:
    with pytest.raises(ValidationError, match="contrast"):
        EditRequest(id="1", prompt="q", target="Rome", contrast=contrast)


def test_a_probe_passes_its_further_answers_and_its_group_on(tmp_path: Path) -> None:
    probe = Probe(prompt="q", target="Rome", answers=("Roma",), group="case")
    (request,) = probe_requests([EditRequest(id="1", prompt="p", target="t", portability=(probe,))], "portability")
    assert (request.target, request.answers, request.group) == ("Rome", ("Roma",), "case")


def test_fields_that_are_not_given_leave_no_trace_in_a_fingerprint() -> None:
    bare = EditRequest(id="1", prompt="p", target="t", locality=(Probe(prompt="q", target="a"),))
    assert content_of(bare) == {
        **{"id": "1", "prompt": "p", "target": "t", "answers": [], "subject": None, "rephrases": []},
        **{"locality": [{"prompt": "q", "target": "a", "metadata": {}}], "portability": [], "metadata": {}},
    }
    contents = [content_of(bare)]
    contents += [content_of(bare.model_copy(update={name: "x"})) for name in ("group", "step")]
    for given in ({"answers": ("b",)}, {"group": "x"}):
        probe = Probe(prompt="q", target="a", **given)  # type: ignore[arg-type]
        contents.append(content_of(bare.model_copy(update={"locality": (probe,)})))
    assert all(one != other for i, one in enumerate(contents) for other in contents[:i])


def test_the_seed_shuffles_groups_and_never_what_is_in_them() -> None:
    edits = tuple(point(i % 6, id=str(i), group=None if i % 3 == 0 else f"case {i // 3}") for i in range(12))
    orders = [
        [request.id for request in EditBenchmark.from_stream(Points(edits=edits), seed=seed).data.edits]
        for seed in range(5)
    ]
    assert len({tuple(order) for order in orders}) == 5
    for order in orders:
        assert sorted(order, key=int) == [str(i) for i in range(12)]
        for first in (1, 4, 7, 10):
            assert order[order.index(str(first)) + 1] == str(first + 1)


def test_the_fields_of_derived_requests_are_not_read_from_files(make_requests: Callable[..., Any]) -> None:
    for name in ("probe_of", "target_from_model"):
        with pytest.raises(ValidationError, match="Extra inputs"):
            EditRequest.model_validate({"id": "1", "prompt": "q", "target": "t", name: True})


def test_a_target_that_is_no_label_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"request 'p1': field 'target': label 'below' should be a whole number"):
        run(Points(edits=(point(0), point(1, target="below"))), tmp_path / "run")
