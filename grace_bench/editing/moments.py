"""Second moments of layer inputs over running text: computed once for all layers together, and cached.

The same store holds the inputs at the queries of prompts, of which whitening is estimated.
"""

import hashlib
import json
import platform
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grace_bench.common.options import check_choice, check_text, check_whole
from grace_bench.common.progress import Progress
from grace_bench.common.signals import Interruption
from grace_bench.data.artifacts import artifact_path, content_key, drop_artifact, load_artifact, save_artifact
from grace_bench.data.requests import EditRequest
from grace_bench.editing.moment_files import SecondMoment, read_moments
from grace_bench.editing.running_text import read_texts, sampled_running_text, texts_of_requests
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch, last_token, pad
from grace_bench.models.fingerprint import hash_configuration, hash_tensors
from grace_bench.models.linear import dimensions
from grace_bench.models.memory import memory_for_matrices

__all__ = [
    "MomentSource",
    "SecondMoment",
    "TextSource",
    "cached_queries",
    "input_widths",
    "read_moments",
    "second_moments",
]

TextSource = Literal["train", "model"]
"""The stream's requests for training, or texts sampled from the model itself."""
_FOLDER = "moments"
_FORMAT = 1
_TOKENS_A_BATCH = 2048
_SAMPLED_TEXTS = 512
_SAMPLED_TOKENS = 64
_SECONDS_BETWEEN_SAVES = 60.0
# Sums of wide layers take gigabytes: saving them takes at most this share of the time.
_SHARE_OF_SAVING = 0.05


@dataclass(frozen=True, kw_only=True)
class MomentSource:
    """The text that second moments of layer inputs are taken over, as the options of an editor name it.

    Attributes:
        text: `train` for the stream's requests for training, or `model` for texts sampled from the model itself.
        text_path: A file of running text, one text a line, or `.jsonl` with the field `Text` or `text`; comes before
            `text`.
        moments_path: An `.npz` file of second moments as ROME's and EasyEdit's code writes them, or a folder that holds
            one for each layer; comes before any text.
        n_texts: Maximum number of texts.
        seed: Seeds the sampled texts.

    Raises:
        UserError: If a value is out of range; names it as the option of an editor.
    """

    text: TextSource = "train"
    text_path: str | None = None
    moments_path: str | None = None
    n_texts: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("editor.text", self.text, get_args(TextSource))
        check_text("editor.text_path", self.text_path, optional=True)
        check_text("editor.moments_path", self.moments_path, optional=True)
        check_whole("editor.n_texts", self.n_texts, least=1)
        check_whole("editor.seed", self.seed, least=0)

    @property
    def needs_requests(self) -> bool:
        """Whether the texts are the requests that a stream marks for training."""
        return self.moments_path is None and self.text_path is None and self.text == "train"

    def moments(
        self,
        model: EditableModel,
        layers: Sequence[str],
        train: Sequence[EditRequest],
        *,
        editor: str,
        progress: Progress | None = None,
    ) -> dict[str, SecondMoment]:
        """Returns the second moments of the inputs of layers: read, or computed on the text and cached.

        Args:
            model: A causal model; it is read as it is, so its edits must be suspended.
            layers: Dotted paths.
            train: The stream's requests for training.
            editor: The editor's name, for messages.
            progress: Called during sampling and computing.

        Returns:
            One for each layer, in the order given.

        Raises:
            UserError: If there is no text, a file cannot be used, or a layer has no input of (B, T, D).
        """
        if self.moments_path is not None:
            return read_moments(self.moments_path, input_widths(model, layers))
        if self.text_path is not None:
            texts = read_texts(self.text_path, most=self.n_texts)
        elif self.text == "model":
            _check_causal(model)
            n_texts = min(self.n_texts, _SAMPLED_TEXTS)
            texts = sampled_running_text(
                model, n_texts=n_texts, length=_SAMPLED_TOKENS, seed=self.seed, progress=progress
            )
        else:
            texts = texts_of_requests(train[: self.n_texts])
            if not texts:
                raise UserError(
                    f"editor '{editor}' needs running text for its second moments: give editor.text_path=FILE, or "
                    f"editor.text=model"
                )
        return second_moments(model, layers, texts, progress=progress)


