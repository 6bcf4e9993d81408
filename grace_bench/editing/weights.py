"""Modules whose weights an editor rewrites: restoring, suspending and saving them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel


class RewrittenWeights:
    """The modules that an editor rewrites, with a copy of their unedited weights.

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
        self.is_suspended = False

    def add(self, path: str) -> None:
        """Adds an unedited module by its dotted path; adding it again changes nothing.

        Raises:
            UserError: If the model has no such module, or its weights are offloaded.
        """
        if path in self._modules:
            return
        module = self._model.find_layer(path)
        if any(tensor.is_meta for tensor in module.state_dict().values()):
            raise UserError(
                f"layer={path}: its weights are offloaded, where editor '{self._editor}' cannot rewrite them; keep "
                f"them on a device with device_map="
            )
        self._modules[path] = module
        self._unedited |= {name: tensor.clone() for name, tensor in _weights(path, module)}
        self._model.engine.rewrites([*self._modules.values()])

    @property
    def n_numbers(self) -> int:
        """The number of elements in the weights and buffers of the modules."""
        return sum(tensor.numel() for tensor in self._unedited.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the weights and buffers of the modules, by dotted path; not copied."""
        return {name: tensor for path, module in self._modules.items() for name, tensor in _weights(path, module)}

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Copies weights from `state_dict` into the modules.

        Raises:
            KeyError: If one is missing.
            RuntimeError: If one has another shape.
        """
        for path, module in self._modules.items():
            module.load_state_dict({name: weights[f"{path}.{name}"] for name in module.state_dict()})

    def restore(self) -> None:
        """Restores the modules' unedited weights, bit for bit."""
        self.load_state_dict(self._unedited)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Restores the unedited weights and bypasses interceptors inside the context."""
        if self.is_suspended:
            yield
            return
        edited = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.restore()
        self.is_suspended = True
        try:
            with self._model.bypassing():
                yield
        finally:
            self.is_suspended = False
            self.load_state_dict(edited)


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
        yield f"{path}.{name}", tensor.detach()
