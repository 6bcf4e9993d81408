"""Embeddings of texts: by the edited model itself, or by a sentence encoder in a folder."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from grace_bench.common.untrusted import check_model_folder
from grace_bench.errors import EditFailure, UserError, reason_of
from grace_bench.models.editable import EditableModel
from grace_bench.models.tokenizers import load_tokenizer

_CACHED = 2**26
"""Maximum number of numbers in the cache of embeddings."""


class Encoder(ABC):
    """Embeds texts as unit vectors.

    Every text is embedded by itself: in a batch, its embedding would depend on the others by rounding.

    Args:
        device: Where the embeddings are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cache: dict[str, Tensor] = {}
        self.width = self._embed("a").shape[0]
        """The length of an embedding."""

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns the (n, D) float32 embeddings of n texts, at least one.

        Raises:
            EditFailure: If one is not finite.
        """
        return torch.stack([self._cached(text) for text in texts])

    def _cached(self, text: str) -> Tensor:
        # The last used are kept.
        found = self._cache.pop(text, None)
        if found is None:
            found = functional.normalize(self._embed(text).float(), dim=0).to(self.device)
            if not bool(found.isfinite().all()):
                raise EditFailure("the embedding of the prompt is not finite")
            if (len(self._cache) + 1) * self.width > _CACHED and self._cache:
                del self._cache[next(iter(self._cache))]
        self._cache[text] = found
        return found

    @abstractmethod
    def _embed(self, text: str) -> Tensor:
        """The (D,) embedding of a text, of any length."""


class LayerEncoder(Encoder):
    """The unedited model's own embedding: the mean over a prompt's tokens of what enters the edited layer.

    Args:
        model: The model.
    """

    def __init__(self, model: EditableModel) -> None:
        self._model = model
        super().__init__(model.layer_device)

    def _embed(self, text: str) -> Tensor:
        with self._model.bypassing():
            return self._model.layer_call(self._model.encode_batch([text])).input[0].float().mean(dim=0)


class SentenceEncoder(Encoder):
    """A sentence encoder: the mean over a text's tokens of a transformers model's last hidden states.

    Args:
        folder: The folder of the model, with safetensors weights and a tokenizer.
        device: The device to compute on.

    Raises:
        UserError: If it cannot be loaded.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        import transformers

        if not Path(folder).is_dir():
            raise UserError(f"editor.encoder={folder}: is not a folder")
        check_model_folder(folder)
        try:
            module: nn.Module = transformers.AutoModel.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
            self._tokenizer = load_tokenizer(folder)
        except Exception as error:  # A broken folder can raise the errors of any library that reads it.
            raise UserError(f"editor.encoder={folder}: cannot be loaded ({reason_of(error)})") from error
        self._module = module.eval().requires_grad_(False).to(device)
        super().__init__(device)

    @torch.no_grad()
    def _embed(self, text: str) -> Tensor:
        inputs = self._tokenizer(text, return_tensors="pt", truncation=True).to(self.device)
        states: Tensor = self._module(**inputs).last_hidden_state
        return states[0].float().mean(dim=0)
