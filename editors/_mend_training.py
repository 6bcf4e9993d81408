"""The meta-training of MEND's editor networks, step by step."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grace_bench.common.progress import Progress
from grace_bench.data.artifacts import drop_artifact, load_artifact, save_artifact
from grace_bench.data.derived import rephrased
from grace_bench.data.requests import EditRequest
from grace_bench.editors._mend_networks import EditorNetworks, edit_gradients, updated
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED, EncodedBatch

_CHECKPOINT_EVERY = 50
_WINDOW = 50
"""Steps over which figures are averaged."""


class MetaTraining:
    """Trains editor networks on single edits of a model, which itself never changes (Mitchell et al. 2022).

    An edit's equivalent is one of its rephrases or another request about the same fact, or else the edit itself; the
    edit loss is the edited model's loss on it. The locality loss is the KL divergence from the unedited model's
    predictions to the edited model's, at the labelled positions of a request about another fact.

    Args:
        model: The unedited model.
        layers: The edited linear layers, by dotted path.
        networks: The networks to train, on the model's device.
        train: The requests to learn from.
        batch_size: Edits in a step, each made on its own.
        lr: Learning rate of Adam.
        c_edit: Weight of the edit loss.
        c_loc: Weight of the locality loss.
        generator: Draws the examples.

    Raises:
        UserError: If the requests are all about one fact.
    """

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: dict[str, nn.Module],
        networks: EditorNetworks,
        train: Sequence[EditRequest],
        batch_size: int,
        lr: float,
        c_edit: float,
        c_loc: float,
        generator: torch.Generator,
    ) -> None:
        self.model = model
        self.layers = layers
        self.networks = networks
        self.train = train
        self.batch_size = batch_size
        self.c_edit = c_edit
        self.c_loc = c_loc
        self.generator = generator
        self.optimizer = torch.optim.Adam(networks.parameters(), lr=lr)
        self.history: list[list[float]] = []
        """Edit loss, success and locality loss of every step so far."""
        self._of_fact: dict[str, list[EditRequest]] = defaultdict(list)
        for request in train:
            self._of_fact[request.fact_id].append(request)
        if len(self._of_fact) < 2:
            raise UserError("meta-training needs requests for training about at least two facts")

    def run(self, n_steps: int, *, name: str, key: str, progress: Progress | None = None) -> float:
        """Trains up to a number of steps, from where an interrupted run of the same key stopped.

        Args:
            n_steps: The number of steps, those before the interruption included.
            name: Of the editor, under which checkpoints are saved.
            key: Of what is trained.
            progress: Called after every step.

        Returns:
            The seconds that all steps took.

        Raises:
            UserError: If the loss is no longer finite.
        """
        partial, seconds = _partial(key), 0.0
        interrupted = load_artifact(name, partial)
        if interrupted is not None:
            self.load_state_dict(interrupted[0])
            seconds = float(interrupted[1]["seconds"])
        started = time.perf_counter() - seconds
        for done in range(len(self.history) + 1, n_steps + 1):
            self.step()
            if done % _CHECKPOINT_EVERY == 0:
                save_artifact(name, partial, self.state_dict(), {"seconds": str(time.perf_counter() - started)})
            if progress is not None:
                progress(f"meta-training {name}", done, n_steps)
        return time.perf_counter() - started

    def forget(self, *, name: str, key: str) -> None:
        """Removes the checkpoint of a run that is saved whole."""
        drop_artifact(name, _partial(key))

    def step(self) -> None:
        """Takes one step of the meta-optimiser.

        Raises:
            UserError: If the loss is no longer finite.
        """
        task = self.model.task
        edits, equivalents, others = zip(*(self._draw() for _ in range(self.batch_size)), strict=True)
        _, gradients = edit_gradients(self.model, self.layers, self._encoded(edits))
        self.networks.observe(gradients)
        equivalent, other = self._encoded(equivalents), self._encoded(others)
        with torch.no_grad():
            unedited = self.model.logits(other)
        with updated(self.layers, self.networks(gradients)):
            answered, kept = self.model.logits(equivalent), self.model.logits(other)
        edit_loss = task.loss(answered, equivalent)
        locality_loss = _divergence(unedited, kept, other)
        loss = self.c_edit * edit_loss + self.c_loc * locality_loss
        if not loss.isfinite():
            step = len(self.history) + 1
            raise UserError(f"meta-training diverged at step {step}: a smaller editor.lr or editor.edit_lr may help")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        n_right = sum(task.answered(answered[i : i + 1], equivalent.row(i)) for i in range(self.batch_size))
        self.history.append([float(edit_loss.detach()), n_right / self.batch_size, float(locality_loss.detach())])

    def figures(self) -> dict[str, float]:
        """Returns the mean losses and success over the first and over the last steps."""
        history = torch.tensor(self.history, dtype=torch.float64)
        first, last = history[:_WINDOW].mean(dim=0).tolist(), history[-_WINDOW:].mean(dim=0).tolist()
        names = ("edit_loss", "edit_success", "locality_kl")
        return {f"{name}_first": value for name, value in zip(names, first, strict=True)} | {
            f"{name}_last": value for name, value in zip(names, last, strict=True)
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state from which training resumes to the same bits."""
        return {
            **{f"networks.{name}": tensor for name, tensor in self.networks.state_dict().items()},
            **{
                f"optimizer.{index}.{name}": tensor
                for index, moments in self.optimizer.state_dict()["state"].items()
                for name, tensor in moments.items()
            },
            "generator": self.generator.get_state(),
            "history": torch.tensor(self.history, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a state from `state_dict`."""
        moments: dict[int, dict[str, Any]] = defaultdict(dict)
        networks = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition(".")
            if kind == "networks":
                networks[rest] = tensor
            elif kind == "optimizer":
                index, _, moment = rest.partition(".")
                moments[int(index)][moment] = tensor
        self.networks.load_state_dict(networks)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(moments)})
        self.generator.set_state(state["generator"])
        self.history = state["history"].tolist()

    def _draw(self) -> tuple[EditRequest, EditRequest, EditRequest]:
        """Draws an edit, an equivalent and a request about another fact."""
        edit = other = self._one_of(self.train)
        siblings = (request for request in self._of_fact[edit.fact_id] if request.id != edit.id)
        equivalents = [*siblings, *rephrased([edit])] or [edit]
        while other.fact_id == edit.fact_id:
            other = self._one_of(self.train)
        return edit, self._one_of(equivalents), other

    def _one_of(self, requests: Sequence[EditRequest]) -> EditRequest:
        return requests[int(torch.randint(len(requests), (), generator=self.generator))]

    def _encoded(self, requests: Sequence[EditRequest]) -> EncodedBatch:
        return self.model.encode_batch([r.prompt for r in requests], [r.target for r in requests])


def _partial(key: str) -> str:
    return f"{key}-partial"


def _divergence(unedited: Tensor, edited: Tensor, batch: EncodedBatch) -> Tensor:
    """Returns KL(unedited || edited), the mean over the batch's labelled positions."""
    assert batch.labels is not None
    labelled = batch.labels != IGNORED
    return functional.kl_div(
        edited[labelled].float().log_softmax(dim=-1),
        unedited[labelled].float().log_softmax(dim=-1),
        log_target=True,
        reduction="batchmean",
    )
