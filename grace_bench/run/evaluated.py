"""The requests that an evaluation scores, and the prompts that the unedited model answers beforehand."""

from collections.abc import Iterable, Mapping, Sequence

from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.derived import fill_targets, is_answered_by_model, probe_requests
from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import StreamData


def evaluated_requests(
    data: StreamData, *, edited: Sequence[int], superseded: Sequence[int], answers: Mapping[str, str | int]
) -> dict[str, Sequence[EditRequest]]:
    """Returns the requests of an evaluation by the name of their stream, empty streams left out.

    Args:
        data: The run's requests.
        edited: Indices of the edited requests on which ERR is measured.
        superseded: Indices of the edited requests whose input was edited again with another target.
        answers: The unedited model's answers by prompt: the targets of probes without a target of their own.
    """
    requests = [data.edits[index] for index in edited]
    streams = {
        "upstream": data.upstream,
        "edited": requests,
        "holdout": _holdout(data, requests, superseded),
        "accurate": data.accurate,
        **{kind: _probes(kind, requests, answers) for kind in ("locality", "portability")},
    }
    return {name: scored for name, scored in streams.items() if scored}


def prompts_to_ask(data: StreamData) -> list[str]:
    """Returns the prompts whose targets are the unedited model's answers, each once.

    The probes of all candidates are included: after the first edit it is too late to ask.
    """
    probes = (probe for kind in ("locality", "portability") for probe in probe_requests(data.edits, kind))
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


def _probes(kind: str, edited: Sequence[EditRequest], answers: Mapping[str, str | int]) -> Sequence[EditRequest]:
    return fill_targets(probe_requests(edited, kind), lambda prompts: [answers[prompt] for prompt in prompts])
