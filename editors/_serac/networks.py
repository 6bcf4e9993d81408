"""SERAC's networks: a scope classifier, which embeds texts, and a counterfactual model, which reads edits."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from grace_bench.common.untrusted import check_model_folder
from grace_bench.errors import UserError, reason_of
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import pad
from grace_bench.models.limits import longest_input
from grace_bench.models.network import Network
from grace_bench.models.padding import embedding_of
from grace_bench.models.tokens import PromptTokenizer, TextFormat

Distance = Literal["squared", "euclidean", "cosine"]
HEAD = 32
"""The width of a scope classifier's attention heads."""
_COPYING_HEADS = 2
"""The attention heads of a counterfactual model made here; each is as wide as the model, to copy any token whole."""
_READ_IN_SCOPE = 128
"""The longest text, in tokens, that a scope classifier made here reads."""
_READ = 2048
"""The longest text of a counterfactual model made here, if the edited model has no limit; its positions are rotary."""


class SeracNetworks(nn.Module):
    """Both networks, as one module to train and to save.

    Args:
        classifier: A transformers encoder.
        counterfactual: A transformers model of the kind that is edited.
    """

    def __init__(self, classifier: nn.Module, counterfactual: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.counterfactual = counterfactual
        self.eval()

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns the weights, those that two modules share once."""
        return {name: weight.detach() for name, weight in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Copies the weights from a state.

        Raises:
            KeyError: If one is missing.
            RuntimeError: If one has another shape.
        """
        for name, weight in self.named_parameters():
            if state_dict[name].shape != weight.shape:
                raise RuntimeError(f"{name} is {tuple(state_dict[name].shape)}, not {tuple(weight.shape)}")
            weight.copy_(state_dict[name])


class ScopeClassifier:
    """Embeds texts by an encoder's last hidden state at position 0; near texts are in each other's scope.

    Args:
        encoder: The encoder.
        tokenizer: Its tokenizer.
        device: Where to compute.
        parses: Whether the text of a special token stands for that token.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, *, device: torch.device, parses: bool = False) -> None:
        self._encoder = encoder
        self._tokens = PromptTokenizer(tokenizer, TextFormat(special_tokens="parse" if parses else "text"))
        self._limit = longest_input(encoder, tokenizer)
        self._device = device
        self.separator = str(getattr(tokenizer, "sep_token", None) or "")
        """The text of the token that separates texts; empty if the tokenizer has none."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns the (n, D) float32 embeddings of n texts, each cut to what the encoder reads."""
        rows = self._tokens.closed_ids(texts, max_length=self._limit)
        ids, mask = (tensor.to(self._device) for tensor in pad(rows, self._tokens.pad_id, "right"))
        states: Tensor = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[:, 0].float()


def distances(queries: Tensor, keys: Tensor, *, kind: Distance, heads: int, bound: bool) -> Tensor:
    """Returns the distance of embeddings whose last dimension is D: of their `heads` equal parts, the smallest.

    Args:
        queries: (..., D).
        keys: (..., D); both are broadcast.
        kind: `squared` or plain Euclidean distance, or `cosine` for 1 minus the cosine.
        heads: The number of parts.
        bound: Whether tanh bounds the embeddings first.

    >>> distances(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0]), kind="squared", heads=2, bound=False)
    tensor(1.)
    """
    if bound:
        queries, keys = queries.tanh(), keys.tanh()
    q, k = (tensor.unflatten(-1, (heads, -1)) for tensor in (queries, keys))
    if kind == "cosine":
        apart = 1 - functional.cosine_similarity(q, k, dim=-1)
    else:
        apart = (q - k).square().sum(dim=-1)
        if kind == "euclidean":
            # The root has no gradient at 0.
            apart = apart.clamp(min=1e-12).sqrt() if apart.requires_grad else apart.sqrt()
    return apart.amin(dim=-1)


def new_classifier(model: EditableModel, *, width: int, n_layers: int) -> nn.Module:
    """Makes a small BERT with the model's tokenizer; its first weights come from torch's generator."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=_n_tokens(model),
        hidden_size=width,
        num_hidden_layers=n_layers,
        num_attention_heads=width // HEAD,
        intermediate_size=2 * width,
        max_position_embeddings=_READ_IN_SCOPE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=model.tokens.pad_id,
    )
    encoder: nn.Module = BertModel(config, add_pooling_layer=False)
    return encoder


def new_counterfactual(model: EditableModel, *, width: int, n_layers: int) -> nn.Module:
    """Makes a small model of the edited one's kind, a T5 or a Llama, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {
        "vocab_size": _n_tokens(model),
        "pad_token_id": model.tokens.pad_id,
        "eos_token_id": model.tokens.end_id,
    }
    made: Any
    if getattr(model.config, "is_encoder_decoder", False):
        config = T5Config(
            d_model=width,
            d_kv=width,
            d_ff=2 * width,
            num_layers=n_layers,
            num_heads=_COPYING_HEADS,
            dropout_rate=0.0,
            decoder_start_token_id=model.decoder_start,
            **sizes,
        )
        made = T5ForConditionalGeneration(config)
        attention = made.decoder.block[-1].layer[1].EncDecAttention
        _let_copy(attention.v, attention.o)
    else:
        made = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=n_layers,
                num_attention_heads=_COPYING_HEADS,
                num_key_value_heads=_COPYING_HEADS,
                head_dim=width,
                max_position_embeddings=model.max_length or _READ,
                tie_word_embeddings=True,
                bos_token_id=model.tokens.begin_id,
                **sizes,
            )
        )
        # They are not trained (see `SeracTraining`): a unit each, so that a hidden state can tell them apart.
        nn.init.normal_(made.get_input_embeddings().weight, std=width**-0.5)
        attention = made.model.layers[-1].self_attn
        _let_copy(attention.v_proj, attention.o_proj)
    counterfactual: nn.Module = made
    return counterfactual