def second_moments(
    model: EditableModel, layers: Sequence[str], texts: Sequence[str], *, progress: Progress | None = None
) -> dict[str, SecondMoment]:
    """Returns the mean of k kᵀ over every token of the texts, for the inputs k of each layer.

    It is cached for each layer by weights, configuration and tokens. What is not cached is summed in float64, in one
    pass over the texts for all layers whose sums fit into a quarter of the device's memory. An interrupted pass
    resumes; the result is the same to the last bit.

    Args:
        model: A causal model; it is read as it is, so its edits must be suspended.
        layers: Dotted paths of modules with an input of (B, T, D).
        texts: The running text; each is cut at the model's longest input.
        progress: Called after every batch.

    Returns:
        One for each layer, in the order given.

    Raises:
        UserError: If the model is not causal, the texts have no tokens, a layer does not exist or has no such input, or
            its inputs are not finite.
        KeyboardInterrupt: After a signal, once the sums are saved; a second signal interrupts at once.
    """
    _check_causal(model)
    for layer in layers:
        model.find_layer(layer)
    rows = [row for text in texts if (row := _tokens(model, text))]
    if not rows:
        raise UserError("second moments need running text: the texts have no tokens")
    content = {
        "format": _FORMAT,
        # The tokens are counted themselves, so that the tokenizer does not matter.
        "model": [model.fingerprint, hash_configuration(model.config, None)],
        "tokens": _digest(rows),
    }
    keys = {layer: content_key(layer=layer, **content) for layer in layers}
    found = {layer: moment for layer, key in keys.items() if (moment := _cached(key)) is not None}
    n_tokens = sum(map(len, rows))
    for group in _groups(model, sorted(set(layers) - set(found))):
        job = content_key(layers=group, **content)
        started = time.perf_counter()
        sums = _summed(model, group, rows, job, progress)
        for layer in group:
            computed = SecondMoment(sums.pop(layer).div_(n_tokens).float().cpu(), n_tokens)
            saved = {"moment": computed.matrix, "n_tokens": torch.tensor(n_tokens)}
            _save(keys[layer], saved, model=model.name, layer=layer)
            path, seconds = artifact_path(_FOLDER, keys[layer]), time.perf_counter() - started
            # The saved matrix is read from the file as it is used, and takes no memory of its own.
            found[layer] = replace(_cached(keys[layer]) or computed, path=path, seconds=seconds)
        drop_artifact(_FOLDER, job)
    return {layer: found[layer] for layer in layers}


def _groups(model: EditableModel, layers: Sequence[str]) -> Iterator[list[str]]:
    """Yields layers by as many as their sums leave memory for the model."""
    most, group, n_bytes = memory_for_matrices(model.layer_device), list[str](), 0
    for layer in layers:
        size = torch.float64.itemsize * _width_of(model, layer) ** 2
        if group and n_bytes + size > most:
            yield group
            group, n_bytes = [], 0
        group.append(layer)
        n_bytes += size
    if group:
        yield group


def _width_of(model: EditableModel, layer: str) -> int:
    """The width of a linear layer's input; of another module's the largest that its weights allow."""
    module = model.find_layer(layer)
    size = dimensions(module)
    if size is not None:
        return size[0]
    return max((size for weight in module.parameters() for size in weight.shape), default=0)


