"""Second moments, and reading them from the `.npz` files that ROME's and EasyEdit's code writes."""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from grace_bench.common.files import readable
from grace_bench.errors import UserError

_SUM, _COUNT = "mom2.mom2", "mom2.count"
# As a share of the largest number. A sum in float32, or in TF32 on a GPU, is not symmetric to the last digit.
_ASYMMETRY = 1e-3


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """The second moment of a layer's inputs.

    Attributes:
        matrix: (D_in, D_in) float32, on the CPU: the mean of k kᵀ over tokens, uncentred (Meng et al. 2022, section
            3.1).
        n_tokens: How many tokens the mean is over.
        path: The file that holds it.
        seconds: How long it took to compute, together with the layers of the same pass; None if it was read.
    """

    matrix: Tensor
    n_tokens: int
    path: Path | None = None
    seconds: float | None = None


def read_moments(path: str | Path, widths: Mapping[str, int]) -> dict[str, SecondMoment]:
    """Reads second moments from `.npz` files as ROME's and EasyEdit's code writes them.

    Such a file holds the sum of k kᵀ as `mom2.mom2` and the number of tokens as `mom2.count`. Pickled objects are never
    loaded.

    Args:
        path: The file of a single layer, or a folder that holds for each layer one file whose name is the layer's path
            followed by `_` or `.npz`, such as `transformer.h.17.mlp.c_proj_float32_mom2_100000.npz`.
        widths: The width of its input for each layer wanted, by dotted path.

    Raises:
        UserError: If a file is missing, is no such archive, or does not fit the layer; names file and field.
    """
    try:
        found = readable(path)
        is_folder = found.is_dir()
        names = sorted(inner.name for inner in found.iterdir()) if is_folder else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error
    if not is_folder and len(widths) > 1:
        raise UserError(f"{path}: is one file, and {len(widths)} layers need one each: name the folder that holds them")
    files = {layer: found / _file_of(layer, names, str(path)) if is_folder else found for layer in widths}
    return {layer: _read(file, layer, widths[layer]) for layer, file in files.items()}


def _file_of(layer: str, names: list[str], folder: str) -> str:
    matching = [n for n in names if n.endswith(".npz") and (n == f"{layer}.npz" or n.startswith(f"{layer}_"))]
    if not matching:
        raise UserError(f"{folder}: has no file for layer={layer}, such as {layer}_float32_mom2_100000.npz")
    if len(matching) > 1:
        raise UserError(
            f"{folder}: has several files for layer={layer}: {', '.join(matching)}; keep one of them in the folder"
        )
    return matching[0]


def _read(file: Path, layer: str, width: int) -> SecondMoment:
    with _faults(str(file)), zipfile.ZipFile(file) as archive:
        count = _field(archive, _COUNT, file)
        n_tokens = _whole(count)
        if n_tokens is None:
            raise UserError(f"{file}: field '{_COUNT}': should be a positive whole number")
        summed = _field(archive, _SUM, file, layer=layer, width=width)
    matrix = torch.from_numpy(summed.astype(np.float64, copy=False))
    largest = float(torch.linalg.vector_norm(matrix, np.inf))
    if not np.isfinite(largest):
        raise UserError(f"{file}: field '{_SUM}': holds numbers that are not finite")
    if float((matrix - matrix.T).abs_().max()) > _ASYMMETRY * largest:
        raise UserError(f"{file}: field '{_SUM}': is not symmetric")
    if float(matrix.diagonal().min()) < 0 or largest == 0:
        raise UserError(f"{file}: field '{_SUM}': is no sum of squares: its diagonal should be positive")
    return SecondMoment((matrix + matrix.T).div_(2 * n_tokens).float(), n_tokens, path=file)


@contextmanager
def _faults(file: str) -> Iterator[None]:
    """Turns what a file that is no archive raises into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or type(error).__name__})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{file}: is not an .npz archive, or a damaged one") from error


def _field(
    archive: zipfile.ZipFile, name: str, file: Path, *, layer: str | None = None, width: int | None = None
) -> np.ndarray[Any, Any]:
    """An array of an archive: a number, or a square matrix of the given width; its header is checked before it is read.

    A header may claim any size, and memory would be taken for it.
    """
    place = f"{file}: field '{name}'"
    if f"{name}.npy" not in archive.namelist():
        raise UserError(f"{place}: is missing")
    with archive.open(f"{name}.npy") as stream:
        shape, dtype = _header(stream)
    if dtype.hasobject:
        raise UserError(f"{place}: holds Python objects, which are not loaded")
    if width is None:
        if shape not in ((), (1,)):
            raise UserError(f"{place}: should be a single number")
    elif len(shape) != 2 or shape[0] != shape[1]:
        raise UserError(f"{place}: should be a square matrix, not of shape {shape}")
    elif shape[0] != width:
        raise UserError(f"{place}: has {shape[0]} numbers a side, layer={layer} takes {width}")
    elif dtype.kind not in "fiu":
        raise UserError(f"{place}: should hold real numbers, not {dtype}")
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _whole(array: np.ndarray[Any, Any]) -> int | None:
    """A positive whole number that an array of one element holds."""
    if array.dtype.kind not in "fiu":
        return None
    value = array.item()
    return int(value) if np.isfinite(value) and value >= 1 and value == int(value) else None
