"""Weights that accelerate has offloaded: on the meta device, and read from memory or files for every pass.

What is written into such a weight is lost after the pass. A module whose weights are to change is loaded: its weights
lie on the device on which it computes until they are offloaded again. The memory or files that they were read from are
never written.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class CannotLoadError(Exception):
    """A module's weights cannot be loaded on their own; the message says why, after "its weights are offloaded"."""


def is_offloaded(module: nn.Module) -> bool:
    """Whether any weight or buffer of a module is offloaded."""
    return any(tensor.is_meta for tensor in module.state_dict().values())


def load_offloaded(model: nn.Module, module: nn.Module) -> Callable[[], None]:
    """Loads the offloaded weights and buffers of a module onto the device on which it computes.

    Args:
        model: The whole model.
        module: The module, or a part that holds some of its own weights.

    Returns:
        A function that offloads them again; what was written into them meanwhile is lost.

    Raises:
        CannotLoadError: If they are shared with another part of the model, quantised, or offloaded by a module around
            theirs; nothing has been loaded.
    """
    from accelerate.utils import set_module_tensor_to_device

    names = {part: [name for name, tensor in _own(part) if tensor.is_meta] for part in module.modules()}
    hooks = {part: _hook_of(model, part, found) for part, found in names.items() if found}
    for part, hook in hooks.items():
        for name in names[part]:
            # Weights in memory may be those that other parts read.
            value = hook.weights_map[name].clone()
            set_module_tensor_to_device(part, name, hook.execution_device, value=value)
        hook.offload = False

    def offload() -> None:
        for part, hook in hooks.items():
            for name in names[part]:
                set_module_tensor_to_device(part, name, "meta")
            hook.offload = True

    return offload


def _hook_of(model: nn.Module, part: nn.Module, names: list[str]) -> Any:
    """The hook that loads these weights of a part for every pass.

    Raises:
        CannotLoadError: As in `load_offloaded`.
    """
    from accelerate.hooks import AlignDevicesHook

    outermost = getattr(part, "_hf_hook", None)
    hooks = getattr(outermost, "hooks", [outermost])
    hook = next((hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload), None)
    if hook is None:
        raise CannotLoadError("together with those of the module around it")
    if not _shared_names(model, part, hook).isdisjoint(names):
        raise CannotLoadError("and shared with another part of the model")
    if any(not parameter.is_floating_point() for parameter in part.parameters(recurse=False)):
        raise CannotLoadError("and quantised")
    return hook


def _shared_names(model: nn.Module, part: nn.Module, hook: Any) -> set[str]:
    """The names of a part's own weights that another part has too."""
    tied = getattr(model, "all_tied_weights_keys", {})
    path = next(path for path, found in model.named_modules() if found is part)
    names = {name for name, _ in _own(part) if f"{path}.{name}" in (*tied, *tied.values())}
    # Weights that were on the meta device already when they were dispatched are all at address 0.
    return names if 0 in (hook.tied_params_map or {}) else names | hook.tied_params_names


def _own(part: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from part.named_parameters(recurse=False)
    yield from part.named_buffers(recurse=False)
