"""The edited model as lm-evaluation-harness sees it. Importing this module imports lm-eval."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from grace_bench.models.encoding import pad
from grace_bench.models.network import Network

Answer = TypeVar("Answer")
TokenRequest = tuple[Any, list[int], list[int]]
"""A log-likelihood request of lm-eval: its texts or None, the tokens of its context, those of its continuation."""


@dataclass(frozen=True)
class _Continued:
    """A context and continuation, cut on the left to the model's longest input.

    Attributes:
        context: The tokens of the context.
        continuation: The tokens of the continuation.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], max_length: int) -> "_Continued":
        # The last token is predicted and not read.
        n_context = max_length + 1 - len(continuation)
        if n_context < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens is longer than the model's {max_length}")
        return cls(tuple(context[-n_context:]), tuple(continuation))

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that the model reads."""
        return self.context + self.continuation[:-1]


class EditedLM(HFLM):
    """A network with its editor, asked through lm-eval's own class for Hugging Face models.

    The network's weights as edited, its interceptors and its prompt interceptors all answer. A model without
    interceptors is asked exactly as lm-eval would ask it. For interceptors, the query is the last token of a request's
    context; the context decides once which edit applies, for all of its continuations. Prompt interceptors are given
    the text of the context.

    Args:
        network: The network. Its module is a causal or encoder-decoder model of transformers, with a tokenizer.
        batch_size: Maximum number of inputs in one forward pass. All continuations of a context are in one pass, which
            may be larger for them.
        batch_tokens: Fewer inputs are in a pass where the longest of them would need more tokens than this together.
    """

    def __init__(self, network: Network, *, batch_size: int, batch_tokens: int = 16384) -> None:
        # lm-eval may give the tokenizer another padding token.
        super().__init__(pretrained=network.module, tokenizer=copy.deepcopy(network.tokenizer), batch_size=batch_size)
        self.network = network
        self.batch_size_per_gpu: int = batch_size
        self._batch_size, self._batch_tokens = batch_size, batch_tokens

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Returns for each context and continuation its log-likelihood, and whether it is the greedy answer."""
        return self._as_read(requests, lambda lm, asked: super().loglikelihood(asked, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Returns the log-likelihood of running text."""
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Returns free answers."""
        return self._as_read(requests, lambda lm, asked: super().generate_until(asked, disable_tqdm=True))

    def get_model_info(self) -> dict[str, Any]:
        """Returns nothing: lm-eval would look the model up on the hub."""
        return {}

    def _as_read(
        self, requests: Sequence[Instance], ask: Callable[["EditedLM", list[Instance]], list[Answer]]
    ) -> list[Answer]:
        """Asks each request with the text that is read in place of its context, of the network that answers it."""
        readings = self.network.readings([request.args[0] for request in requests])
        answers: dict[int, Answer] = {}
        for network in dict.fromkeys(reading.network for reading in readings):
            rows = [row for row, reading in enumerate(readings) if reading.network is network]
            asked = [
                replace(requests[row], arguments=(readings[row].text, *requests[row].args[1:]), resps=[])
                for row in rows
            ]
            lm = (
                self
                if network is None
                else EditedLM(network, batch_size=self._batch_size, batch_tokens=self._batch_tokens)
            )
            answers.update(zip(rows, ask(lm, asked), strict=True))
        return [answers[row] for row in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
        most = max(1, min(self._batch_size, self._batch_tokens // min(longest, self.max_length)))
        if not self.network.is_intercepted:
            return self._in_batches_of(most, requests)
        contexts = [tuple(context) for _, context, _ in requests]
        if self.backend == "causal":
            asked = [_Continued.of(context, continuation, self.max_length) for _, context, continuation in requests]
            contexts = [one.context for one in asked]
        answers: dict[int, tuple[float, bool]] = {}
        for rows in _packed(contexts, most):
            if self.backend == "causal":
                answered = self._continuations([asked[row] for row in rows])
            else:
                answered = self._in_batches_of(len(rows), [requests[row] for row in rows])
            answers.update(zip(rows, answered, strict=True))
        return [answers[row] for row in range(len(requests))]

    def _in_batches_of(self, n: int, requests: list[TokenRequest]) -> list[tuple[float, bool]]:
        self.batch_size_per_gpu = n
        try:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm=True)
            return found
        finally:
            self.batch_size_per_gpu = self._batch_size

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if attn_mask is None or not self.network.is_intercepted:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        contexts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(inps, attn_mask, strict=True)]
        with self.network.querying(None, leaders=_leaders(contexts)):
            logits = super()._model_call(inps, attn_mask, labels)
        return logits

    def _continuations(self, asked: Sequence[_Continued]) -> list[tuple[float, bool]]:
        """The answers to requests in one forward pass, which reads every text once."""
        distinct = list({(one.context, one.read): one for one in asked}.values())
        row_of = {(one.context, one.read): row for row, one in enumerate(distinct)}
        query = torch.tensor([len(one.context) - 1 for one in distinct])
        # As in lm-eval itself, a causal model needs no mask where padding comes last.
        ids, _ = pad([one.read for one in distinct], 0, "right")
        with self.network.querying(query, leaders=_leaders([one.context for one in distinct])):
            logits = self._model_call(ids.to(self.device))
        scores = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        answers = []
        for one in asked:
            start = len(one.context) - 1
            of_tokens = scores[row_of[one.context, one.read], start : start + len(one.continuation)]
            wanted = torch.tensor(one.continuation, device=of_tokens.device)
            is_greedy = bool((of_tokens.argmax(dim=-1) == wanted).all())
            answers.append((float(of_tokens.gather(1, wanted[:, None]).sum()), is_greedy))
        return answers


def _leaders(contexts: Sequence[tuple[int, ...]]) -> Tensor:
    """(B,) for each row the first that has its context."""
    first: dict[tuple[int, ...], int] = {}
    return torch.tensor([first.setdefault(context, row) for row, context in enumerate(contexts)])


def _packed(contexts: Sequence[tuple[int, ...]], most: int) -> Iterator[list[int]]:
    """Yields the rows of batches of at most `most` rows, the longest contexts first.

    All rows of one context are in one batch, which only they make larger.
    """
    of: dict[tuple[int, ...], list[int]] = {}
    for row, context in enumerate(contexts):
        of.setdefault(context, []).append(row)
    batch: list[int] = []
    for context in sorted(of, key=lambda context: (-len(context), context)):
        if batch and len(batch) + len(of[context]) > most:
            yield batch
            batch = []
        batch += of[context]
    if batch:
        yield batch
