"""Exporting an edited model as a plain transformers folder, an adapter of peft, or a saved editor (docs/deploy.md)."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save
from torch import Tensor

from grace_bench.common.files import atomic_path, write_synced
from grace_bench.data.requests import TaskName
from grace_bench.editing.about import About
from grace_bench.editing.batch import Adapter
from grace_bench.editing.saving import SavableEditor, save_editor
from grace_bench.errors import UserError, reason_of
from grace_bench.models.editable import EditableModel
from grace_bench.models.fingerprint import Weights
from grace_bench.models.loading import pick_dtype
from grace_bench.results.metric_info import metric_infos
from grace_bench.results.schema import RunResult

RECORD_FILE = "export.json"
MODEL_FOLDER = "model"
"""The folder inside an export that holds the unedited model, unless the hub has it."""

Kind = Literal["weights", "adapter", "editor"]

_PEFT_TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}


class ExportableEditor(SavableEditor, Protocol):
    """An editor as far as exporting uses it; `EditorStrategy` documents the members."""

    about: ClassVar[About | None]
    n_edits: int

    @property
    def rewrites_only(self) -> bool: ...  # noqa: D102

    def adapter(self) -> Adapter | None: ...  # noqa: D102


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        folder: The folder.
        kind: `weights` for a plain transformers folder, `adapter` for one of peft, `editor` for a saved editor.
        told: How to load it, and why it is no plain folder if it is none, in one line.
    """

    folder: Path
    kind: Kind
    told: str


class ExportRecord(BaseModel):
    """The contents of `export.json`: the unedited model of an adapter or a saved editor.

    Attributes:
        kind: What the folder holds.
        model: The hub id of the unedited model; None if it is in `MODEL_FOLDER`.
        dtype: The dtype to load it in.
        task: Its use.
        layer: The edited layer.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["adapter", "editor"]
    model: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    task: TaskName
    layer: str


def export_editor(
    editor: ExportableEditor, folder: str | Path, *, dtype: str | None = None, run: RunResult | None = None
) -> Export:
    """Writes an edited model to a folder, which appears once it is complete (see `EditorStrategy.export`).

    Args:
        editor: The editor, without pending edits.
        folder: The folder, which must not exist or be empty.
        dtype: Of the weights that are written; None for the model's.
        run: The run that made the edits, for the card.

    Raises:
        UserError: As `EditorStrategy.export` does, or if the folder cannot be written.
    """
    target, precision = Path(folder).expanduser(), None if dtype is None else pick_dtype(dtype)
    _check_model(editor.model)
    adapter = editor.adapter()
    kind: Kind = "adapter" if adapter is not None else "weights" if editor.rewrites_only else "editor"
    if precision not in (None, editor.model.dtype) and kind != "weights":
        raise UserError(
            f"dtype={dtype}: editor '{editor.registered_name}' was made beside weights in "
            f"{_name_of(editor.model.dtype)}, and works beside no others"
        )
    export = Export(target, kind, _told(editor, kind))
    with _new_folder(target) as partial:
        if kind == "weights":
            _write_model(editor.model, partial, precision)
        else:
            _write_tokenizer(editor.model, partial)
            base = _write_base(editor, partial)
            _write_record(editor.model, kind, base, partial)
            if adapter is None:
                save_editor(editor, partial)
            else:
                _write_adapter(editor.model, adapter, base or str((target / MODEL_FOLDER).absolute()), partial)
        write_synced(partial / "README.md", _card(editor, export, run).encode())
    return export


def _check_model(model: EditableModel) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model.module, PreTrainedModel):
        raise UserError(
            f"model {model.name} is a {type(model.module).__name__}, no transformers model: save its editor with "
            f"save_pretrained()"
        )


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yields a hidden folder that gets its name once it is complete."""
    try:
        if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise UserError(f"{target}: is there already, and an export overwrites nothing")
        with atomic_path(target) as partial:
            partial.mkdir()
            yield partial
    except OSError as error:
        raise UserError(f"{target}: {error.strerror or error}") from error


def _told(editor: ExportableEditor, kind: Kind) -> str:
    if kind == "weights":
        return "a plain transformers folder: AutoModel classes, lm_eval and vLLM load it as it is"
    if kind == "adapter":
        return "a peft adapter: PeftModel.from_pretrained loads it onto the unedited model"
    about = editor.about
    changes = "acts on the model while it runs" if about is None else f"changes {about.changes}"
    return (
        f"a saved editor, which grace_bench.load_edited loads; no plain weights, because '{editor.registered_name}' "
        f"{changes}"
    )


