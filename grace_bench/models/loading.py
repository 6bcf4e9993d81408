"""Loading: a model and its tokenizer from a short name, the hub or a folder; devices, dtypes and threads by name."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from grace_bench.common.options import check_choice
from grace_bench.common.untrusted import check_model_folder
from grace_bench.errors import UserError, did_you_mean, reason_of
from grace_bench.models.network import TextEncoder, greedy_config, start_token
from grace_bench.models.tasks.base import Task
from grace_bench.models.tasks.lookup import all_tasks, get_task
from grace_bench.models.tokenizers import load_tokenizer
from grace_bench.models.zoo import default_layer, resolve_model

DeviceMap = str | Mapping[str, str | int]
Quantisation = Literal["8bit", "4bit"]
"""How bitsandbytes stores the weights of linear modules: LLM.int8() without outlier columns, or NF4."""

_TINY_MODEL_PARAMETERS = 20_000_000
_MASKED, _CAUSAL, _SEQ2SEQ = "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A loaded model.

    Attributes:
        module: The module, on its device and in its dtype.
        layer: Dotted path of the layer to edit.
        tokenizer: The tokenizer; None if it was not requested, or the model has `encode`.
        encode: Turns texts into the module's inputs, for models without a tokenizer.
        name: The name in results.
        hub_id: The hub id that it was loaded by; None for a folder.
        generation_config: The checkpoint's own settings of generation; None if it has none.
    """

    module: nn.Module
    layer: str
    tokenizer: Any
    encode: TextEncoder | None
    name: str
    hub_id: str | None
    generation_config: Any


def load_pretrained(
    name_or_path: str,
    *,
    layer: str | None,
    task: Task,
    dtype: str | torch.dtype,
    device: str | torch.device,
    device_map: DeviceMap | None,
    load_in: Quantisation | None,
    tokenizer: bool,
) -> Pretrained:
    """Loads a model for a task; see `EditableModel.from_pretrained` for the arguments.

    Raises:
        UserError: If the model cannot be found or loaded, was trained for another task, or has no known layer.
    """
    source = resolve_model(name_or_path)
    target = pick_device(device)
    precision = pick_dtype(dtype)
    if device_map is not None:
        _check_device_map(device_map, device)
    if load_in is not None:
        check_choice("load_in", load_in, get_args(Quantisation))
    if source.stream and get_task(source.stream.task).auto_class != task.auto_class:
        raise UserError(
            f"model={name_or_path} was trained for {source.stream.task} (stream {source.stream.registered_name}), "
            f"not for {task.name}"
        )
    weights, vocabulary = source.fetch()
    for folder in dict.fromkeys((weights, vocabulary)):
        check_model_folder(folder)
    custom = source.stream.load_model(Path(weights)) if source.stream else None
    generation_config = None
    if custom is None:
        module, generation_config = _load_module(weights, task, precision, target, device_map, load_in)
        encode = None
    elif device_map is None and load_in is None:
        module, encode = custom[0].to(device=target, dtype=precision), custom[1]
    else:
        refused = "load_in=" if device_map is None else "device_map="
        raise UserError(f"model={name_or_path} is no transformers model: it takes dtype= and device=, not {refused}")
    return Pretrained(
        module=module,
        layer=layer or source.layer or default_layer(module),
        tokenizer=load_tokenizer(vocabulary) if tokenizer and custom is None else None,
        encode=encode,
        name=source.name,
        hub_id=None if Path(source.path).is_dir() else source.path,
        generation_config=generation_config,
    )


def pick_device(device: str | torch.device) -> torch.device:
    """Returns a device by name; `auto` is CUDA, then MPS, then the CPU.

    >>> pick_device("cpu")
    device(type='cpu')

    Raises:
        UserError: If torch does not know the device, or the machine does not have it.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        # A device without storage, such as `meta`, cannot give the number back.
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}") from error
    return chosen


def pick_threads(model: nn.Module, threads: int | Literal["auto"]) -> int:
    """Returns the number of torch threads; `auto` is one for tiny models, where distributing work does not pay.

    Raises:
        UserError: If the machine does not have as many cores.
    """
    if threads != "auto":
        most = os.cpu_count() or 1
        if not 1 <= threads <= most:
            raise UserError(f"threads={threads} should be auto or from 1 to {most}")
        return threads
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return 1 if n_parameters < _TINY_MODEL_PARAMETERS else torch.get_num_threads()


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Returns a dtype by name.

    >>> pick_dtype("bfloat16")
    torch.bfloat16

    Raises:
        UserError: If weights are not loaded in it.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in known:
        raise UserError(f"dtype={dtype!r} is not known{did_you_mean(dtype, known)} (there are: {', '.join(known)})")
    return known[dtype]


def _check_device_map(device_map: DeviceMap, device: str | torch.device) -> None:
    if device != "auto":
        raise UserError(f"device={device} and device_map={device_map} exclude each other")
    if find_spec("accelerate") is None:
        raise UserError(f"device_map={device_map} needs accelerate: pip install 'grace-bench[large]'")


def _load_module(
    path: str,
    task: Task,
    dtype: torch.dtype,
    device: torch.device,
    device_map: DeviceMap | None,
    load_in: Quantisation | None,
) -> tuple[nn.Module, Any]:
    """The model, which generates greedily, and the checkpoint's own settings of generation."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = _read_config(path)
    _check_kind(path, config, task)
    is_quantised = _check_quantised(path, config, load_in) or load_in is not None
    if is_quantised:
        # bitsandbytes would say at every product that it rounds activations.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        # Quantised weights are made on their device, and stay there.
        device_map = device_map or {"": str(device)}
    with _loading(path):
        model, loading = getattr(transformers, task.auto_class).from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map=device_map if device_map is None or isinstance(device_map, str) else dict(device_map),
            **({} if load_in is None else {"quantization_config": _quantisation_config(load_in, dtype)}),
        )
    # transformers initialises missing weights at random.
    lacking = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"model={path}: the checkpoint lacks {lacking[0]}{more}, which {task.name} needs")
    own = getattr(model, "generation_config", None)
    # A checkpoint's own sampling settings would make the answers of models incomparable.
    model.generation_config = greedy_config(start_token(model) if model.config.is_encoder_decoder else None)
    if is_quantised:
        _steady(model)
    # Not to a dtype: buffers such as the frequencies of rotary positions stay in float32, as in transformers.
    loaded: nn.Module = model if device_map is not None else model.to(device)
    return loaded, own


