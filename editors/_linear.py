"""Linear modules: what enters and leaves them."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel


def dimensions(module: nn.Module) -> tuple[int, int] | None:
    """Returns D_in and D_out of a linear module, `nn.Linear` or transformers' `Conv1D`; None if it is another kind."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        n_in, n_out = module.weight.shape
        return n_in, n_out
    return None


def size_of(model: EditableModel, path: str, *, editor: str, option: str) -> tuple[int, int]:
    """Returns D_in and D_out of a linear module that an editor acts beside.

    Raises:
        UserError: If it is another kind of module, or the model has no such module.
    """
    module = model.find_layer(path, option=option)
    size = dimensions(module)
    if size is None:
        kind = type(module).__name__
        raise UserError(
            f"{option}={path} is a {kind}: editor '{editor}' acts beside a linear layer (nn.Linear or Conv1D)"
        )
    return size
