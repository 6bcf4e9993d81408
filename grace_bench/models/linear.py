"""Linear modules: `nn.Linear`, and transformers' `Conv1D`, which stores the transposed weight."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def dimensions(module: nn.Module) -> tuple[int, int] | None:
    """Returns D_in and D_out of a linear module; None if it is another kind."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        n_in, n_out = module.weight.shape
        return n_in, n_out
    return None
