"""A codebook's past is what the codebook was: for any edits, at each of them, also through a saved state."""

from copy import deepcopy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_bench.editors._grace.codebook import Codebook
from grace_bench.editors._grace.history import History

_coordinate = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 2.5])
_edits = st.lists(st.tuples(_coordinate, _coordinate, st.integers(0, 2)), min_size=1, max_size=16)


@settings(max_examples=settings.default.max_examples * 3 // 2)
@given(
    edits=_edits, trained=st.integers(1, 5), overlap=st.sampled_from(["allow", "shrink"]), n_before=st.integers(0, 8)
)
def test_the_past_is_what_the_codebook_was(
    edits: list[tuple[float, float, int]], trained: int, overlap: str, n_before: int
) -> None:
    codebook = Codebook(eps_init=0.5, overlap=overlap)  # type: ignore[arg-type]
    history = History(codebook)
    reference: list[Codebook] = []
    pending: dict[int, tuple[int, int]] = {}

    def train() -> None:
        for entry, (place, clock) in pending.items():
            history.record_value(place)
            codebook.values[entry] = torch.tensor([float(clock), 1.0])
            # Those who were to be answered by it are, from the edit on that it was trained for.
            for past in reference[clock + 1 :]:
                past.values[entry] = codebook.values[entry]
        pending.clear()

    for clock, (x, y, label) in enumerate(edits):
        if clock == min(n_before, len(edits) - 1):
            train()
            history.clear()
            since = clock
        reference.append(deepcopy(codebook))
        settled = codebook.settle(torch.tensor([x, y]), (label,), lambda: torch.zeros(2), label_mean=float(label))
        if settled.entry in pending:
            train()
        history.record(clock, settled.before, settled.entry)
        pending[settled.entry] = len(history) - 1, clock
        if len(pending) >= trained:
            train()
    reference.append(codebook)
    train()
    again = History(codebook)
    again.load_state_dict(history.state_dict())
    queries = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)) * 3
    for clock in range(since, len(reference)):
        was = reference[clock]
        for past, others in (history.as_of(clock), again.as_of(clock)):
            assert past.labels == was.labels
            assert past.overlap() == was.overlap()
            if len(was):
                for name in ("keys", "radii", "values"):
                    assert torch.equal(getattr(past, name), getattr(was, name))
                assert others >= {e for e in range(len(was)) if not torch.equal(codebook.values[e], was.values[e])}
                assert torch.equal(past.contested(queries), was.contested(queries))
                found, expected = past.retrieve(queries), was.retrieve(queries)
                assert torch.equal(found.entry, expected.entry)
                assert torch.equal(found.distance, expected.distance)
                assert torch.equal(found.hit, expected.hit)
    for n in reversed(range(len(history))):
        history.undo(n)
        was = reference[since + n]
        assert codebook.labels == was.labels
        if len(was):
            for name in ("keys", "radii", "values"):
                assert torch.equal(getattr(codebook, name), getattr(was, name))
