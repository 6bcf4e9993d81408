"""Which of the edited prompts is most like a question: by shared words (BM25), or by embeddings."""

import math
import re
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grace_bench.editing.batch import State
from grace_bench.editors._retrieval.encoders import Encoder
from grace_bench.editors._rows import Rows

Found = list[tuple[int, float]]
"""Numbers of prompts with their similarity, the most similar first, the newest first in a tie."""
_WORD = re.compile(r"\w+")
_PAIRS = 2**24
"""Maximum number of similarities in memory at once."""


class Index(ABC):
    """Prompts that can be searched; a similarity is 1 for the prompt itself."""

    width: int = 0
    """How many numbers it keeps of each prompt."""

    @abstractmethod
    def add(self, prompt: str) -> None:
        """Adds a prompt at the end.

        Raises:
            EditFailure: If it cannot be embedded.
        """

    @abstractmethod
    def truncate(self, n: int) -> None:
        """Removes all but the first `n` prompts."""

    @abstractmethod
    def search(self, questions: Sequence[str], among: npt.NDArray[np.bool_], k: int) -> list[Found]:
        """Returns the `k` prompts most similar to each question.

        Args:
            questions: The questions.
            among: (N,) which prompts may be found.
            k: How many, at most.
        """

    def state_dict(self) -> State:
        """Returns what cannot be computed again from the prompts."""
        return {}

    @abstractmethod
    def load(self, prompts: Sequence[str], state: Mapping[str, Any]) -> None:
        """Restores the index of prompts, given a state from `state_dict`."""


class Bm25Index(Index):
    """BM25 over the prompts' words, as in Lucene (Robertson & Zaragoza 2009; Kamphuis et al. 2020).

    A question and a prompt score the sum of idf(w) f / (f + k1 (1 - b + b l / L)) over the question's words w, where f
    counts w in the prompt, l is the prompt's length, L the mean length, and idf(w) = ln(1 + (N - n + 1/2) / (n + 1/2))
    with n of N prompts that hold w. The similarity is that score as a share of what the prompt scores itself, at most
    1: the share of the prompt that the question repeats, where rare words count more. Unlike the score it does not grow
    with the number of edits, so that one threshold serves a whole stream.

    Sums are over the prompts that hold a word, so that adding a prompt costs nothing but its words. (`bm25s` computes
    the same scores, and all of them anew for every prompt that is added.)
    """

    k1 = 1.5
    b = 0.75

    def __init__(self) -> None:
        self._words: list[Counter[str]] = []
        self._lengths = array("q")
        self._total = 0
        self._postings: dict[str, tuple[array[int], array[int]]] = {}

    def add(self, prompt: str) -> None:
        counts = words_of(prompt)
        for word, count in counts.items():
            prompts, counted = self._postings.setdefault(word, (array("q"), array("q")))
            prompts.append(len(self._words))
            counted.append(count)
        self._words.append(counts)
        self._lengths.append(counts.total())
        self._total += counts.total()

    def truncate(self, n: int) -> None:
        while len(self._words) > n:
            for word in self._words.pop():
                for column in self._postings[word]:
                    column.pop()
                if not self._postings[word][0]:
                    del self._postings[word]
            self._total -= self._lengths.pop()

    def scores(self, question: Mapping[str, int]) -> npt.NDArray[np.float64]:
        """Returns the (N,) scores of the prompts, given how often each word occurs in the question."""
        scores = np.zeros(len(self._words))
        lengths = np.array(self._lengths, dtype=np.float64)
        for word, count in question.items():
            if word in self._postings:
                prompts, counted = (np.array(column) for column in self._postings[word])
                scores[prompts] += count * self._weight(word, counted, lengths[prompts] / self._mean)
        return scores

    def search(self, questions: Sequence[str], among: npt.NDArray[np.bool_], k: int) -> list[Found]:
        return [self._search(question, among, k) for question in questions]

    def load(self, prompts: Sequence[str], state: Mapping[str, Any]) -> None:
        self.truncate(0)
        for prompt in prompts:
            self.add(prompt)

    def _search(self, question: str, among: npt.NDArray[np.bool_], k: int) -> Found:
        scores = np.where(among, self.scores(words_of(question)), 0.0)
        least = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
        best = np.flatnonzero((scores >= least) & (scores > 0))
        best = best[np.lexsort((-best, -scores[best]))][:k]
        return [(int(i), min(1.0, float(scores[i]) / self._own_score(int(i)))) for i in best]

    @property
    def _mean(self) -> float:
        return max(self._total / len(self._lengths), 1.0)

    def _own_score(self, index: int) -> float:
        """What a prompt scores as a question."""
        relative = self._lengths[index] / self._mean
        return sum(count * float(self._weight(word, count, relative)) for word, count in self._words[index].items())

    def _weight(self, word: str, counted: Any, relative_length: Any) -> Any:
        n_with, n_prompts = len(self._postings[word][0]), len(self._words)
        idf = math.log(1 + (n_prompts - n_with + 0.5) / (n_with + 0.5))
        return idf * counted / (counted + self.k1 * (1 - self.b + self.b * relative_length))


