"""IKE: editing by demonstrations in context (Zheng et al. 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from grace_bench.common.options import check_text, check_whole
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editors._retrieval.demonstrations import demonstrations_of, question_about
from grace_bench.editors._retrieval.editor import By, RetrievalEditor
from grace_bench.editors._retrieval.encoders import Encoder, LayerEncoder, SentenceEncoder
from grace_bench.editors._retrieval.index import nearest
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("ike")
class Ike(RetrievalEditor):
    """Puts the new fact in front of a question, behind demonstrations of how facts are used (Zheng et al. 2023).

    Demonstrations are made of the stream's training requests, three of each: the fact repeated (copy), its rephrase
    answered by it (update), and a question about something else, which keeps its answer (retain). A fact gets the `k`
    demonstrations that are most similar to it, of whatever kind, the nearest first, as in EasyEdit's code; the paper
    mixes the kinds 1:3:4 and puts the nearest last.

    In the paper the new fact is that of the question. In a stream of edits it must be found: it is the edit most
    similar to the question, and a question that none is similar enough to is read as it is.

    Args:
        model: The model to edit.
        k: The number of demonstrations; 0 for the fact alone.
        by: How the edit of a question is found, as in `retrieve`.
        threshold: The similarity below which a question is about no edit, as in `retrieve`.
        encoder: The folder of a sentence encoder with safetensors weights, which embeds facts and demonstrations; null
            for the unedited model's own embeddings (`LayerEncoder`).
        n_train: The largest number of training requests, evenly spaced, that demonstrations are made of.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or the encoder cannot be loaded.
    """

    about = About(
        source="Zheng et al., EMNLP 2023",
        changes="what the model reads: demonstrations and the new fact come first",
        needs="the stream's `train` requests",
        costs="a search a question, and a prompt many times as long",
        choose="if the model learns from examples in its prompt",
    )
    traces = "grace_bench.editors._retrieval.traces:replay_file"
    search_space: ClassVar = {"by": ("bm25", "embedding"), "threshold": (0.5, 0.7, 0.9)}

    def __init__(
        self,
        *,
        model: EditableModel,
        k: int = 16,
        by: By = "bm25",
        threshold: float = 0.5,
        encoder: str | None = None,
        n_train: int = 1000,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        check_whole("editor.k", k, least=0)
        check_whole("editor.n_train", n_train, least=1)
        check_text("editor.encoder", encoder, optional=True)
        self.encode: Encoder = LayerEncoder(model) if encoder is None else SentenceEncoder(encoder, model.layer_device)
        """Embeds facts, demonstrations and, where `by` says so, questions."""
        super().__init__(
            model=model,
            by=by,
            n_found=1,
            threshold=threshold,
            encoder=lambda: self.encode,
            plugins=plugins,
            evaluator=evaluator,
        )
        self.k = k
        self.encoder = encoder
        self.n_train = n_train
        self.demonstrations: list[str] = []
        """The demonstrations to choose from."""
        self.embeddings: Tensor = torch.empty(0, self.encode.width, device=self.encode.device)
        """(N, D) their embeddings."""
        self.chosen: list[list[int]] = []
        """The numbers of each edit's demonstrations, the nearest first."""

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        """Makes the demonstrations and embeds them.

        Raises:
            UserError: If there are no training requests, and `k` asks for demonstrations.
        """
        if not self.k:
            return
        n = min(self.n_train, len(train))
        rows = [request for i in range(n) if (request := train[i * len(train) // n]).prompt.strip()]
        if not rows:
            raise UserError(
                "editor 'ike' makes demonstrations of the stream's training requests, and it has none: "
                "editor.k=0 does without"
            )
        self.demonstrations = demonstrations_of(rows, self._answers(rows, progress))
        found = []
        for i, text in enumerate(self.demonstrations, start=1):
            found.append(self.encode([text]))
            if progress is not None:
                progress("embeddings of demonstrations", i, len(self.demonstrations))
        self.embeddings = torch.cat(found)

    def _answers(self, rows: Sequence[EditRequest], progress: Progress | None) -> dict[str, str]:
        """The unedited model's answers to the questions that have no other."""
        asked = {probe.prompt: None for request in rows for probe in request.locality[:1] if probe.target is None}
        return {p: str(answer) for p, answer in zip(asked, self.model.ask([*asked], progress=progress), strict=True)}

    def edit(self, batch: EditBatch) -> EditOutcome:
        outcome = super().edit(batch)
        for prompt, target in self.facts[len(self.chosen) :]:
            self.chosen.append(self._choose(question_about(prompt, target, prompt) + "\n\n"))
        return outcome

    def _choose(self, text: str) -> list[int]:
        if not self.k:
            return []
        (found,) = nearest(self.encode([text]), self.embeddings, k=self.k)
        return [index for index, _ in found]

    def context(self, found: Sequence[int], prompt: str) -> str:
        demonstrations = "".join(self.demonstrations[index] for index in self.chosen[found[0]])
        return demonstrations + question_about(*self.facts[found[0]], prompt)

    def _keep(self, indices: Sequence[int]) -> None:
        chosen = [self.chosen[index] for index in indices]
        super()._keep(indices)
        self.chosen = chosen

    def truncate(self, n: int) -> None:
        super().truncate(n)
        del self.chosen[n:]

    def state_dict(self) -> State:
        return {
            **super().state_dict(),
            "embeddings": self.embeddings,
            "demonstrations": list(self.demonstrations),
            "chosen": [list(indices) for indices in self.chosen],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.embeddings = state["embeddings"].to(self.encode.device, torch.float32)
        self.demonstrations = list(state["demonstrations"])
        self.chosen = [list(indices) for indices in state["chosen"]]

    def max_extra_parameters(self, n_edits: int) -> int:
        return self.embeddings.numel() + super().max_extra_parameters(n_edits)
