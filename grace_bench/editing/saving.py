"""Saved editors: `editor.safetensors` holds the tensors of an editor's state, `editor.json` everything else."""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from grace_bench.common.files import readable, write_synced
from grace_bench.editing.batch import State
from grace_bench.errors import MISFITS, UserError, first_error
from grace_bench.models.editable import EditableModel

GIVEN_BY_THE_HARNESS = ("model", "plugins", "evaluator")
"""Constructor arguments of an editor that are not options."""


class SavableEditor(Protocol):
    """An editor as far as saving uses it; `EditorStrategy` documents the members."""

    registered_name: ClassVar[str]
    model: EditableModel

    def settings(self) -> dict[str, Any]: ...  # noqa: D102

    def answering_state(self) -> State: ...  # noqa: D102

    def load_answering_state(self, state: Mapping[str, Any]) -> None: ...  # noqa: D102

    def suspended(self) -> AbstractContextManager[None]: ...  # noqa: D102

    def detach(self) -> None: ...  # noqa: D102


E = TypeVar("E", bound=SavableEditor)


class _Header(BaseModel):
    """The contents of `editor.json`."""

    model_config = ConfigDict(extra="forbid")

    editor: str
    settings: dict[str, Any]
    model: str
    model_fingerprint: str
    layer: str
    task: str
    state: dict[str, Any]


def save_editor(editor: SavableEditor, folder: str | Path) -> None:
    """Writes an editor without pending edits to a folder, which is created if it does not exist."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors, values = split_state(editor.answering_state())
    write_synced(path / "editor.safetensors", save(tensors))
    with editor.suspended():
        # The fingerprint is computed at its first use, which must see the unedited weights.
        fingerprint = editor.model.fingerprint
    header = _Header(
        editor=editor.registered_name,
        settings=editor.settings(),
        model=editor.model.name,
        model_fingerprint=fingerprint,
        layer=editor.model.layer_name,
        task=editor.model.task.name,
        state=values,
    )
    write_synced(path / "editor.json", f"{header.model_dump_json(indent=2)}\n".encode())


def load_editor(cls: type[E], folder: str | Path, *, model: EditableModel) -> E:
    """Returns the editor saved in a folder, on the model it was saved for.

    Raises:
        UserError: If the files are missing or damaged, or were saved for another editor, other weights or another
            layer.
    """
    path = Path(folder)
    try:
        header = _Header.model_validate_json(readable(path / "editor.json").read_bytes())
        tensors = load_file(readable(path / "editor.safetensors"), device=str(model.device))
    except ValidationError as error:
        raise UserError(f"{path / 'editor.json'}: {first_error(error)}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no saved editor can be read here ({error})") from error
    if header.editor != cls.registered_name:
        raise UserError(f"{path}: holds editor '{header.editor}', not '{cls.registered_name}'")
    if header.model_fingerprint != model.fingerprint:
        raise UserError(f"{path}: was saved for other weights than those of model {model.name}")
    if header.layer != model.layer_name:
        raise UserError(f"{path}: was saved for layer {header.layer}, not {model.layer_name}")
    known = option_names(cls)
    unknown = next((name for name in header.settings if name not in known), None)
    if unknown is not None:
        raise UserError(f"{path / 'editor.json'}: field 'settings.{unknown}': editor '{header.editor}' has none")
    try:
        editor: E = cast(Any, cls)(model=model, **header.settings)
    except UserError as error:
        raise UserError(f"{path / 'editor.json'}: {error}") from error
    try:
        editor.load_answering_state({**header.state, **tensors})
    except MISFITS as error:
        editor.detach()
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: the saved state is not whole ({type(error).__name__}: {reason})") from error
    return editor


def option_names(cls: type) -> list[str]:
    """Returns the constructor arguments of an editor that are options, in order."""
    return [name for name in inspect.signature(cls).parameters if name not in GIVEN_BY_THE_HARNESS]


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a state into its tensors, for safetensors, and its other values, for JSON."""
    tensors = {name: value.detach().contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}
