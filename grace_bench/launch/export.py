"""`grace-bench export`: the edited model of a finished run, for use without it (docs/deploy.md)."""

from collections.abc import Callable
from pathlib import Path

from grace_bench.common.untrusted import check_run_folder
from grace_bench.data.stream import EditStream
from grace_bench.editing.export import Export, export_editor
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import MISFITS, UserError, reason_of
from grace_bench.launch.arguments import run_arguments
from grace_bench.launch.run_config import RunConfig
from grace_bench.launch.run_folder import read_plain_config
from grace_bench.models.editable import EditableModel
from grace_bench.models.loading import pick_device
from grace_bench.models.tasks.lookup import get_task
from grace_bench.registry import EDITORS
from grace_bench.results.reading import RESULT_FILE, read_edits, read_result


def export_run(folder: Path, target: Path, *, dtype: str | None, say: Callable[[str], None]) -> Export:
    """Exports the edited model of a finished run, and says what was written.

    Args:
        folder: The run folder.
        target: The folder to write, which must not exist or be empty.
        dtype: Of the weights that are written; None for the run's.
        say: Takes a line for the user.

    Raises:
        UserError: If the folder holds no finished run, its model cannot be loaded or is another one now, or as in
            `export_editor`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    check_run_folder(folder)
    if not (folder / RESULT_FILE).is_file():
        what = "an unfinished run: `grace-bench resume` finishes it" if _holds_run(folder) else "no run"
        raise UserError(f"{folder}: holds {what}")
    result = read_result(folder / RESULT_FILE)
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: is not there; of a run started from Python, export the editor itself")
    try:
        config = RunConfig.from_plain(read_plain_config(path))
        stream, arguments = run_arguments(config)
    except MISFITS as error:
        raise UserError(f"{path}: not a configuration ({reason_of(error)})") from error
    model = EditableModel.from_pretrained(
        arguments["model"],
        layer=result.model.layer,
        task=get_task(stream.task),
        dtype=config.dtype,
        device=_device(config.device),
        device_map=config.device_map,
        load_in=config.load_in,
    )
    with EDITORS.get(result.editor.name).from_pretrained(folder / "editor", model=model) as editor:
        if editor.can_undo:
            _name_edits(editor, folder, stream, split=config.split, say=say)
        export = export_editor(editor, target, dtype=dtype, run=result)
    say(f"{export.folder}: {export.told}")
    return export


def _name_edits(
    editor: EditorStrategy, folder: Path, stream: EditStream, *, split: str, say: Callable[[str], None]
) -> None:
    """Gives the edits of a run the ids of their requests, so that each can be undone; says why if it cannot."""
    try:
        records = read_edits(folder / "edits.jsonl").values()
        data = stream.load()
        requests = {request.id: request for request in (data.validation if split == "validation" else data.edits)}
        editor.name_edits([requests[record.id] for record in records if record.edited and record.failed is None])
    except (UserError, KeyError) as error:
        say(f"{folder}: the stream's requests cannot be read, so no edit can be undone by its id ({reason_of(error)})")


def _holds_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "edits.jsonl").is_file()


def _device(name: str) -> str:
    """The run's device, or the fastest here if this machine does not have it."""
    try:
        pick_device(name)
    except UserError:
        return "auto"
    return name
