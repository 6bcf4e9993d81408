"""Linear modules that an editor puts something beside."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel


def size_of(model: EditableModel, path: str, *, editor: str, option: str) -> tuple[int, int]:
    """Returns D_in and D_out of a linear module.

    Raises:
        UserError: If it is another kind of module, or the model has no such module.
    """
    module = model.find_layer(path, option=option)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    kind = type(module).__name__
    raise UserError(f"{option}={path} is a {kind}: editor '{editor}' acts beside a linear layer (nn.Linear or Conv1D)")