def _write_model(model: EditableModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the model as it is now, with its tokenizer and its own settings of generation."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    module: Any = model.module
    weights = None if dtype is None else _cast(Weights(module), dtype)
    try:
        module.save_pretrained(folder, state_dict=weights)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"model {model.name} cannot be saved by transformers ({reason_of(error)})") from error
    if dtype is not None:
        _rewrite_json(folder / "config.json", lambda config: {**config, "dtype": _name_of(dtype)})
    if model.generation_config is not None:
        # Not by save_pretrained, which refuses settings that some checkpoints have.
        model.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    _write_tokenizer(model, folder)


def _cast(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in another dtype; those that share their memory still do."""
    cast: dict[tuple[int, tuple[int, ...], tuple[int, ...]], tuple[Tensor, Tensor]] = {}
    named = {}
    for name in weights:
        tensor = weights[name]
        place = tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())
        if place not in cast:
            # Both are kept: the memory of a weight that was loaded for this would be used for the next.
            cast[place] = tensor, tensor.to(dtype) if tensor.is_floating_point() else tensor
        named[name] = cast[place][1]
    return named


def _write_tokenizer(model: EditableModel, folder: Path) -> None:
    if model.tokenizer is None:
        return
    tokenizer = deepcopy(model.tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # The last call's, which others would take for the tokenizer's own.
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)


def _write_base(editor: ExportableEditor, folder: Path) -> str | None:
    """Writes the unedited model unless the hub has it; returns its hub id, or None if it was written."""
    if editor.model.hub_id is not None:
        return editor.model.hub_id
    with editor.suspended():
        _write_model(editor.model, folder / MODEL_FOLDER)
    return None


def _write_record(model: EditableModel, kind: Any, base: str | None, folder: Path) -> None:
    record = ExportRecord(
        kind=kind,
        model=base,
        dtype=_name_of(model.dtype),  # type: ignore[arg-type]
        task=model.task.name,
        layer=model.layer_name,
    )
    write_synced(folder / RECORD_FILE, f"{record.model_dump_json(indent=2)}\n".encode())


def _write_adapter(model: EditableModel, adapter: Adapter, base: str, folder: Path) -> None:
    adapter.config.save_pretrained(str(folder))
    about_base = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "task_type": _PEFT_TASKS.get(model.task.auto_class),
    }
    _rewrite_json(folder / "adapter_config.json", lambda config: {**config, **about_base})
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.weights.items()}
    write_synced(folder / "adapter_model.safetensors", save(weights, metadata={"format": "pt"}))


def _rewrite_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the card


def _card(editor: ExportableEditor, export: Export, run: RunResult | None) -> str:
    """The model card."""
    model, name = editor.model, editor.registered_name
    facts = {"base model": model.hub_id or model.name, "layer": model.layer_name, "editor": name}
    facts["settings"] = ", ".join(f"{option}={value}" for option, value in editor.settings().items()) or "none"
    facts["edits"] = str(editor.n_edits)
    if run is not None:
        failed = run.metrics.get("n_failed")
        facts["edits"] += f", of which {failed:.0f} failed" if failed else ""
        facts |= {"stream": run.stream.name, "seed": str(run.seed), "run": run.run_id}
    base = f"base_model: {json.dumps(model.hub_id)}\n" if model.hub_id else ""
    library = "peft" if export.kind == "adapter" else "transformers"
    lines = [
        f"---\n{base}library_name: {library}\ntags:\n- model-editing\n- {name}\n---\n",
        f"# {model.name}, edited by {name}\n",
        f"This is {export.told}. It was written by grace-bench.\n",
        "| | |\n|---|---|",
        *(f"| {what} | {_in_table(value)} |" for what, value in facts.items()),
    ]
    if run is not None:
        lines += ["\n| score | before the edits | after them |\n|---|---|---|", *_scores(run)]
    return "\n".join(lines) + "\n"


def _scores(run: RunResult) -> Iterator[str]:
    for info in metric_infos():
        after = run.metrics.get(info.name)
        if after is not None and info.shown("table") and not info.is_count:
            both = (run.before.get(info.name), after)
            shown = ["–" if score is None else f"{score:.{info.decimals}f}" for score in both]
            yield f"| {info.header} | {' | '.join(shown)} |"


def _in_table(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