def cached_queries(model: EditableModel, prompts: Sequence[str], targets: Sequence[str | int] | None = None) -> Tensor:
    """Returns `model.queries`, computed once for a model, a layer and prompts.

    Cached by whatever may change a bit of them: weights, configuration, encoded batches, machine and threads.

    Args:
        model: The model; it is read as it is, so its edits must be suspended.
        prompts: As in `EditableModel.queries`.
        targets: As there.

    Returns:
        (n, D_in) float32, on the layer's device.
    """
    batches = []
    for chunk in model.query_batches(prompts, targets):
        encoded = model.encode_batch([prompts[i] for i in chunk], targets and [targets[i] for i in chunk])
        batches.append([chunk, hash_tensors({**encoded.inputs, "query": encoded.query})])
    key = content_key(
        format=_FORMAT,
        model=[model.fingerprint, hash_configuration(model.config, None)],
        layer=model.layer_name,
        batches=content_key(batches=batches),
        machine=[str(model.layer_device.type), platform.machine(), torch.__version__, torch.get_num_threads()],
    )
    known = load_artifact(_FOLDER, key)
    if known is not None and "queries" in known[0]:
        return known[0]["queries"].to(model.layer_device)
    queries = model.queries(prompts, targets)
    # They take seconds to compute: a cache that cannot be written stops nobody.
    with suppress(OSError):
        save_artifact(_FOLDER, key, {"queries": queries}, {"model": model.name})
    return queries


def input_widths(model: EditableModel, layers: Sequence[str]) -> dict[str, int]:
    """Returns the width D of each layer's (B, T, D) input, read from a pass over one token.

    Raises:
        UserError: If a layer does not exist or has no such input.
    """
    widths: dict[str, int] = {}

    def measure(layer: str, inputs: Tensor) -> None:
        widths[layer] = inputs.shape[-1]

    _read_inputs(model, layers, model.encode_batch([""]), measure)
    return {layer: widths[layer] for layer in layers}


class _LayersReadError(Exception):
    """Ends a pass when the last layer has been read."""


