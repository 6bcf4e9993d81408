"""`load_edited`: an exported model in one's own program, as transformers uses models."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from grace_bench.common.files import readable
from grace_bench.common.untrusted import check_model_folder
from grace_bench.editing.export import MODEL_FOLDER, RECORD_FILE, ExportRecord
from grace_bench.errors import UserError, first_error, reason_of
from grace_bench.models.editable import DeviceMap, EditableModel
from grace_bench.models.encoding import EncodedBatch, PaddingSide, pad
from grace_bench.models.loading import pick_device
from grace_bench.models.network import Network
from grace_bench.models.tasks.lookup import get_task
from grace_bench.models.tokenizers import load_tokenizer
from grace_bench.registry import EDITORS

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LENGTHS = (("max_length", "max_new_tokens", 1), ("min_length", "min_new_tokens", 0))
"""Limits that count the tokens of the prompt, those that do not, and the least number that these can be."""


def load_edited(folder: str | Path, *, device: str | torch.device = "auto", device_map: DeviceMap | None = None) -> Any:
    """Loads a model that `export` wrote.

    Args:
        folder: The folder.
        device: `cpu`, `cuda`, `mps`, or `auto` for the fastest available.
        device_map: Spreads the weights over several devices instead, as in `EditableModel.from_pretrained`.

    Returns:
        The transformers model, whose calls, `generate` and pipelines answer as edited. `model.tokenizer` is its
        tokenizer, or None. `model.editor` is the editor if the export holds one: it edits further, and undoes.

    Raises:
        UserError: If the folder holds no export, or it cannot be loaded.
    """
    path = Path(folder).expanduser()
    if (path / RECORD_FILE).is_file():
        return _load_beside_model(path, device, device_map)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: holds no exported model (neither {RECORD_FILE} nor config.json)")
    check_model_folder(str(path))
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = _json_of(path / "config.json")
    architecture = getattr(transformers, str(next(iter(config.get("architectures") or ()), None)), None)
    # The name stands in a file: it must not call just anything of transformers.
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise UserError(f"{path / 'config.json'}: field 'architectures': names no model of transformers")
    try:
        module = architecture.from_pretrained(  # type: ignore[attr-defined]
            path,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            device_map=device_map if device_map is None or isinstance(device_map, str) else dict(device_map),
        )
    except Exception as error:  # A broken folder can raise the errors of any library that reads it.
        raise UserError(f"{path}: cannot be loaded ({reason_of(error)})") from error
    if device_map is None:
        module.to(pick_device(device))
    module.tokenizer = load_tokenizer(str(path)) if (path / "tokenizer_config.json").is_file() else None
    return module.eval()


def _load_beside_model(path: Path, device: str | torch.device, device_map: DeviceMap | None) -> Any:
    """Loads the unedited model of an export, and an adapter or an editor onto it."""
    try:
        record = ExportRecord.model_validate_json(readable(path / RECORD_FILE).read_bytes())
    except ValidationError as error:
        raise UserError(f"{path / RECORD_FILE}: {first_error(error)}") from error
    except OSError as error:
        raise UserError(f"{path / RECORD_FILE}: {error.strerror or error}") from error
    model = EditableModel.from_pretrained(
        path / MODEL_FOLDER if record.model is None else record.model,
        layer=record.layer,
        task=get_task(record.task),
        dtype=record.dtype,
        device=device,
        device_map=device_map,
        tokenizer=(path / "tokenizer_config.json").is_file(),
    )
    module: Any = model.module
    module.generation_config = model.generation_config
    module.tokenizer = model.tokenizer
    if record.kind == "adapter":
        _add_adapter(module, path)
        return module
    name = _json_of(path / "editor.json").get("editor")
    module.editor = EDITORS.get(str(name)).from_pretrained(path, model=model)
    if model.reads_prompts:
        module.generate = ReadingGenerate(model, editor=str(name))
    return module


def _add_adapter(module: Any, path: Path) -> None:
    # Without this file, transformers would look for a pickle.
    if not (path / _ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{path}: holds no {_ADAPTER_WEIGHTS}")
    try:
        module.load_adapter(str(path))
    except Exception as error:  # A broken folder can raise the errors of any library that reads it.
        raise UserError(f"{path}: the adapter cannot be loaded ({reason_of(error)})") from error
    module.eval().requires_grad_(False)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(readable(path).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason_of(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: should hold a JSON object")
    return content


class ReadingGenerate:
    """Stands in for the `generate` of a model whose editor changes what is read in place of a prompt.

    The tokens of each row become text, and the editor says what is read in place of it. A row that is read as it is
    goes to the model with the tokens that it came with. What others are read as is encoded as in a run. Each row that
    is returned begins with the tokens that were given, whatever was read.

    Args:
        model: The edited model.
        editor: The editor's name, for messages.
    """

    def __init__(self, model: EditableModel, *, editor: str) -> None:
        self._model = model
        self._editor = editor
        self._generate: Callable[..., Any] = model.module.generate  # type: ignore[assignment]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as the model's own `generate` does, with the same arguments.

        Raises:
            UserError: If a row whose tokens should become text holds special tokens inside, as a chat does, or outputs
                beside the tokens are asked for where something else is read.
        """
        given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        # Inside a sequence, the harness has encoded what is read.
        if self._model.is_querying or not isinstance(given, Tensor) or given.is_floating_point():
            return self._generate(*args, **kwargs)
        own = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        own.pop("inputs", None)
        own |= {"input_ids": given, "attention_mask": self._mask_of(given, own.get("attention_mask"))}
        texts = [
            self._text(row, ids[mask.bool()].tolist())
            for row, (ids, mask) in enumerate(zip(given, own["attention_mask"], strict=True))
        ]
        readings = self._model.readings(texts)
        changed = [
            row
            for row, (text, reading) in enumerate(zip(texts, readings, strict=True))
            if reading.text != text or reading.network is not None
        ]
        if not changed:
            return self._generate(*args, **kwargs)
        return self._generate_apart(own, texts, changed)

    def _generate_apart(self, given: dict[str, Any], texts: Sequence[str], changed: Sequence[int]) -> Tensor:
        """Generates the rows that are read in other words, and the rest, and returns them in order."""
        config = given.get("generation_config") or self._model.module.generation_config
        if given.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", False)):
            raise UserError("return_dict_in_generate: where an edit changes what is read, only the tokens are returned")
        ids = given["input_ids"]
        settings = {name: value for name, value in given.items() if not _has_rows(value, len(ids))}
        for total, new, least in _LENGTHS:
            if settings.get(total) is not None and settings.get(new) is None and not self._is_seq2seq:
                settings[new] = max(least, settings.pop(total) - ids.shape[1])
        found: dict[int, list[list[int]]] = {}
        same = [row for row in range(len(ids)) if row not in set(changed)]
        if same:
            some = {name: value[same] for name, value in given.items() if _has_rows(value, len(ids))}
            found |= self._new_tokens(same, self._generate(**some, **settings), ids.shape[1])
        side: PaddingSide = "right" if self._is_seq2seq else "left"
        n_new = settings.get("max_new_tokens", getattr(config, "max_new_tokens", None))
        if n_new is not None:
            # Prompts are cut to leave room for as many.
            self._model.task.max_new_tokens = n_new
        batch = self._model.encode_batch([texts[row] for row in changed], side=side)
        for network, places in batch.by_network() if batch.networks else [(None, list(range(len(changed))))]:
            rows = [changed[place] for place in places]
            found |= self._read(network or self._model, batch.rows(places).own, rows, settings)
        return self._joined(ids, found, settings)

    @property
    def _is_seq2seq(self) -> bool:
        return bool(getattr(self._model.config, "is_encoder_decoder", False))

    def _read(
        self, network: Network, batch: EncodedBatch, rows: Sequence[int], settings: Mapping[str, Any]
    ) -> dict[int, list[list[int]]]:
        """Generates after what a network reads; the settings of generation are the model's."""
        inputs, module = network.generation_inputs(batch), network.module
        generate: Any = self._generate
        if module is not self._model.module:
            module.generation_config = self._model.module.generation_config
            generate = module.generate
        with network.querying(batch.query):
            out = generate(**inputs, **settings)
        return self._new_tokens(rows, out, inputs["input_ids"].shape[1])

    def _new_tokens(self, rows: Sequence[int], out: Tensor, n_given: int) -> dict[int, list[list[int]]]:
        """The sequences that were generated for each row, without its prompt."""
        each = len(out) // len(rows)
        new = out[:, 0 if self._is_seq2seq else n_given :].tolist()
        return {row: new[i * each : (i + 1) * each] for i, row in enumerate(rows)}

    def _joined(self, ids: Tensor, found: Mapping[int, list[list[int]]], settings: Mapping[str, Any]) -> Tensor:
        new, _ = pad([sequence for row in range(len(ids)) for sequence in found[row]], self._pad_id(settings), "right")
        new = new.to(ids.device)
        return new if self._is_seq2seq else torch.cat([ids.repeat_interleave(len(found[0]), dim=0), new], dim=1)

    def _pad_id(self, settings: Mapping[str, Any]) -> int:
        config = settings.get("generation_config") or self._model.module.generation_config
        named = settings.get("pad_token_id", getattr(config, "pad_token_id", None))
        return self._model.tokens.pad_id if named is None else int(named)

    def _mask_of(self, ids: Tensor, mask: Any) -> Tensor:
        """The mask that was given, or without one what is not padding, if the padding token ends no text."""
        if isinstance(mask, Tensor):
            return mask
        tokens = self._model.tokens
        return torch.ones_like(ids) if tokens.pad_id in tokens.end_ids else (ids != tokens.pad_id).long()

    def _text(self, row: int, ids: list[int]) -> str:
        """The text of a row, without the special tokens around it."""
        tokens = self._model.tokens
        plain = [place for place, token in enumerate(ids) if token not in tokens.special_ids]
        inside = ids[plain[0] : plain[-1] + 1] if plain else []
        if len(inside) > len(plain):
            raise UserError(
                f"row {row} of the prompts holds special tokens inside its text, as a chat does: editor "
                f"'{self._editor}' changes what is read in place of plain prompts"
            )
        return tokens.decode(inside)


def _has_rows(value: Any, n_rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and len(value) == n_rows
