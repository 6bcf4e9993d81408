"""Fingerprints: hashes of everything that determines a model's answers."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Entries of a configuration that depend on how it was loaded; the dtype is recorded separately.
_INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"})


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of named tensors: of their names, dtypes, shapes and bytes.

    >>> hash_tensors({"a": torch.zeros(2)}) == hash_tensors({"a": torch.zeros(2, 1)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_weights(module: nn.Module) -> str:
    """Returns the SHA-256 of a module's weights and buffers, including those that accelerate has offloaded."""
    return hash_tensors(Weights(module))


def hash_configuration(config: Any, tokenizer: Any) -> str:
    """Returns the SHA-256 of a Hugging Face configuration and a tokenizer, each of which may be None."""
    parts = {
        # Defaults are left out: another release of transformers has other options.
        "config": _without_incidental(config.to_diff_dict()) if hasattr(config, "to_diff_dict") else None,
        "tokenizer": None if tokenizer is None else _serialised(tokenizer),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _without_incidental(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {str(name): _without_incidental(value) for name, value in config.items() if name not in _INCIDENTAL}


def _serialised(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    # Every call of the tokenizer sets these.
    transient = ("truncation", "padding")
    return {
        **{name: value for name, value in content.items() if name not in transient},
        "special_tokens": tokenizer.special_tokens_map,
        "clean_up": getattr(tokenizer, "clean_up_tokenization_spaces", None),
        "longest": tokenizer.model_max_length,
    }


class Weights(Mapping[str, Tensor]):
    """A module's state dict, from which offloaded tensors are read one at a time.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._state = module.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name]
        if not tensor.is_meta:
            return tensor
        from accelerate.utils import align_module_device

        path, _, attribute = name.rpartition(".")
        owner = self._module.get_submodule(path)
        with align_module_device(owner, torch.device("cpu")):
            loaded: Tensor = getattr(owner, attribute)
            return loaded.detach().clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
