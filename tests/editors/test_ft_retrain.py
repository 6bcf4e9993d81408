"""Retraining: when it happens, from what, and what it remembers."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from grace_bench.data.requests import EditRequest
from grace_bench.editors.ft import FineTune
from grace_bench.editors.ft_retrain import FineTuneRetrain
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]

each_task = pytest.mark.parametrize("task", ["classification", "qa", "completion", "language_modelling"])


def is_answered(model: EditableModel, request: EditRequest) -> bool:
    batch = model.encode_batch([request.prompt], [request.target])
    with torch.no_grad():
        return model.task.answered(model.logits(batch), batch)


def weight(model: EditableModel) -> torch.Tensor:
    return next(model.layer.parameters()).detach().clone()


def test_until_the_first_retraining_it_fine_tunes(make_model: MakeModel, make_requests: MakeRequests) -> None:
    requests = make_requests("completion")[:3]
    ours, plain = make_model("completion"), make_model("completion")
    editor, reference = FineTuneRetrain(model=ours, retrain_every=4), FineTune(model=plain)
    for request in requests:
        assert editor.edit_text(request.prompt, request.target) == reference.edit_text(request.prompt, request.target)
    assert torch.equal(weight(ours), weight(plain))


def test_retraining_starts_from_the_original_weights(make_model: MakeModel, make_requests: MakeRequests) -> None:
    requests = make_requests("qa")[:3]
    model = make_model("qa")
    original = weight(model)
    # Steps this small leave the weights where retraining put them first.
    editor = FineTuneRetrain(model=model, retrain_every=3, lr=1e-9, n_iter=1)
    with torch.no_grad():
        next(model.layer.parameters()).add_(0.1)
    for request in requests:
        editor.edit_text(request.prompt, request.target)
    torch.testing.assert_close(weight(model), original, rtol=0, atol=1e-6)


@each_task
def test_after_a_retraining_every_edit_is_answered(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    requests = make_requests(task)[:4]
    model = make_model(task)
    # One step an edit fixes none of them by itself.
    editor = FineTuneRetrain(model=model, retrain_every=4, n_epochs=200, lr=3e-3, n_iter=1)
    for request in requests[:3]:
        editor.edit_text(request.prompt, request.target)
    assert not all(is_answered(model, request) for request in requests)
    editor.edit_text(requests[3].prompt, requests[3].target)
    assert all(is_answered(model, request) for request in requests)


def test_a_retraining_ends_once_every_edit_is_answered(make_model: MakeModel, make_requests: MakeRequests) -> None:
    requests = make_requests("classification")[:4]
    steps = []
    for n_epochs in (500, 1000):
        editor = FineTuneRetrain(model=make_model("classification"), retrain_every=4, n_epochs=n_epochs, lr=3e-3)
        outcomes = [editor.edit_text(request.prompt, request.target) for request in requests]
        steps.append(outcomes[-1].steps)
    assert steps[0] == steps[1] < 500


def test_a_full_memory_is_a_uniform_sample_of_all_edits(make_model: MakeModel) -> None:
    kept: Counter[str] = Counter()
    model = make_model("qa")
    for seed in range(200):
        editor = FineTuneRetrain(model=model, memory_size=3, seed=seed)
        for number in range(10):
            editor._remember(f"prompt {number}", "answer")
        assert len(editor.memory) == 3
        kept.update(prompt for prompt, _ in editor.memory)
    # Each is kept with probability 0.3: 60 of 200, give or take 6.5.
    assert len(kept) == 10
    assert all(35 <= count <= 85 for count in kept.values()), kept


def test_answering_needs_the_layers_weights_only(make_model: MakeModel, make_requests: MakeRequests) -> None:
    model, request = make_model("qa"), make_requests("qa")[0]
    editor = FineTuneRetrain(model=model)
    editor.edit_text(request.prompt, request.target)
    assert set(editor.answering_state()) == {"n_edits", f"weights.{model.layer_name}.weight"}
    assert editor.state_dict()["memory"] == [[request.prompt, request.target]]


@pytest.mark.parametrize("option", ["retrain_every", "memory_size", "n_epochs", "batch_size"])
def test_an_option_out_of_range_is_named(option: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=rf"editor\.{option}=0 should be a whole number, at least 1"):
        FineTuneRetrain(model=make_model("qa"), **{option: 0})  # type: ignore[arg-type]
