"""Requests that are derived from requests."""

from collections.abc import Iterable, Iterator
from typing import Any

from grace_bench.types import EditRequest


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


def _contrast(request: EditRequest) -> dict[str, Any]:
    return {name: value for name, value in request.metadata.items() if name == "contrast"}