@torch.no_grad()
def _let_copy(values: nn.Linear, output: nn.Linear) -> None:
    """Lets each head of an attention start by passing on what it attends to, so that only where is left to learn."""
    identity = torch.eye(values.in_features)
    values.weight.copy_(identity.repeat(_COPYING_HEADS, 1))
    output.weight.copy_(identity.repeat(1, _COPYING_HEADS) / _COPYING_HEADS)


def load_classifier(folder: str) -> nn.Module:
    """Loads an encoder with safetensors weights from a folder.

    Raises:
        UserError: If it cannot be loaded, naming the option.
    """
    import transformers

    return _loaded("classifier", folder, transformers.AutoModel)


def load_counterfactual(folder: str, model: EditableModel) -> nn.Module:
    """Loads a counterfactual model with safetensors weights from a folder; it is used with the model's tokenizer.

    Raises:
        UserError: If it cannot be loaded, has another vocabulary or reads shorter texts, naming the option.
    """
    import transformers

    found = _loaded("counterfactual", folder, getattr(transformers, model.task.auto_class))
    option = f"editor.counterfactual={folder}"
    if (n_tokens := _rows(found)) != _n_tokens(model):
        raise UserError(f"{option}: has {n_tokens} tokens, and model {model.name} has {_n_tokens(model)}")
    longest = longest_input(found, model.tokenizer)
    if longest is not None and (model.max_length is None or longest < model.max_length):
        raise UserError(f"{option}: reads {longest} tokens, and model {model.name} reads {model.max_length or 'any'}")
    return found


def delegate_of(model: EditableModel, counterfactual: nn.Module) -> Network:
    """Returns a counterfactual model as the network that answers in place of the edited model."""
    first = next(name for name, _ in counterfactual.named_modules() if name)
    return Network(counterfactual, layer=first, tokenizer=model.tokenizer, name=f"counterfactual of {model.name}")


def content_of_folder(folder: str) -> str:
    """Returns the SHA-256 of the files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.is_file():
            digest.update(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()};".encode())
    return digest.hexdigest()


def _loaded(option: str, folder: str, loader: Any) -> nn.Module:
    if not Path(folder).is_dir():
        raise UserError(f"editor.{option}={folder}: is not a folder")
    check_model_folder(folder)
    load: Callable[..., nn.Module] = loader.from_pretrained
    try:
        found = load(folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, dtype=torch.float32)
    except Exception as error:  # A broken folder can raise the errors of any library that reads it.
        raise UserError(f"editor.{option}={folder}: cannot be loaded ({reason_of(error)})") from error
    return found.eval()


def _n_tokens(model: EditableModel) -> int:
    return _rows(model.module)


def _rows(module: nn.Module) -> int:
    weight: Any = getattr(embedding_of(module), "weight", None)
    return len(weight) if isinstance(weight, Tensor) else 0
