"""The data exchanged between an editor and the harness: batches of requests in, outcomes and answers out."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grace_bench.models.encoding import EncodedBatch

State = dict[str, Tensor | int | float | str | list[Any] | dict[str, Any] | None]
"""The contents of a `state_dict`: tensors and JSON values."""


@dataclass(frozen=True, kw_only=True)
class EditBatch:
    """Everything an editor may know about the requests it edits.

    Attributes:
        prompts: B input texts.
        targets: B wanted answers: texts, or label ids.
        subjects: B subjects if the editor declares `needs_subject`, else None.
        encoded: The prompts with their targets as tensors.
    """

    prompts: tuple[str, ...]
    targets: tuple[str | int, ...]
    encoded: EncodedBatch
    subjects: tuple[str | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ProbedBatch(EditBatch):
    """The batch of an editor that is shown the locality probes of its edits (`OptionalHooks.needs_locality`).

    Attributes:
        locality: For each of the B requests, the prompts of its locality probes.
    """

    locality: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class EditOutcome:
    """The result of an edit. Editors fill in what they know.

    Attributes:
        op: What happened to the codebook: `add`, `expand`, `split`, `hit` or `relabel`.
        key: Index of the codebook entry that answers the request now.
        distance: Distance of the request's query to the nearest entry before the edit.
        n_keys: Number of entries after the edit.
        loss_first: Loss at the first step.
        loss: Loss at the last step.
        loss_after: Loss after the last step. If None, the harness computes it to check that it is finite.
        steps: Number of gradient steps.
        failed: Why the edit failed, in one line; None if it succeeded.
        traceback: Where a programming error in the editor was raised; set by the harness, for such errors only.
        is_close: Whether a rounding difference, as between batch sizes, could have changed the decision.
    """

    op: str | None = None
    key: int | None = None
    distance: float | None = None
    n_keys: int | None = None
    loss_first: float | None = None
    loss: float | None = None
    loss_after: float | None = None
    steps: int = 0
    failed: str | None = None
    traceback: str | None = None
    is_close: bool = False


@dataclass(frozen=True)
class Answered:
    """What answers each of B queries after the edits made so far.

    Attributes:
        versions: For each query, everything but the query that its answer depends on: equal versions, equal answers.
            None stands for the unedited model. Other versions are texts, numbers or tuples of them, and survive saving
            and loading the editor's state.
        pending: For each query, whether a pending value answers it; empty if no value is pending.
        entry: (B,) long, index of the codebook entry that answers, -1 for none; None for editors without a codebook.
        distance: (B,) distance to the nearest entry.
        contested: (B,) bool, whether the query lies in balls of two different labels.
    """

    versions: Sequence[Hashable]
    pending: Sequence[bool] = ()
    entry: Tensor | None = None
    distance: Tensor | None = None
    contested: Tensor | None = None

    def notes(self) -> list[dict[str, Any]]:
        """Returns B dicts of facts about the answering entries, with the field names of `ItemScore`; None for none."""
        if self.entry is None or self.distance is None or self.contested is None:
            # A codebook may be empty again, after all of its edits failed.
            return [{"entry": None, "distance": None, "contested": None}] * len(self.versions)
        columns = zip(self.entry.tolist(), self.distance.tolist(), self.contested.tolist(), strict=True)
        return [{"entry": entry, "distance": distance, "contested": flag} for entry, distance, flag in columns]


@dataclass(frozen=True)
class NamedEdit:
    """An edit that was given a request id, by which it can be undone.

    Attributes:
        request_id: The id.
        prompt: The prompt.
        target: The target.
        is_followed: Whether edits without an id were made after it.
    """

    request_id: str
    prompt: str
    target: str | int
    is_followed: bool = False


@dataclass(frozen=True)
class Adapter:
    """The changes of an editor as an adapter of peft.

    Attributes:
        config: Its configuration, a `peft.PeftConfig`.
        weights: Its weights, by the names that peft gives them.
    """

    config: Any
    weights: Mapping[str, Tensor]
