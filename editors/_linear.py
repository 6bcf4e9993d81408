"""Linear modules that an editor acts beside."""

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.linear import dimensions


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
