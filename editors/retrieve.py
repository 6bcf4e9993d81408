"""Retrieval: the edit's own sentence before the question."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from grace_bench.common.options import check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editors._retrieval.editor import By, RetrievalEditor
from grace_bench.editors._retrieval.encoders import LayerEncoder
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("retrieve")
class Retrieve(RetrievalEditor):
    """Puts the sentences of the edits most like a question in front of it; the model does not change.

    The sentence of an edit is its prompt with its target. The most similar one comes last, next to the question.

    Args:
        model: The model to edit.
        by: How the edits most like a question are found: by shared words (`bm25`, see `Bm25Index`), or by the cosine
            similarity of the unedited model's own embeddings (`embedding`, see `LayerEncoder`).
        k: The largest number of sentences before a question.
        threshold: The similarity below which a sentence is left out; 1 is that of the edited prompt itself.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it.
    """

    about = About(
        source="Lewis et al., NeurIPS 2020, applied to edits",
        changes="what the model reads: sentences of similar edits come first",
        costs="a search a question, and a longer prompt; an embedding an edit where `by=embedding`",
        choose="as the bar that every other editor should clear",
    )
    search_space: ClassVar = {"by": ("bm25", "embedding"), "threshold": (0.5, 0.7, 0.9)}

    def __init__(
        self,
        *,
        model: EditableModel,
        by: By = "bm25",
        k: int = 1,
        threshold: float = 0.5,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        check_whole("editor.k", k, least=1)
        super().__init__(
            model=model,
            by=by,
            n_found=k,
            threshold=threshold,
            encoder=partial(LayerEncoder, model),
            plugins=plugins,
            evaluator=evaluator,
        )
        self.k = k
        (line_break,) = model.tokens.text_ids(["a\na"])
        # A tokenizer without line breaks drops them or reads an unknown token.
        self._end = "\n" if model.tokens.has_line_break(line_break) else ". "

    def context(self, found: Sequence[int], prompt: str) -> str:
        sentences = [f"{self.model.tokens.joined(*self.facts[index])}{self._end}" for index in reversed(found)]
        return f"{''.join(sentences)}{prompt}"
