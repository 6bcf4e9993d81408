"""Meta-training of editor networks: what every one is, that it resumes to the same bits, and how examples are drawn."""

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from grace_bench.common.progress import Progress
from grace_bench.data.artifacts import drop_artifact, load_artifact, save_artifact
from grace_bench.data.derived import rephrased
from grace_bench.data.requests import EditRequest
from grace_bench.editors._meta.gradients import EditTokens, seen_gradients, shifted
from grace_bench.editors._meta.networks import AggregatingNetworks
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED, EncodedBatch

_WINDOW = 50
"""Steps over which figures are averaged."""


Networks = TypeVar("Networks", bound=nn.Module)


class MetaTraining(ABC, Generic[Networks]):
    """Trains networks on edits of a model, which itself never changes.

    An edit's equivalent is one of its rephrases or another request about the same fact, or else the edit itself; the
    edit loss is the edited model's loss on it. The locality loss is the KL divergence from the unedited model's
    predictions to the edited model's, at the labelled positions of a request about another fact.

    Args:
        model: The unedited model.
        networks: The networks to train, on the model's device.
        train: The requests to learn from.
        lr: Learning rate of Adam.
        generator: Draws the examples.

    Attributes:
        checkpoint_every: Steps between checkpoints, after which a killed training is resumed.
        columns: The names of a step's figures.

    Raises:
        UserError: If the requests are all about one fact.
    """

    checkpoint_every: ClassVar[int] = 50
    columns: ClassVar[Sequence[str]] = ("edit_loss", "edit_success", "locality_kl")

    def __init__(
        self,
        *,
        model: EditableModel,
        networks: Networks,
        train: Sequence[EditRequest],
        lr: float,
        generator: torch.Generator,
    ) -> None:
        self.model = model
        self.networks = networks
        self.train = train
        self.generator = generator
        self.optimizer = torch.optim.Adam(networks.parameters(), lr=lr)
        self.history: list[list[float]] = []
        """The figures of every step so far, in the order of `columns`."""
        self.of_fact: dict[str, list[EditRequest]] = defaultdict(list)
        """The requests about each fact."""
        for request in train:
            self.of_fact[request.fact_id].append(request)
        if len(self.of_fact) < 2:
            raise UserError("meta-training needs requests for training about at least two facts")

    @abstractmethod
    def step(self) -> None:
        """Takes one step of the meta-optimiser, and appends to `history`.

        Raises:
            UserError: If the loss is no longer finite.
        """

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
            if done % self.checkpoint_every == 0:
                save_artifact(name, partial, self.state_dict(), {"seconds": str(time.perf_counter() - started)})
            if progress is not None:
                progress(f"meta-training {name}", done, n_steps)
        return time.perf_counter() - started

    def forget(self, *, name: str, key: str) -> None:
        """Removes the checkpoint of a run that is saved whole."""
        drop_artifact(name, _partial(key))

    def figures(self) -> dict[str, float]:
        """Returns the mean figures of the first and of the last steps."""
        history = torch.tensor(self.history, dtype=torch.float64)
        first, last = history[:_WINDOW].mean(dim=0).tolist(), history[-_WINDOW:].mean(dim=0).tolist()
        return {f"{name}_first": value for name, value in zip(self.columns, first, strict=True)} | {
            f"{name}_last": value for name, value in zip(self.columns, last, strict=True)
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

    def equivalents(self, edit: EditRequest) -> list[EditRequest]:
        """Returns the equivalents of an edit."""
        siblings = (request for request in self.of_fact[edit.fact_id] if request.id != edit.id)
        return [*siblings, *rephrased([edit])] or [edit]

    def one_of(self, requests: Sequence[EditRequest]) -> EditRequest:
        """Draws a request."""
        return requests[int(torch.randint(len(requests), (), generator=self.generator))]

    def encoded(self, requests: Sequence[EditRequest]) -> EncodedBatch:
        """Encodes requests with their targets."""
        return self.model.encode_batch([r.prompt for r in requests], [r.target for r in requests])

    def success(self, logits: Tensor, batch: EncodedBatch) -> float:
        """Returns the share of a batch's requests that the model answers."""
        n_right = sum(self.model.task.answered(logits[i : i + 1], batch.row(i)) for i in range(len(batch)))
        return n_right / len(batch)

    def check_finite(self, loss: Tensor) -> None:
        """Makes sure that the meta-loss of the present step is finite.

        Raises:
            UserError: If it is not.
        """
        if not loss.isfinite():
            step = len(self.history) + 1
            raise UserError(f"meta-training diverged at step {step}: a smaller editor.lr or editor.edit_lr may help")


class BatchTraining(MetaTraining[AggregatingNetworks]):
    """Trains networks on batches of edits, each batch made by one shift of the weights.

    Gradients reach the networks in two parts: from the meta-loss to the shifts, then through the linear solve.

    Args:
        model: The unedited model.
        layers: The edited linear layers, by dotted path.
        networks: The networks to train, on the model's device.
        tokens: The positions whose gradients the networks see.
        train: The requests to learn from.
        batch_size: Edits in a batch.
        lr: Learning rate of Adam.
        c_loc: Weight of the locality loss.
        max_grad_norm: The largest norm of the networks' gradient; a larger one is scaled down to it.
        generator: Draws the examples.

    Raises:
        UserError: If the requests are all about one fact.
    """

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: dict[str, nn.Module],
        networks: AggregatingNetworks,
        tokens: EditTokens,
        train: Sequence[EditRequest],
        batch_size: int,
        lr: float,
        c_loc: float,
        max_grad_norm: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(model=model, networks=networks, train=train, lr=lr, generator=generator)
        self.layers = layers
        self.tokens = tokens
        self.batch_size = batch_size
        self.c_loc = c_loc
        self.max_grad_norm = max_grad_norm

    def draw(self, n: int) -> tuple[list[EditRequest], list[EditRequest], list[EditRequest]]:
        """Draws n edits of different facts, an equivalent of each, and n requests about facts that none of them edits.

        At most half of the facts are edited; where that is fewer than n, they come again.
        """
        facts = list(self.of_fact)
        order = [facts[i] for i in torch.randperm(len(facts), generator=self.generator).tolist()]
        n_edited = min(n, len(facts) // 2)
        edits = [self.one_of(self.of_fact[order[i % n_edited]]) for i in range(n)]
        unedited = [request for fact in order[n_edited:] for request in self.of_fact[fact]]
        equivalents = [self.one_of(self.equivalents(edit)) for edit in edits]
        return edits, equivalents, [self.one_of(unedited) for _ in range(n)]

    def shifts(self, edits: Sequence[EditRequest]) -> list[Tensor]:
        """Returns the shifts for a batch of edits of the model as it is now; gradients flow to the networks."""
        _, gradients = seen_gradients(self.model, self.layers, self.encoded(edits), self.tokens)
        self.networks.observe(gradients)
        return self.networks.shifts(gradients)

    def locality_loss(self, others: Sequence[EditRequest], shifts: Sequence[Tensor]) -> Tensor:
        """Returns the divergence from the unedited model's predictions under shifts of its weights."""
        batch = self.encoded(others)
        with torch.no_grad():
            unedited = self.model.logits(batch)
        with shifted(self.layers, shifts):
            return divergence(unedited, self.model.logits(batch), batch)

    def descend(self, shifts: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Takes a step of the optimiser, from the gradients of the meta-loss with respect to shifts."""
        self.optimizer.zero_grad()
        torch.autograd.backward(list(shifts), list(gradients))
        nn.utils.clip_grad_norm_(self.networks.parameters(), self.max_grad_norm)
        self.optimizer.step()


def divergence(unedited: Tensor, edited: Tensor, batch: EncodedBatch) -> Tensor:
    """Returns KL(unedited || edited), the mean over the batch's labelled positions."""
    assert batch.labels is not None
    labelled = batch.labels != IGNORED
    return functional.kl_div(
        edited[labelled].float().log_softmax(dim=-1),
        unedited[labelled].float().log_softmax(dim=-1),
        log_target=True,
        reduction="batchmean",
    )


def _partial(key: str) -> str:
    return f"{key}-partial"
