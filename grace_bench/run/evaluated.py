"""The requests that an evaluation scores, and the prompts that the unedited model answers beforehand."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.derived import fill_targets, is_answered_by_model, probe_requests
from grace_bench.data.requests import DerivedRequest, EditRequest, Unedited
from grace_bench.data.stream import StreamData
from grace_bench.run.settings import Schedule


class UneditedModel:
    """What the unedited model says to the prompts of a run; after the first edit it is too late to ask.

    Args:
        answers: Its answers by prompt: the targets of requests without a target of their own.
        probes: What it says to locality probes, by prompt, target and reference answer; empty if nothing compares with
            it.
    """

    def __init__(
        self, answers: Mapping[str, str | int], probes: Mapping[tuple[str, str, str], Unedited] | None = None
    ) -> None:
        self.answers = dict(answers)
        self.probes = dict(probes or {})

    def probes_of(self, requests: Iterable[EditRequest], kind: str) -> list[DerivedRequest]:
        """Returns the `locality` or `portability` probes of requests, with the unedited model's answers."""
        probes = fill_targets(probe_requests(requests, kind), lambda prompts: [self.answers[p] for p in prompts])
        found = [probe for probe in probes if isinstance(probe, DerivedRequest)]
        if kind != "locality" or not self.probes:
            return found
        return [probe.model_copy(update={"unedited": self.probes.get(_key(probe))}) for probe in found]

    def learn(self, probes: Sequence[DerivedRequest], said: Sequence[Unedited]) -> None:
        """Adds what the unedited model says to locality probes."""
        self.probes |= {_key(probe): unedited for probe, unedited in zip(probes, said, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Returns the answers as JSON values."""
        probes = [[*key, said.text, said.tokens and [*said.tokens]] for key, said in self.probes.items()]
        return {"answers": dict(self.answers), "probes": probes}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Returns the answers of a `state_dict`, or of one from a version that had only answers by prompt."""
        if "probes" not in state:
            return cls(state)
        rows = (
            (tuple(row[:3]), Unedited(row[3], None if row[4] is None else tuple(row[4]))) for row in state["probes"]
        )
        return cls(state["answers"], dict(rows))


def evaluated_requests(
    data: StreamData, *, edited: Sequence[int], superseded: Sequence[int], unedited: UneditedModel
) -> dict[str, Sequence[EditRequest]]:
    """Returns the requests of an evaluation by the name of their stream, empty streams left out.

    Args:
        data: The run's requests.
        edited: Indices of the edited requests on which ERR is measured.
        superseded: Indices of the edited requests whose input was edited again with another target.
        unedited: What the unedited model says.
    """
    requests = [data.edits[index] for index in edited]
    streams: dict[str, Sequence[EditRequest]] = {
        "upstream": data.upstream,
        "edited": requests,
        "holdout": _holdout(data, requests, superseded),
        "accurate": data.accurate,
        **{kind: unedited.probes_of(requests, kind) for kind in ("locality", "portability")},
    }
    return {name: scored for name, scored in streams.items() if scored}


class RelatedRequests:
    """The requests that show what one edit did: other wordings of its fact, and its probes.

    Args:
        data: The run's requests.
        unedited: What the unedited model says.
    """

    def __init__(self, data: StreamData, unedited: UneditedModel) -> None:
        self._unedited = unedited
        self._holdout: defaultdict[str, list[EditRequest]] = defaultdict(list)
        for request in data.holdout:
            if request.fact is not None:
                self._holdout[request.fact].append(request)
        self._targets: defaultdict[str, set[str | int]] = defaultdict(set)
        for request in data.edits:
            self._targets[request.fact_id].add(request.target)

    def of(self, request: EditRequest) -> dict[str, Sequence[EditRequest]]:
        """Returns the requests related to an edit by the name of their stream, empty streams left out.

        Wordings that want the target of another edit of the same fact are not related.
        """
        others = self._targets[request.fact_id] - {request.target}
        streams: dict[str, Sequence[EditRequest]] = {
            "holdout": [wording for wording in self._holdout[request.fact_id] if wording.target not in others],
            **{kind: self._unedited.probes_of([request], kind) for kind in ("locality", "portability")},
        }
        return {name: requests for name, requests in streams.items() if requests}


def distinct(probes: Iterable[DerivedRequest]) -> list[DerivedRequest]:
    """Returns the probes without those that ask and expect the same as an earlier one."""
    return [*{_key(probe): probe for probe in probes}.values()]


def reachable(data: StreamData, schedule: Schedule) -> Sequence[EditRequest]:
    """Returns the candidates that a run can edit."""
    return data.edits[: schedule.max_edits] if schedule.edit == "all" else data.edits


def prompts_to_ask(data: StreamData, candidates: Sequence[EditRequest]) -> list[str]:
    """Returns the prompts whose targets are the unedited model's answers, each once.

    Args:
        data: The run's requests.
        candidates: The candidates whose probes are included: after the first edit it is too late to ask.
    """
    probes = (probe for kind in ("locality", "portability") for probe in probe_requests(candidates, kind))
    asked = (request for request in (*data.upstream, *probes) if is_answered_by_model(request))
    return list(dict.fromkeys(request.prompt for request in asked))


def with_answers(benchmark: EditBenchmark, answers: Mapping[str, str | int]) -> EditBenchmark:
    """Returns the benchmark with the unedited model's answers as the targets of upstream requests without a target."""
    return benchmark.answered_by(lambda prompts: [answers[prompt] for prompt in prompts])


def thinned(benchmark: EditBenchmark, most: int | None) -> EditBenchmark:
    """Returns the benchmark with at most this many upstream requests, evenly spaced; None for all."""
    upstream = benchmark.data.upstream
    if most is None or len(upstream) <= most:
        return benchmark
    chosen = tuple(upstream[i * len(upstream) // most] for i in range(most))
    return benchmark.with_data(upstream=chosen)


def _holdout(data: StreamData, edited: Sequence[EditRequest], superseded: Iterable[int]) -> Sequence[EditRequest]:
    """The holdout requests of edited facts, except those that want a superseded target."""
    facts = {request.fact_id for request in edited}
    outdated = {(data.edits[i].fact_id, data.edits[i].target) for i in superseded}
    outdated -= {(request.fact_id, request.target) for request in edited}
    return [
        request
        for request in data.holdout
        if (request.fact_id in facts or (edited and request.fact is None))
        and (request.fact_id, request.target) not in outdated
    ]


def _key(probe: DerivedRequest) -> tuple[str, str, str]:
    return probe.prompt, str(probe.target), probe.reference
