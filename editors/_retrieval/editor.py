"""`RetrievalEditor`: an editor that stores edits, and puts those that a question is about in front of it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from torch import Tensor

from grace_bench.common.options import check_choice, check_not_negative
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.batch import Answered, EditBatch, EditOutcome, NamedEdit, State
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors._retrieval.encoders import Encoder
from grace_bench.editors._retrieval.index import Bm25Index, EmbeddingIndex, Index
from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel

By = Literal["bm25", "embedding"]


class RetrievalEditor(EditorStrategy):
    """Stores edits and changes what the model reads: text about the edits most like a question comes before it.

    A prompt that is edited again replaces its earlier edit. Weights and layers never change.

    Args:
        model: The model to edit.
        by: How the edits most like a question are found: by shared words (`bm25`, see `Bm25Index`), or by the
            cosine similarity of embeddings of the prompts (`embedding`).
        n_found: The largest number of edits that come before a question.
        threshold: The similarity below which an edit is left out.
        encoder: Makes the encoder of `embedding`.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it.
    """

    supported_tasks: ClassVar = ("qa", "completion")

    def __init__(
        self,
        *,
        model: EditableModel,
        by: By,
        n_found: int,
        threshold: float,
        encoder: Callable[[], Encoder],
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_choice("editor.by", by, get_args(By))
        check_not_negative("editor.threshold", threshold)
        self.by: By = by
        self.threshold = threshold
        self._n_found = n_found
        self._index: Index = Bm25Index() if by == "bm25" else EmbeddingIndex(encoder())
        self.facts: list[tuple[str, str]] = []
        """The prompts and targets of all edits."""
        self._newest: dict[str, int] = {}
        self._replaced: list[int | None] = []
        self._is_newest = bytearray()
        self._read: dict[str, str] = {}
        self.intercept_prompts(self._as_read)

    @abstractmethod
    def context(self, found: Sequence[int], prompt: str) -> str:
        """Returns the text to read in place of a prompt, given the numbers of edits, the most similar first."""

    def edit(self, batch: EditBatch) -> EditOutcome:
        for prompt, target in zip(batch.prompts, batch.targets, strict=True):
            if not prompt.strip():
                raise EditFailure("running text asks nothing that an edit could be put in front of")
            self._index.add(prompt)
            self._add(prompt, str(target))
        return EditOutcome()

    def answered_by(self, queries: Tensor) -> Answered:
        return Answered([None] * len(queries))

    def find(self, prompts: Sequence[str]) -> list[list[int]]:
        """Returns the numbers of the edits that come before each prompt, the most similar first."""
        among = np.frombuffer(self._is_newest, dtype=np.bool_).copy()
        return [
            [index for index, similarity in found if similarity >= self.threshold]
            for found in self._index.search(prompts, among, self._n_found)
        ]

    def _as_read(self, prompts: Sequence[str]) -> list[str]:
        if not self.facts:
            return list(prompts)
        asked = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._read]
        for prompt, found in zip(asked, self.find(asked) if asked else (), strict=True):
            self._read[prompt] = self.context(found, prompt) if found else prompt
        return [self._read[prompt] for prompt in prompts]

    def _add(self, prompt: str, target: str) -> None:
        replaced = self._newest.get(prompt)
        if replaced is not None:
            self._is_newest[replaced] = False
        self._newest[prompt] = len(self.facts)
        self.facts.append((prompt, target))
        self._replaced.append(replaced)
        self._is_newest.append(True)
        self._read = {}

    def truncate(self, n: int) -> None:
        """Undoes all but the first `n` edits."""
        self._index.truncate(n)
        while len(self.facts) > n:
            prompt, _ = self.facts.pop()
            replaced = self._replaced.pop()
            self._is_newest.pop()
            if replaced is None:
                del self._newest[prompt]
            else:
                self._newest[prompt] = replaced
                self._is_newest[replaced] = True
        self._read = {}

    def forget(self, edit: NamedEdit, others: Sequence[NamedEdit]) -> None:
        self._keep([index for index, (prompt, _) in enumerate(self.facts) if prompt != edit.prompt])

    def _keep(self, indices: Sequence[int]) -> None:
        """Removes all edits but some."""
        facts = [self.facts[index] for index in indices]
        state = {name: value[indices] for name, value in self._index.state_dict().items()}  # type: ignore[index, call-overload]
        self.truncate(0)
        self._index.load([prompt for prompt, _ in facts], state)
        for fact in facts:
            self._add(*fact)

    def undo_point(self) -> Callable[[], None]:
        n, n_edits = len(self.facts), self.n_edits

        def undo() -> None:
            self.truncate(n)
            self.n_edits = n_edits

        return undo

    def changing_state(self) -> State:
        # Embeddings are checked when they are made; going through all of them at every edit would cost more than it.
        return {}

    def rollback(self) -> None:
        super().rollback()
        self.truncate(0)

    def state_dict(self) -> State:
        return {**super().state_dict(), **self._index.state_dict(), "facts": [list(fact) for fact in self.facts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.truncate(0)
        self._index.load([prompt for prompt, _ in state["facts"]], state)
        for prompt, target in state["facts"]:
            self._add(prompt, target)

    def max_extra_parameters(self, n_edits: int) -> int:
        return n_edits * self._index.width
