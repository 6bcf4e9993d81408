"""Training of SERAC's networks (Mitchell et al., ICML 2022, section 3.2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from grace_bench.data.requests import EditRequest
from grace_bench.editors._meta.training import MetaTraining
from grace_bench.editors._serac.networks import SeracNetworks
from grace_bench.models.editable import EditableModel
from grace_bench.models.network import Network
from grace_bench.models.padding import embedding_of

_MAX_GRAD_NORM = 1.0
_LONGEST_WORD = 3
"""The largest number of tokens of a drawn word."""
_LEAST = 1e-6
"""The least distance, whose logarithm is finite."""


class SeracTraining(MetaTraining[SeracNetworks]):
    """Trains the scope classifier and the counterfactual model side by side, each by its own loss.

    Of each edit in a batch, one input is in scope: its own prompt or an equivalent, each half of the time. Out of its
    scope are those of the other edits, everybody's locality probes, and inputs with another word in the place of a
    drawn one. The classifier's loss is the binary cross-entropy of the similarities of edits and inputs; of those out
    of scope, the mean of all and the mean of each input's most similar edit count alike, since a memory holds more
    edits than a batch. The counterfactual model's loss is the cross-entropy of the edit's target after the edit and the
    input.

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
        # Words that training lacks keep their places among the others.
        for part in (networks.classifier, networks.counterfactual):
            if (embedding := embedding_of(part)) is not None:
                embedding.requires_grad_(False)
        super().__init__(model=model, networks=networks, train=train, lr=lr, generator=generator)
        self.counterfactual = counterfactual
        self.embed = embed
        self.apart = apart
        self.in_context = in_context
        self.batch_size = batch_size
        tokens = sorted({*range(len(model.tokenizer))} - model.tokens.special_ids)
        self._vocabulary = [token for token in tokens if self._readable([token]).isalnum()]
        """The tokens that words are drawn from."""

    def step(self) -> None:
        prompts, targets, inputs, others = self._draw()
        scope_loss, accuracy = self._scope(prompts, inputs, others)
        texts = [self.in_context(*example) for example in zip(prompts, targets, inputs, strict=True)]
        batch = self.model.encode_batch(texts, targets)
        logits = self.counterfactual.logits(batch)
        loss = self.model.task.loss(logits, batch)
        self.check_finite(scope_loss + loss)
        self.optimizer.zero_grad()
        (scope_loss + loss).backward()
        nn.utils.clip_grad_norm_(self.networks.classifier.parameters(), _MAX_GRAD_NORM)
        nn.utils.clip_grad_norm_(self.networks.counterfactual.parameters(), _MAX_GRAD_NORM)
        self.optimizer.step()
        self.history.append([float(scope_loss.detach()), accuracy, float(loss.detach()), self.success(logits, batch)])

    def _draw(self) -> tuple[list[str], list[str], list[str], list[str]]:
        """Draws prompts and targets of edits, an input in the scope of each, and inputs out of everybody's."""
        facts = [*self.of_fact]
        order = torch.randperm(len(facts), generator=self.generator)[: self.batch_size].tolist()
        edits = [self.one_of(self.of_fact[facts[i]]) for i in order]
        inputs = [(edit if self._tosses() else self.one_of(self.equivalents(edit))).prompt for edit in edits]
        edited = {edit.prompt for edit in edits}
        others = [probe for edit in edits if edit.locality and (probe := self._one_probe(edit)) not in edited]
        swapped = [self._swapped(edit, asked) for edit, asked in zip(edits, inputs, strict=True)]
        prompts, targets, inputs, near_misses = (list(column) for column in zip(*swapped, strict=True))
        return prompts, targets, inputs, others + [text for text in near_misses if text]

    def _swapped(self, edit: EditRequest, asked: str) -> tuple[str, str, str, str]:
        """Draws words for about a quarter of those that an edit and its input share, and for half of all targets.

        A drawn target is another request's or a drawn word. The training requests are few; so names that none of them
        has are compared and copied too.

        Returns:
            The edit's prompt and target, the input, and the input with another token in one of the drawn words, which
            is about something else; empty if no word was drawn.
        """
        prompt, target = edit.prompt, str(edit.target)
        if not self._vocabulary:
            return prompt, target, asked, ""
        if self._tosses():
            others = str(self.one_of(self.train).target)
            target = others if self._tosses() else self._readable([*self._tokens()])
        shared = sorted({*prompt.split()} & {*asked.split()}) if self._tosses() else ()
        drawn = {word: [*self._tokens()] for word in shared if self._tosses()}
        if not drawn:
            return prompt, target, asked, ""
        new = {word: self._readable(tokens) for word, tokens in drawn.items()}
        word = [*drawn][self._one_below(len(drawn))]
        drawn[word][self._one_below(len(drawn[word]))] = self._token()
        other = {**new, word: self._readable(drawn[word])}
        near_miss = _with_words(asked, other) if other != new else ""
        return _with_words(prompt, new), target, _with_words(asked, new), near_miss

    def _tosses(self) -> bool:
        return self._one_below(2) == 0

    def _one_below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def _tokens(self) -> Iterator[int]:
        return (self._token() for _ in range(1 + self._one_below(_LONGEST_WORD)))

    def _token(self) -> int:
        return self._vocabulary[self._one_below(len(self._vocabulary))]

    def _readable(self, tokens: list[int]) -> str:
        return "".join(self.model.tokens.decode(tokens).split())

    def _one_probe(self, edit: EditRequest) -> str:
        return edit.locality[self._one_below(len(edit.locality))].prompt

    def _scope(self, prompts: list[str], inputs: list[str], others: list[str]) -> tuple[Tensor, float]:
        """The classifier's loss, and its accuracy on inputs given all edits of the batch."""
        n = len(prompts)
        embedded = self.embed(prompts + inputs + others)
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


def _with_words(text: str, new: Mapping[str, str]) -> str:
    """Returns a text with some of its words replaced.

    >>> _with_words("the river of Rome", {"Rome": "Lima"})
    'the river of Lima'
    """
    return " ".join(new.get(word, word) for word in text.split())