@torch.no_grad()
def _read_inputs(
    model: EditableModel, layers: Sequence[str], batch: EncodedBatch, read: Callable[[str, Tensor], None]
) -> None:
    """Runs a batch up to the last of the layers, and hands each layer's (B, T, D) input to `read`, once."""
    pending = dict.fromkeys(layers)

    def hook(layer: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Some modules are called several times in a pass.
        if layer not in pending:
            return
        del pending[layer]
        read(layer, _as_activations(layer, (*args, *kwargs.values()), batch))
        if not pending:
            raise _LayersReadError

    with ExitStack() as hooks:
        for layer in pending:
            handle = model.find_layer(layer).register_forward_pre_hook(
                lambda _, args, kwargs, layer=layer: hook(layer, args, kwargs), with_kwargs=True
            )
            hooks.callback(handle.remove)
        try:
            model.logits(batch)
        except _LayersReadError:
            return
    raise UserError(f"layer={next(iter(pending))} is never called: name a module inside it")


def _as_activations(layer: str, given: Sequence[Any], batch: EncodedBatch) -> Tensor:
    """The first tensor among a layer's arguments, as (B, T, D)."""
    inputs = next((value for value in given if isinstance(value, Tensor)), None)
    n_rows, n_positions = len(batch), batch.n_positions
    # Some models merge rows and positions in front of a linear layer.
    shapes = ((n_rows, n_positions), (n_rows * n_positions,))
    if inputs is None or not inputs.is_floating_point() or inputs.shape[:-1] not in shapes:
        raise UserError(f"layer={layer} does not take activations of every token: name another module")
    return inputs.reshape(n_rows, n_positions, -1)


def _summed(
    model: EditableModel, layers: Sequence[str], rows: Sequence["array[int]"], job: str, progress: Progress | None
) -> dict[str, Tensor]:
    """The (D, D) float64 sum of k kᵀ for each layer, resumed where an earlier computation of the job stopped."""
    sums, n_done = _partial(job, layers)
    chunks = list(_batches(rows))
    last_save, pause = time.perf_counter(), _SECONDS_BETWEEN_SAVES
    n_texts = sum(len(chunk) for chunk in chunks[:n_done])
    with Interruption("the current batch of texts") as interruption:
        interruption.can_defer = True
        for chunk in chunks[n_done:]:
            _add(model, layers, chunk, sums)
            n_done, n_texts = n_done + 1, n_texts + len(chunk)
            if n_done < len(chunks) and (interruption.is_requested or time.perf_counter() - last_save > pause):
                started = time.perf_counter()
                _save(job, {**sums, "n_done": torch.tensor(n_done)}, model=model.name, n_texts=n_texts)
                last_save = time.perf_counter()
                pause = max(_SECONDS_BETWEEN_SAVES, (last_save - started) / _SHARE_OF_SAVING)
            if n_done < len(chunks) and interruption.is_requested:
                raise KeyboardInterrupt(
                    f"interrupted with second moments of {n_texts} of {len(rows)} texts; the same command goes on there"
                )
            if progress is not None:
                progress("second moments", n_texts, len(rows))
    return sums


def _add(model: EditableModel, layers: Sequence[str], chunk: Sequence["array[int]"], sums: dict[str, Tensor]) -> None:
    """Adds k kᵀ of every token of a batch of rows."""
    ids, mask = pad(chunk, 0, "right")
    batch = EncodedBatch(inputs={"input_ids": ids, "attention_mask": mask}, query=last_token(mask))

    def add(layer: str, inputs: Tensor) -> None:
        # MPS has no float64.
        device = torch.device("cpu") if inputs.device.type == "mps" else inputs.device
        keys = inputs[mask.bool().to(inputs.device)].to(device).double()
        if not bool(keys.isfinite().all()):
            raise UserError(f"layer={layer} has inputs that are not finite on the running text")
        if layer not in sums:
            sums[layer] = keys.new_zeros(keys.shape[1], keys.shape[1])
        sums[layer] = sums[layer].to(device).addmm_(keys.T, keys)

    _read_inputs(model, layers, batch.to(model.device), add)


def _batches(rows: Sequence["array[int]"]) -> Iterator[list["array[int]"]]:
    """Yields batches of rows of similar length, each as large as the limit on padded tokens allows."""
    chunk: list[array[int]] = []
    for row in sorted(rows, key=len):
        if chunk and (len(chunk) + 1) * len(row) > _TOKENS_A_BATCH:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _tokens(model: EditableModel, text: str) -> "array[int]":
    return array("i", model.encode_batch([""], [text]).inputs["input_ids"][0].tolist())


def _digest(rows: Sequence["array[int]"]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{len(row)}:".encode())
        digest.update(row.tobytes())
    return digest.hexdigest()


def _cached(key: str) -> SecondMoment | None:
    tensors, _ = load_artifact(_FOLDER, key) or ({}, {})
    if tensors.keys() != {"moment", "n_tokens"}:
        return None
    return SecondMoment(tensors["moment"], int(tensors["n_tokens"]), path=artifact_path(_FOLDER, key))


def _partial(job: str, layers: Sequence[str]) -> tuple[dict[str, Tensor], int]:
    """The sums of an interrupted computation, and how many batches they hold; none if there is no whole file."""
    tensors, _ = load_artifact(_FOLDER, job) or ({}, {})
    if tensors.keys() != {*layers, "n_done"}:
        return {}, 0
    n_done = int(tensors.pop("n_done"))
    return tensors, n_done


def _save(key: str, tensors: Mapping[str, Tensor], **notes: object) -> None:
    try:
        # In one note: safetensors writes several in any order, and equal moments should have equal bytes.
        save_artifact(_FOLDER, key, tensors, {"notes": json.dumps(notes, sort_keys=True)})
    except OSError as error:
        folder = artifact_path(_FOLDER, key).parent
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or type(error).__name__}); GRACE_BENCH_CACHE names another "
            f"folder for the cache"
        ) from error


def _check_causal(model: EditableModel) -> None:
    if not model.task.reads_running_text:
        raise UserError(f"second moments need a task that reads running text, which {model.task.name} does not")
