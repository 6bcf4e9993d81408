"""Training of SERAC's networks (Mitchell et al., ICML 2022, section 3.2)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from grace_bench.data.requests import EditRequest
from grace_bench.editors._meta.training import MetaTraining
from grace_bench.editors._serac.networks import SeracNetworks
from grace_bench.models.editable import EditableModel
from grace_bench.models.network import Network

_MAX_GRAD_NORM = 1.0
_LEAST = 1e-6
"""The least distance, whose logarithm is finite."""


class SeracTraining(MetaTraining[SeracNetworks]):
    """Trains the scope classifier and the counterfactual model side by side, each by its own loss.

    Of each edit in a batch, one input is in scope: its own prompt or an equivalent. Out of its scope are those of the
    other edits and everybody's locality probes. The classifier's loss is the binary cross-entropy of the similarities
    of edits and inputs; of those out of scope, the mean of all and the mean of each input's most similar edit count
    alike, since a memory holds more edits than a batch. The counterfactual model's loss is the cross-entropy of the
    edit's target after the edit and the input.

    Args:
        model: The unedited model.
        networks: The networks to train.
        counterfactual: The counterfactual model among them, as a network of the model's task.
        embed: Embeds texts by the classifier: n texts, (n, D).
        apart: Turns (B, 1, D) and (1, N, D) embeddings into (B, N) distances.
        in_context: Returns the text that is read for an input, given the edit's prompt and target.
        train: The requests to learn from.
        batch_size: Edits in a step.
        lr: Learning rate of Adam.
        generator: Draws the examples.

    Raises:
        UserError: If the requests are all about one fact.
    """

    columns = ("scope_loss", "scope_accuracy", "counterfactual_loss", "counterfactual_success")

    def __init__(
        self,
        *,
        model: EditableModel,
        networks: SeracNetworks,
        counterfactual: Network,
        embed: Callable[[Sequence[str]], Tensor],
        apart: Callable[[Tensor, Tensor], Tensor],
        in_context: Callable[[str, str, str], str],
        train: Sequence[EditRequest],
        batch_size: int,
        lr: float,
        generator: torch.Generator,
    ) -> None:
        networks.requires_grad_(True)
        super().__init__(model=model, networks=networks, train=train, lr=lr, generator=generator)
        self.counterfactual = counterfactual
        self.embed = embed
        self.apart = apart
        self.in_context = in_context
        self.batch_size = batch_size

    def step(self) -> None:
        edits, inputs, others = self._draw()
        scope_loss, accuracy = self._scope(edits, inputs, others)
        texts = [self.in_context(e.prompt, str(e.target), i) for e, i in zip(edits, inputs, strict=True)]
        batch = self.model.encode_batch(texts, [edit.target for edit in edits])
        logits = self.counterfactual.logits(batch)
        loss = self.model.task.loss(logits, batch)
        self.check_finite(scope_loss + loss)
        self.optimizer.zero_grad()
        (scope_loss + loss).backward()
        nn.utils.clip_grad_norm_(self.networks.classifier.parameters(), _MAX_GRAD_NORM)
        nn.utils.clip_grad_norm_(self.networks.counterfactual.parameters(), _MAX_GRAD_NORM)
        self.optimizer.step()
        self.history.append([float(scope_loss.detach()), accuracy, float(loss.detach()), self.success(logits, batch)])

    def _draw(self) -> tuple[list[EditRequest], list[str], list[str]]:
        """Draws edits of different facts, an input in the scope of each, and inputs out of everybody's."""
        facts = [*self.of_fact]
        order = torch.randperm(len(facts), generator=self.generator)[: self.batch_size].tolist()
        edits = [self.one_of(self.of_fact[facts[i]]) for i in order]
        inputs = [self.one_of([edit, *self.equivalents(edit)]).prompt for edit in edits]
        edited = {edit.prompt for edit in edits}
        others = [self._one_probe(edit) for edit in edits if edit.locality]
        return edits, inputs, [prompt for prompt in others if prompt not in edited]

    def _one_probe(self, edit: EditRequest) -> str:
        return edit.locality[int(torch.randint(len(edit.locality), (), generator=self.generator))].prompt

    def _scope(self, edits: Sequence[EditRequest], inputs: list[str], others: list[str]) -> tuple[Tensor, float]:
        """The classifier's loss, and its accuracy on inputs given all edits of the batch."""
        n = len(edits)
        embedded = self.embed([edit.prompt for edit in edits] + inputs + others)
        apart = self.apart(embedded[n:, None], embedded[None, :n])
        belongs = torch.eye(len(inputs) + len(others), n, dtype=torch.bool, device=apart.device)
        outside = -torch.log(-torch.expm1(-apart.clamp(min=_LEAST)))
        # The least of the losses' arguments, where an input's own edit does not count.
        nearest = outside.masked_fill(belongs, 0.0).amax(dim=1)
        loss = apart[belongs].mean() + (outside[~belongs].mean() + nearest.mean()) / 2
        is_near = apart.detach().amin(dim=1) < -torch.tensor(0.5).log()
        found = is_near & (apart.detach().argmin(dim=1) == torch.arange(len(apart), device=apart.device))
        right = torch.cat([found[:n], ~is_near[n:]])
        return loss, float(right.float().mean())
