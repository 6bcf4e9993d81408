"""Requests that are derived from requests."""

from collections.abc import Iterable, Iterator
from typing import Any

from grace_bench.data.requests import EditRequest


def rephrased(requests: Iterable[EditRequest]) -> Iterator[EditRequest]:
    """Yields a request for every rephrase, about the same fact, leaving out those that repeat the prompt."""
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
                metadata={"fact": request.fact, **_contrast(request)},
            )


def is_contrast(given: Any) -> bool:
    """Whether `metadata["contrast"]` is what it may be: two texts, or None.

    >>> is_contrast(["Rome", "Paris"]), is_contrast(["Rome"])
    (True, False)
    """
    if given is None:
        return True
    return (
        isinstance(given, list | tuple)
        and len(given) == 2
        and all(isinstance(answer, str) and answer.strip() for answer in given)
    )


def _contrast(request: EditRequest) -> dict[str, Any]:
    return {name: value for name, value in request.metadata.items() if name == "contrast"}