def _read_config(path: str) -> Any:
    import transformers

    with _loading(path):
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)


def _check_quantised(path: str, config: Any, load_in: Quantisation | None) -> bool:
    """Returns whether a checkpoint is quantised.

    Raises:
        UserError: If it is and `load_in` asks for another quantisation, or a package is missing.
    """
    saved = getattr(config, "quantization_config", None)
    method = str(saved.get("quant_method")) if isinstance(saved, Mapping) else None
    if method is not None and load_in is not None:
        raise UserError(f"model={path}: its weights are quantised already ({method}): leave load_in={load_in} out")
    needed = ["accelerate", "bitsandbytes"] if load_in is not None or method == "bitsandbytes" else []
    lacking = next((name for name in needed if find_spec(name) is None), None)
    if lacking is not None:
        what = f"model={path}: quantised by bitsandbytes," if load_in is None else f"load_in={load_in}"
        raise UserError(f"{what} needs {lacking}: pip install 'grace-bench[quantized]'")
    return method is not None


def _quantisation_config(load_in: Quantisation, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        # Outlier columns are chosen over a whole batch: an answer would depend on what else is in it.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _steady(model: nn.Module) -> None:
    """Makes bitsandbytes leave its weights as they were loaded."""
    part: Any
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            # It would repack them at the first pass, into a form that has no gradient and another fingerprint.
            part.support_avx512bf16_for_cpu = False


def _check_kind(path: str, config: Any, task: Task) -> None:
    """Raises if a model's configuration names another kind of model than a task needs; names the tasks that it fits.

    transformers loads many models as another kind without complaint: it drops the encoder of an encoder-decoder, or
    takes the input embedding of a classifier for the output of a language model.
    """
    classes = {name: _class_for(config, name) for name in (_MASKED, *(other.auto_class for other in all_tasks()))}
    if not getattr(config, "is_encoder_decoder", False):
        # Models that answer to speech are among those that transformers calls sequence-to-sequence.
        classes[_SEQ2SEQ] = None
    kinds = _kinds_of(config, classes)
    # As a classifier, loading names the head that a masked language model lacks.
    is_told = kinds == {_MASKED} and task.auto_class != _CAUSAL
    if classes[task.auto_class] is not None and (not kinds or task.auto_class in kinds or is_told):
        return
    fitting = [other for other in all_tasks() if other.auto_class in kinds]
    saved = next(iter(config.architectures or ()), config.model_type)
    kind = fitting[0].model_kind if fitting else "a masked language model" if kinds else "of another kind"
    advice = ""
    if fitting:
        names = " or ".join(other.name for other in fitting)
        advice = f"take a stream with the task {names} (with stream=jsonl, stream.task={fitting[0].name}), or "
    raise UserError(
        f"model={path}: {saved} is {kind}, and {task.name} needs {task.model_kind}: {advice}name another model"
    )


def _kinds_of(config: Any, classes: Mapping[str, str | None]) -> set[str]:
    """The auto classes that load a model as what it was saved as; empty if that is unknown."""
    saved = next(iter(config.architectures or ()), None)
    kinds = {kind for kind, name in classes.items() if name is not None and name == saved}
    if kinds or saved not in (None, _class_for(config, "AutoModel")):
        return kinds
    # Without a head, what the architecture is for.
    if classes[_SEQ2SEQ] is not None:
        return {_SEQ2SEQ}
    return {_CAUSAL} if classes[_CAUSAL] is not None and classes[_MASKED] is None else set()


def _class_for(config: Any, auto_class: str) -> str | None:
    """The name of the class that one of transformers' auto classes loads for a configuration; None if there is none."""
    import transformers

    found = getattr(transformers, auto_class)._model_mapping.get(type(config), None)
    # Some configurations have several classes, the default first.
    return None if found is None else str((found[0] if isinstance(found, tuple) else found).__name__)


@contextmanager
def _loading(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A broken folder can raise the errors of any library that reads it.
        raise UserError(f"model={path}: cannot be loaded ({reason_of(error)})") from error