class EmbeddingIndex(Index):
    """Cosine similarity of embeddings, which lie in a tensor that grows.

    Args:
        encoder: Embeds prompts.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.width = encoder.width
        self._keys = Rows(0, self.width, device=encoder.device)

    def add(self, prompt: str) -> None:
        self._keys.extend(self._encoder([prompt]))

    def truncate(self, n: int) -> None:
        self._keys.truncate(n)

    def search(self, questions: Sequence[str], among: npt.NDArray[np.bool_], k: int) -> list[Found]:
        if not among.any():
            return [[] for _ in questions]
        keys, step = self._keys.tensor, max(1, _PAIRS // len(among))
        candidates = torch.from_numpy(among).to(keys.device)
        return [
            found
            for start in range(0, len(questions), step)
            for found in nearest(self._encoder(questions[start : start + step]), keys, k=k, among=candidates)
        ]

    def state_dict(self) -> State:
        return {"keys": self._keys.tensor}

    def load(self, prompts: Sequence[str], state: Mapping[str, Any]) -> None:
        if state["keys"].shape != (len(prompts), self.width):
            raise RuntimeError(f"keys are {tuple(state['keys'].shape)}, not {(len(prompts), self.width)}")
        self._keys.clear()
        self._keys.extend(state["keys"].to(self._encoder.device, torch.float32))


def nearest(queries: Tensor, keys: Tensor, *, k: int, among: Tensor | None = None) -> list[Found]:
    """Returns the `k` keys most similar to each query, with their cosine similarities.

    Similarities are computed in float32 for all pairs, and exactly for those that may be among the best, so that they
    depend neither on the other queries nor on the other keys.

    Args:
        queries: (B, D) unit vectors.
        keys: (N, D) unit vectors.
        k: How many, at most.
        among: (N,) bool, which keys may be found; None for all.
    """
    rough = queries @ keys.T
    if among is not None:
        rough = rough.masked_fill(~among, -2.0)
    least = rough.topk(min(k, len(keys)), dim=1).values[:, -1:]
    # A float32 product of unit vectors is off by at most D units of 2^-24, however it is summed.
    is_near = (rough >= least - keys.shape[1] * 2.0**-22) & (rough > -1.5)
    found: list[Found] = []
    for query, row in zip(queries, is_near, strict=True):
        near = row.nonzero()[:, 0]
        exact = (keys[near].cpu().double() * query.cpu().double()).sum(dim=1).tolist()
        pairs = [(index, round(similarity, 9)) for index, similarity in zip(near.tolist(), exact, strict=True)]
        found.append(sorted(pairs, key=lambda pair: (-pair[1], -pair[0]))[:k])
    return found


def words_of(text: str) -> Counter[str]:
    """Returns how often each word occurs in a text, in whatever case.

    >>> words_of("The river, the Seine")
    Counter({'the': 2, 'river': 1, 'seine': 1})
    """
    return Counter(_WORD.findall(text.casefold()))
