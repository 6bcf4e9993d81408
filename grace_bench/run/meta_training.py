"""`meta_train`: training an editor itself, before its runs."""

from collections.abc import Callable

from grace_bench.common.progress import Progress
from grace_bench.data.stream import EditStream
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import DeviceMap, EditableModel, Quantisation
from grace_bench.registry import EDITORS
from grace_bench.run.opening import open_benchmark, own_threads
from grace_bench.run.settings import RunSettings


@own_threads()
def meta_train(
    stream: EditStream | str,
    *,
    model: EditableModel | str | None = None,
    editor: Callable[..., EditorStrategy] | str,
    settings: RunSettings | None = None,
    layer: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    load_in: Quantisation | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Meta-trains an editor on the requests that a stream marks for training, and caches the result for its runs.

    Args:
        stream: A stream, or the name of a registered one.
        model: As in `run_benchmark`.
        editor: As in `run_benchmark`.
        settings: As in `run_benchmark`; only the seed, the protocol and the threads are used.
        layer: The layer to edit, if `model` is a name.
        dtype: The model's dtype, if `model` is a name.
        device: Where to train, if `model` is a name.
        device_map: As in `run_benchmark`.
        load_in: As in `run_benchmark`.
        progress: Called during training.

    Returns:
        Figures of the training, by name.

    Raises:
        UserError: If the editor needs no meta-training, or the stream has no requests for it.
    """
    make = EDITORS.get(editor) if isinstance(editor, str) else editor
    with (
        open_benchmark(
            stream,
            model=model,
            settings=settings or RunSettings(),
            layer=layer,
            dtype=dtype,
            device=device,
            device_map=device_map,
            load_in=load_in,
            progress=progress,
        ) as opened,
        make(model=opened.model) as strategy,
    ):
        train = opened.benchmark.data.train
        if strategy.needs_meta_training and not train:
            raise UserError(f"stream '{opened.benchmark.name}' has no requests for training")
        return strategy.meta_train(train, progress=progress)
