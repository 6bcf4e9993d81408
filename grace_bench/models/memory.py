"""The memory of a device, and what may be kept in it beside the model."""

import psutil
import torch

_SHARE = 4
"""A quarter of a device's memory may be taken by matrices that could be computed again."""


def memory_for_matrices(device: torch.device) -> int:
    """Returns how many bytes of a device's memory may be taken by matrices that could be computed again.

    It is a share of all its memory rather than of what is free, so that it is the same for every process on a machine.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // _SHARE
    return int(psutil.virtual_memory().total) // _SHARE
