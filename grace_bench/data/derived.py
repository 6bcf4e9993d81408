"""Requests derived from other requests: rephrases, probes, and requests whose target is the unedited model's answer."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from grace_bench.data.requests import DerivedRequest, EditRequest
from grace_bench.data.stream import ROLES, StreamData

Answer = Callable[[Sequence[str]], Sequence[str | int]]
"""Returns the unedited model's answers to prompts."""


def rephrased(requests: Iterable[EditRequest]) -> Iterator[EditRequest]:
    """Yields a request about the same fact for every rephrase that differs from the prompt."""
    for request in requests:
        for index, rephrase in enumerate(request.rephrases):
            if rephrase == request.prompt:
                continue
            yield EditRequest(
                id=f"{request.id}/rephrase/{index}",
                prompt=rephrase,
                target=request.target,
                answers=request.answers,
                subject=request.subject if request.subject and request.subject in rephrase else None,
                fact=request.fact_id,
                contrast=request.contrast,
            )


def probe_requests(requests: Iterable[EditRequest], kind: str) -> tuple[DerivedRequest, ...]:
    """Returns the `locality` or `portability` probes of requests as separate requests.

    A probe without a target takes the unedited model's answer as its target (`fill_targets`).
    """
    return tuple(
        DerivedRequest(
            id=f"{request.id}/{kind}-{i}",
            prompt=probe.prompt,
            target="" if probe.target is None else probe.target,
            answers=probe.answers,
            gold=probe.gold,
            group=probe.group,
            contrast=probe.contrast,
            metadata=probe.metadata,
            probe_of=request.id,
            target_from_model=probe.target is None,
            is_locality=kind == "locality",
        )
        for request in requests
        for i, probe in enumerate(getattr(request, kind))
    )


def given_targets(data: StreamData) -> Iterator[EditRequest]:
    """Yields the requests of all roles, and their probes, whose targets the stream gives."""
    for request in (request for role in ROLES for request in getattr(data, role)):
        if not is_answered_by_model(request):
            yield request
        for probe in (*request.locality, *request.portability):
            if probe.target is not None:
                yield EditRequest(id=request.id, prompt=probe.prompt, target=probe.target)


def is_answered_by_model(request: EditRequest) -> bool:
    """Returns whether the target of a request is the unedited model's own answer."""
    return isinstance(request, DerivedRequest) and request.target_from_model


def edit_id(request: EditRequest) -> str:
    """Returns the id of the edit that a probe belongs to, or the request's own id if it is not a probe."""
    return request.probe_of or request.id if isinstance(request, DerivedRequest) else request.id


def fill_targets(requests: Sequence[EditRequest], answer: Answer) -> tuple[EditRequest, ...]:
    """Returns the requests, with the model's answers filled in where they are the targets."""
    prompts = list(dict.fromkeys(request.prompt for request in requests if is_answered_by_model(request)))
    known = dict(zip(prompts, answer(prompts), strict=True)) if prompts else {}
    return tuple(
        request.model_copy(update={"target": known[request.prompt]}) if is_answered_by_model(request) else request
        for request in requests
    )
