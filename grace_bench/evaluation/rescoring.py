"""Rescoring: a request is scored again only if the model's answer may have changed."""

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from grace_bench.common.state import restored
from grace_bench.data.requests import DerivedRequest, EditRequest, Unedited
from grace_bench.editing.batch import Answered
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.tasks.base import ItemScore

# Not cached: the answering entry and its distance are looked up whenever a cached score is used.
_FIELDS = tuple(
    field.name for field in fields(ItemScore) if field.name not in {"query", "entry", "distance", "contested"}
)


class EditedModel(Protocol):
    """The members of an editor that rescoring uses; `EditorStrategy` documents them."""

    model: EditableModel

    @property
    def tells_what_changed(self) -> bool:
        """Whether the editor implements `answered_by`."""

    def answered_by(self, queries: Tensor) -> Answered | None:
        """Returns the entries that answer (B, D_in) queries."""


@dataclass
class _Known:
    """A request that was scored before.

    Attributes:
        query: (D_in,) the edited layer's input at its query; None if another network answered.
        version: The version of the entry that answered it last (see `Answered.versions`).
        items: Its cached scores by version.
        batch: The digests of the batch in which it was first scored, in order.
        read: The digest of the text that was read in place of its prompt; empty if that was the prompt.
    """

    query: Tensor | None
    version: Hashable
    items: dict[Hashable, ItemScore]
    batch: tuple[str, ...]
    read: str


