"""Modules whose weights an editor rewrites: restoring, suspending and saving them, and adding updates to them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grace_bench.common.state import copied
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.offload import CannotLoadError, is_offloaded, load_offloaded


class RewrittenWeights:
    """The modules that an editor rewrites, with a copy of their unedited weights.

    Offloaded weights are loaded onto the device on which they are used, until `release`.

    A weight of fewer digits than float32 to which updates are added is the rounded value of a float32 copy, its master.

    Args:
        model: The model they belong to.
        editor: Name of the editor, for messages.

    Attributes:
        is_suspended: Whether the unedited model answers at present.
    """

    def __init__(self, model: EditableModel, *, editor: str) -> None:
        self._model = model
        self._editor = editor
        self._modules: dict[str, nn.Module] = {}
        self._unedited: dict[str, Tensor] = {}
        self._offload: dict[str, Callable[[], None]] = {}
        """What offloads modules again, by path."""
        self._masters: dict[str, Tensor] = {}
        """Float32 copies of weights, in their own shapes, by the path of the module."""
        self.is_suspended = False

    def add(self, path: str, *, option: str = "layer") -> None:
        """Adds an unedited module by its dotted path; adding it again changes nothing.

        Args:
            path: The path.
            option: The option that names it, for messages.

        Raises:
            UserError: If the model has no such module, or its weights are quantised, or offloaded and cannot be loaded.
        """
        if path in self._modules:
            return
        module = self._model.find_layer(path, option=option)
        _check_not_quantised(module, path, self._editor, option=option)
        if is_offloaded(module):
            try:
                self._offload[path] = load_offloaded(self._model.module, module)
            except CannotLoadError as reason:
                raise UserError(
                    f"{option}={path}: its weights are offloaded {reason}, where editor '{self._editor}' cannot "
                    f"rewrite them; keep them on a device with device_map="
                ) from None
        self._modules[path] = module
        for name, tensor in _weights(path, module):
            # Memory is short on the device of an offloaded model.
            self._unedited[name] = tensor.to("cpu" if path in self._offload else tensor.device, copy=True)
        self._model.engine.rewrites([*self._modules.values()])

    @property
    def n_numbers(self) -> int:
        """The number of elements in the tensors of `state_dict`."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the weights and buffers of the modules and the masters, by kind and dotted path; not copied."""
        weights = {name: tensor for path, module in self._modules.items() for name, tensor in _weights(path, module)}
        return weights | {_name_of_master(path): master for path, master in self._masters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies what `state_dict` returned from a state that may hold more.

        Raises:
            KeyError: If a weight is missing.
            RuntimeError: If a tensor has another shape.
        """
        masters = {path: state[name] for path in self._modules if (name := _name_of_master(path)) in state}
        for path, master in masters.items():
            weight = self._weight(path)
            if master.shape != weight.shape:
                raise RuntimeError(f"{_name_of_master(path)} is {tuple(master.shape)}, not {tuple(weight.shape)}")
            masters[path] = master.to(weight.device, torch.float32, copy=True)
        for path, module in self._modules.items():
            module.load_state_dict({name: state[_name_of_weight(path, name)] for name in module.state_dict()})
        self._masters = masters

    def restore(self) -> None:
        """Restores the modules' unedited weights, bit for bit."""
        self.load_state_dict(self._unedited)

    def release(self) -> None:
        """Offloads again what was loaded; the modules are no longer rewritten and have their unedited weights."""
        for path, offload in self._offload.items():
            offload()
            del self._modules[path]
        self._offload.clear()
        self._unedited = {name: tensor for name, tensor in self._unedited.items() if name in self.state_dict()}

    @torch.no_grad()
    def add_to_weight(self, path: str, update: Tensor) -> None:
        """Adds a (D_out, D_in) update to the weight of a linear module (see `EditorStrategy.add_to_weight`).

        Raises:
            EditFailure: If the update is not finite; nothing has changed.
            KeyError: If the module was not added.
            ValueError: If the update has another shape.
        """
        current = self.weight_of(path)
        if update.shape != current.shape:
            raise ValueError(f"the update of {path} is {tuple(update.shape)}, its weight {tuple(current.shape)}")
        # A NaN comes through, and this is faster than looking at every number.
        if not bool(torch.stack(update.aminmax()).isfinite().all()):
            raise EditFailure("the update is not finite")
        weight = self._weight(path)
        # Metal has no float64.
        device = torch.device("cpu") if weight.device.type == "mps" else weight.device
        total = self._as_stored(path, current.to(device) + update.to(device))
        if torch.finfo(weight.dtype).bits < 32:
            total = self._masters[self._first_with(weight)] = total.to(weight.device, torch.float32)
        weight.copy_(total)

    def weight_of(self, path: str) -> Tensor:
        """Returns the (D_out, D_in) weight of a linear module in float32 or float64: its master if there is one.

        Raises:
            KeyError: If the module was not added.
        """
        weight = self._weight(path)
        current = self._masters.get(self._first_with(weight), weight.detach())
        return self._as_stored(path, current if torch.finfo(current.dtype).bits >= 32 else current.float())

    def unedited_weight_of(self, path: str) -> Tensor:
        """Returns the (D_out, D_in) unedited weight of a linear module, in its dtype.

        Raises:
            KeyError: If the module was not added.
        """
        return self._as_stored(path, self._unedited[_name_of_weight(path, "weight")])

    def _weight(self, path: str) -> nn.Parameter:
        return self._modules[path].get_parameter("weight")

    def _first_with(self, weight: nn.Parameter) -> str:
        """The first path at which a weight is found: two modules that share it share its master."""
        return next(path for path, module in self._modules.items() if getattr(module, "weight", None) is weight)

    def _as_stored(self, path: str, weight: Tensor) -> Tensor:
        """Turns (D_out, D_in) into the shape that the module stores, and back."""
        return weight.T if isinstance(self._modules[path], Conv1D) else weight

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Restores the unedited weights and bypasses interceptors inside the context."""
        if self.is_suspended:
            yield
            return
        edited = copied(self.state_dict())
        self.restore()
        self.is_suspended = True
        try:
            with self._model.bypassing():
                yield
        finally:
            self.is_suspended = False
            self.load_state_dict(edited)


def check_linear(model: EditableModel, path: str, editor: str, *, option: str = "layer") -> None:
    """Makes sure that updates can be added to the weight of a layer: that it is linear and not quantised.

    Args:
        model: The model.
        path: The layer's dotted path.
        editor: Name of the editor, for messages.
        option: The option that names the layer, for messages.

    Raises:
        UserError: If it is another kind of layer, or the model has no such layer.
    """
    layer = model.find_layer(path, option=option)
    # Wrappers such as weight normalisation compute the weight and hold none.
    if not isinstance(layer, nn.Linear | Conv1D) or layer._parameters.get("weight") is None:
        raise UserError(
            f"{option}={path} is a {type(layer).__name__}: editor '{editor}' rewrites a linear layer (nn.Linear or "
            f"Conv1D)"
        )
    _check_not_quantised(layer, path, editor, option=option)


def _check_not_quantised(module: nn.Module, path: str, editor: str, *, option: str) -> None:
    # A weight of one byte each is quantised.
    if any(not weight.is_floating_point() or weight.element_size() == 1 for weight in module.parameters()):
        raise UserError(
            f"{option}={path} has quantised weights, which editor '{editor}' cannot change: take the model without "
            f"quantisation, or an editor that changes no weights"
        )


@contextmanager
def trainable(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Lets gradients reach some parameters of a frozen model inside the context."""
    chosen = list(parameters)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
            parameter.grad = None


def _weights(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.state_dict().items():
        yield _name_of_weight(path, name), tensor.detach()


def _name_of_weight(path: str, name: str) -> str:
    return f"weights.{path}.{name}"


def _name_of_master(path: str) -> str:
    return f"masters.{path}.weight"
