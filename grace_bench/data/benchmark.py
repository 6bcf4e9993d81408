"""Edit streams as Avalanche benchmarks."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, get_args

from grace_bench.common.options import check_choice
from grace_bench.data.avalanche import CLExperience, CLScenario, CLStream, EagerCLStream
from grace_bench.data.derived import fill_targets, probe_requests, rephrased
from grace_bench.data.requests import EditRequest, content_of
from grace_bench.data.stream import ROLES, AnswerLength, EditStream, Order, StreamData, StreamMetadata
from grace_bench.errors import UserError


class EditExperience(CLExperience):
    """One request, as an Avalanche experience.

    In train mode an editor may read `prompt` and `target`, and `subject` and `locality` (the prompts of its locality
    probes) if it declares that it needs them. Reading any other attribute raises Avalanche's `MaskedAttributeError`.

    Args:
        request: The request.
    """

    def __init__(self, request: EditRequest) -> None:
        super().__init__(current_experience=0, origin_stream=None)
        self.prompt = request.prompt
        self.target = request.target
        self.subject = request.subject
        self.locality = tuple(probe.prompt for probe in request.locality)
        self.request = request
        self._as_attributes("prompt", "target", use_in_train=True, use_in_eval=True)
        self._as_attributes("subject", "locality", "request")

    def for_editor(self, *, needs_subject: bool, needs_locality: bool = False) -> "EditExperience":
        """Returns the experience in train mode, with only those attributes readable that the editor needs."""
        experience = EditExperience(self.request)
        experience._current_experience = self._current_experience
        experience._origin_stream = self._origin_stream
        if needs_subject:
            experience.__dict__["subject"].use_in_train = True
        if needs_locality:
            experience.__dict__["locality"].use_in_train = True
        trained: EditExperience = experience.train()
        return trained


class BatchExperience(CLExperience):
    """Several requests that are edited together, as one Avalanche experience.

    In train mode an editor may read `prompts` and `targets`, and `subjects` and `localities` if it declares that it
    needs them.

    Args:
        requests: The requests, in their order.
    """

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        super().__init__(current_experience=0, origin_stream=None)
        self.prompts = tuple(request.prompt for request in requests)
        self.targets = tuple(request.target for request in requests)
        self.subjects = tuple(request.subject for request in requests)
        self.localities = tuple(tuple(probe.prompt for probe in request.locality) for request in requests)
        self.requests = tuple(requests)
        self._as_attributes("prompts", "targets", use_in_train=True, use_in_eval=True)
        self._as_attributes("subjects", "localities", "requests")

    def for_editor(self, *, needs_subject: bool, needs_locality: bool = False) -> "BatchExperience":
        """Returns the experience in train mode, with only those attributes readable that the editor needs."""
        experience = BatchExperience(self.requests)
        if needs_subject:
            experience.__dict__["subjects"].use_in_train = True
        if needs_locality:
            experience.__dict__["localities"].use_in_train = True
        trained: BatchExperience = experience.train()
        return trained


class EvalExperience(CLExperience):
    """All requests of an evaluation stream, as one Avalanche experience.

    Args:
        requests: The requests to score.
    """

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        super().__init__(current_experience=0, origin_stream=None)
        self.requests = tuple(requests)


def eval_stream(name: str, requests: Sequence[EditRequest]) -> CLStream:
    """Returns an evaluation stream: one `EvalExperience` with all requests."""
    return EagerCLStream(name, [EvalExperience(requests)])


class EditBenchmark(CLScenario):
    """Named streams of edit requests, ready for a run.

    The stream `edits` has one `EditExperience` per request. The streams `upstream`, `holdout`, `validation`, `train`,
    `accurate`, `locality` and `portability` exist if the data has such requests, and have one `EvalExperience` each.

    Args:
        name: The stream's registered name.
        data: The requests by role, with `edits` in the order of the run.
        task: The name of the stream's task.
        metadata: Source, revision and licence.
        fingerprint: SHA-256 of the requests.
        max_new_tokens: The largest number of tokens that free generation may produce; `auto` until a run has chosen it
            by the targets and the model's tokenizer.
        order: The order of the edits: `shuffle` or `stream`.
        loaded: The requests in all roles as the stream gave them, whichever split is edited; None for those of `data`.
    """

    def __init__(
        self,
        *,
        name: str,
        data: StreamData,
        task: str,
        metadata: StreamMetadata,
        fingerprint: str,
        max_new_tokens: AnswerLength,
        order: Order = "shuffle",
        loaded: StreamData | None = None,
    ) -> None:
        self.name = name
        self.data = data
        self.task = task
        self.metadata = metadata
        self.fingerprint = fingerprint
        self.max_new_tokens = max_new_tokens
        self.order = order
        self.loaded = data if loaded is None else loaded
        edits = EagerCLStream("edits", [EditExperience(request) for request in data.edits], benchmark=self)
        super().__init__([edits, *(eval_stream(role, requests) for role, requests in self._eval_roles())])

    @classmethod
    def from_stream(
        cls, stream: EditStream, *, seed: int, split: str = "edits", order: Order | None = None
    ) -> "EditBenchmark":
        """Loads a stream and puts its edits in the order of the run; those of a group stay together when shuffled.

        Args:
            stream: The stream.
            seed: Shuffles the edits; the splits do not depend on it.
            split: The split to edit: `edits`, or `validation` for tuning, whose rephrases then are the holdout.
            order: `shuffle` by seed, or `stream` to keep the stream's order; None for the stream's default.

        Raises:
            UserError: If the stream cannot be read, does not have the split, two requests of a role share an id, or the
                order is not known.
        """
        data = stream.load()
        check_ids(data, stream.registered_name)
        fingerprint = fingerprint_requests(data)
        if split == "validation":
            if not data.validation:
                raise UserError(f"stream '{stream.registered_name}' has no validation split")
            edits, holdout = data.validation, tuple(rephrased(data.validation))
        elif split == "edits":
            edits, holdout = data.edits, data.holdout
        else:
            raise UserError(f"split={split!r} is not known (there are: edits, validation)")
        order = order or stream.default_order(data)
        check_choice("order", order, get_args(Order))
        if order == "shuffle":
            groups = list(_groups(edits))
            random.Random(seed).shuffle(groups)
            edits = tuple(chain.from_iterable(groups))
        return cls(
            name=stream.registered_name,
            data=replace(data, edits=edits, holdout=holdout),
            task=stream.task,
            metadata=stream.metadata,
            fingerprint=fingerprint,
            max_new_tokens=stream.max_new_tokens,
            order=order,
            loaded=data,
        )

    def with_data(self, **roles: Any) -> "EditBenchmark":
        """Returns the benchmark with the requests of some roles replaced."""
        return EditBenchmark(
            name=self.name,
            data=replace(self.data, **roles),
            task=self.task,
            metadata=self.metadata,
            fingerprint=self.fingerprint,
            max_new_tokens=self.max_new_tokens,
            order=self.order,
            loaded=self.loaded,
        )

    def answered_by(self, answer: Callable[[Sequence[str]], Sequence[str | int]]) -> "EditBenchmark":
        """Returns the benchmark with the unedited model's answers as targets of the upstream requests that need them.

        Args:
            answer: Returns the unedited model's answers to prompts.
        """
        upstream = fill_targets(self.data.upstream, answer)
        return self if upstream == self.data.upstream else self.with_data(upstream=upstream)

    def _eval_roles(self) -> Iterable[tuple[str, Sequence[EditRequest]]]:
        roles = ("upstream", "holdout", "validation", "train", "accurate")
        yield from ((role, getattr(self.data, role)) for role in roles if getattr(self.data, role))
        for kind in ("locality", "portability"):
            if requests := probe_requests(self.data.edits, kind):
                yield kind, requests


def _groups(requests: Sequence[EditRequest]) -> Iterable[list[EditRequest]]:
    """Returns the requests by group, in the order of first members; a request without one is a group of its own."""
    groups: dict[str | int, list[EditRequest]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(number if request.group is None else request.group, []).append(request)
    return groups.values()


def check_ids(data: StreamData, stream: str) -> None:
    """Checks that ids are unique within each role of a stream.

    Raises:
        UserError: If two requests of a role share an id; the message names the role and both positions.
    """
    for role in ROLES:
        places: dict[str, int] = {}
        for place, request in enumerate(getattr(data, role)):
            first = places.setdefault(request.id, place)
            if first != place:
                raise UserError(
                    f"stream '{stream}': {role}[{place}]: field 'id': '{request.id}' is the id of {role}[{first}] too"
                )


def fingerprint_requests(data: StreamData) -> str:
    """Returns the SHA-256 of a stream's requests in all roles."""
    digest = hashlib.sha256()
    for role in ROLES:
        for request in getattr(data, role):
            line = json.dumps([role, content_of(request)], sort_keys=True, ensure_ascii=False)
            digest.update(line.encode())
    return digest.hexdigest()