class Rescorer:
    """Scores requests with the edited model, rescoring only requests whose answer may have changed.

    While the weights are frozen, the input of the edited layer at a request's query changes only with the text that is
    read in place of the prompt (`Network.as_read`). It is cached, and the editor says which entry answers it now
    (`answered_by`). If the text is the same, and the same version of the same entry answers as last time, the answer is
    the same too. Where another network reads the text, nothing else decides its answer.

    An evaluation rescores requests in the batch in which they were first scored, if it asks for the whole batch and at
    least half of it must be rescored: the engine has recorded what comes before the edited layer. All others go into
    new batches. So the bits of a score depend on which requests were scored and when, never on the contents of the
    cache. Generated answers do not start at the layer, so their batches are always new.

    Args:
        editor: The editor and its model.
    """

    def __init__(self, editor: EditedModel) -> None:
        self._editor = editor
        self._known: dict[str, _Known] = {}
        self._names: dict[Hashable, str] = {}
        self._keeps_versions = False
        self._with_earlier: list[_Known] = []
        self.is_incremental = editor.model.engine.rescores and editor.tells_what_changed
        """Whether scores are cached; if the editor cannot say what changed, every request is scored every time."""
        self._reuses_batches = False

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """One evaluation of all streams. Inside the context, repeated batches are computed from the edited layer on."""
        model = self._editor.model
        self._reuses_batches = self.is_incremental and not model.task.generates
        try:
            with nullcontext() if self.is_incremental else model.engine.remembering():
                yield
        finally:
            self._reuses_batches = False

    @contextmanager
    def keeping_versions(self) -> Iterator[None]:
        """Inside the context, scores of an entry's earlier versions stay cached; afterwards only the newest do."""
        self._keeps_versions = True
        try:
            yield
        finally:
            self._keeps_versions = False
            for known in self._with_earlier:
                known.items = {known.version: known.items[known.version]}
            self._with_earlier = []

    def score(self, requests: Sequence[EditRequest]) -> list[ItemScore]:
        """Returns the scores of requests, in their order."""
        model = self._editor.model
        if not self.is_incremental:
            return model.score(requests)
        keys = [self._key(request) for request in requests]
        reads = dict(zip(keys, self._reads(requests), strict=True))
        known = self._look_up(keys, reads)
        asked = dict(zip(keys, requests, strict=True))
        stale = [key for key in asked if key not in known]
        if stale:
            known |= self._score_anew(stale, asked, reads)
        return [known[key] for key in keys]

    def knows(self, request: EditRequest) -> bool:
        """Returns whether a request was scored before."""
        return self._key(request) in self._known

    def waits_for_values(self, request: EditRequest) -> bool:
        """Returns whether a pending value answers a known request, or may answer it since another text is read."""
        known = self._known[self._key(request)]
        if self._reads([request]) != [known.read]:
            return True
        if known.query is None:
            return False
        answered = self._editor.answered_by(known.query[None])
        return answered is not None and any(answered.pending)

    def forget(self) -> None:
        """Drops every cached score."""
        self._known.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the cached scores: a resumed run then rescores the same requests as an uninterrupted one."""
        known = self._known.values()
        items = [one.items[one.version] for one in known]
        numbers = {key: number for number, key in enumerate(self._known)}
        batches = {batch: number for number, batch in enumerate(dict.fromkeys(one.batch for one in known))}
        queries = [one.query for one in known if one.query is not None]
        return {
            "requests": [*self._known],
            # By column, which is fast: checkpoints of thousands of scores are frequent.
            "items": {name: [getattr(item, name) for item in items] for name in _FIELDS},
            "versions": [one.version for one in known],
            "batches": [[numbers[key] for key in batch] for batch in batches],
            "batch": [batches[one.batch] for one in known],
            "reads": [one.read for one in known],
            "queries": torch.stack(queries) if queries else None,
            "without_query": [number for number, one in enumerate(known) if one.query is None],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, which may have passed through JSON."""
        stacked = () if state["queries"] is None else state["queries"].to(self._editor.model.layer_device)
        columns = [state["items"][name] for name in _FIELDS]
        keys = state["requests"]
        # Older checkpoints lack neither queries nor this.
        rows_of_queries, without = iter(stacked), {*state.get("without_query", ())}
        queries = [None if number in without else next(rows_of_queries) for number in range(len(keys))]
        batches = [tuple(keys[number] for number in batch) for batch in state["batches"]]
        self._known = {}
        # Older checkpoints have none: every prompt was read as it is.
        reads = state.get("reads", [""] * len(keys))
        rows = zip(keys, state["versions"], state["batch"], reads, queries, *columns, strict=True)
        for key, version, batch, read, query, *values in rows:
            item = restored(ItemScore, dict(zip(_FIELDS, values, strict=True)))
            self._known[key] = _Known(query, _hashable(version), {_hashable(version): item}, batches[batch], read)

    def _key(self, request: EditRequest) -> str:
        """The digest of all fields of a request that affect its score; the texts would make checkpoints large."""
        parts: tuple[Any, ...] = request.prompt, request.target, request.answers, request.contrast or ()
        if isinstance(request, DerivedRequest) and request.is_locality:
            # The same question may be asked as upstream, without what locality compares with.
            said = request.unedited or Unedited()
            parts = (*parts, "locality", request.gold, request.target_from_model, said.text, said.tokens)
        if parts not in self._names:
            self._names[parts] = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
        return self._names[parts]

    def _reads(self, requests: Sequence[EditRequest]) -> list[str]:
        """The digest of the text that is now read in place of each request's prompt; empty if that is the prompt."""
        prompts = [request.prompt for request in requests]
        return [
            "" if text == prompt else hashlib.blake2b(json.dumps(text).encode(), digest_size=16).hexdigest()
            for prompt, text in zip(prompts, self._editor.model.as_read(prompts), strict=True)
        ]

    def _look_up(self, keys: Sequence[str], reads: Mapping[str, str]) -> dict[str, ItemScore]:
        """The cached scores that are still valid, with the current entry and distance."""
        kept = [key for key in dict.fromkeys(keys) if key in self._known and self._known[key].read == reads[key]]
        if not kept:
            return {}
        found = {key: known.items[None] for key in kept if (known := self._known[key]).query is None}
        queried = [(key, query) for key in kept if (query := self._known[key].query) is not None]
        if not queried:
            return found
        answered = self._editor.answered_by(torch.stack([query for _, query in queried]))
        if answered is None:
            return found
        for (key, _), version, note in zip(queried, answered.versions, answered.notes(), strict=True):
            known = self._known[key]
            if version in known.items:
                known.version, item = version, known.items[version]
                if any(getattr(item, name) != value for name, value in note.items()):
                    item = known.items[version] = replace(item, **note)
                found[key] = item
        return found

    @torch.no_grad()
    def _score_anew(
        self, stale: Sequence[str], asked: Mapping[str, EditRequest], reads: Mapping[str, str]
    ) -> dict[str, ItemScore]:
        again = [*self._again(stale, asked)] if self._reuses_batches else []
        held = {key for batch in again for key in batch}
        first: list[tuple[str, ...]] = []
        rest: list[tuple[str, ...]] = []
        for batch in self._together([key for key in stale if key not in held], asked):
            (rest if all(key in self._known for key in batch) else first).append(batch)
        items: dict[str, ItemScore] = {}
        model = self._editor.model
        handle = model.intercept(_note_query, first=True)
        try:
            with model.engine.remembering(drops_unused=False) if self._reuses_batches else nullcontext():
                for batch in (*again, *first):
                    items |= self._score_batch(batch, asked)
            for batch in rest:
                items |= self._score_batch(batch, asked)
        finally:
            handle.remove()
        scored = {key: items[key] for key in stale}
        batches = {key: batch for batch in first for key in batch}
        for key, version in self._versions(scored, asked).items():
            before, item = self._known.get(key), scored[key]
            is_same_text = before is not None and before.read == reads[key]
            earlier = before.items if self._keeps_versions and before and is_same_text else {}
            batch = before.batch if before else batches[key]
            known = self._known[key] = _Known(item.query, version, {**earlier, version: item}, batch, reads[key])
            if earlier:
                self._with_earlier.append(known)
        return scored

    def _versions(self, scored: Mapping[str, ItemScore], asked: Mapping[str, EditRequest]) -> dict[str, Hashable]:
        """The version that answered each scored request, as far as its score can be reused."""
        versions: dict[str, Hashable] = {}
        queries = {key: item.query for key, item in scored.items() if item.query is not None}
        if queries:
            answered = self._editor.answered_by(torch.stack([*queries.values()]))
            if answered is not None:
                versions = dict(zip(queries, answered.versions, strict=True))
        readings = self._editor.model.readings([asked[key].prompt for key in scored])
        elsewhere = (key for key, reading in zip(scored, readings, strict=True) if reading.network is not None)
        return versions | dict.fromkeys(elsewhere)

    def _score_batch(self, batch: Sequence[str], asked: Mapping[str, EditRequest]) -> Iterable[tuple[str, ItemScore]]:
        model = self._editor.model
        return zip(batch, model.score_batch([asked[key] for key in batch]), strict=True)

    def _again(self, stale: Sequence[str], asked: Mapping[str, EditRequest]) -> Iterator[tuple[str, ...]]:
        """The original batches that are rescored unchanged."""
        n_stale = Counter(self._known[key].batch for key in stale if key in self._known)
        for batch, n in n_stale.items():
            # A resumed run may have lower limits than the batch was made with.
            if (
                2 * n >= len(batch)
                and all(key in asked for key in batch)
                and [*self._together(batch, asked)] == [batch]
            ):
                yield batch

    def _together(self, keys: Sequence[str], asked: Mapping[str, EditRequest]) -> Iterator[tuple[str, ...]]:
        model = self._editor.model
        for chunk in model.score_batches([asked[key] for key in keys]):
            yield tuple(keys[i] for i in chunk)


def _hashable(value: Any) -> Hashable:
    """Converts lists, into which JSON turns tuples, back to tuples."""
    return tuple(_hashable(part) for part in value) if isinstance(value, list | tuple) else value


def _note_query(call: LayerCall) -> Tensor:
    # A layer that is called several times a pass is looked up at its first call.
    if call.state.step == 0 and call.state.activation is None:
        call.state.activation = call.query.detach()
    return call.output
