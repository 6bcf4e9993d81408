"""The closed form of ROME's family (Gupta et al. 2024, A Unified Framework for Model Editing).

All of its editors minimise how far a new weight W + Δ moves the values of keys that should stay, while the N new keys
K give W K + R. With M the second moments of the keys that should stay, weighted:

    Δ = R (Kᵀ M⁻¹ K + s I)⁻¹ Kᵀ M⁻¹

For s = 1 it is the least-squares solution R Kᵀ (M + K Kᵀ)⁻¹ of MEMIT (Meng et al. 2023, eq. 14); for s = 0 the new keys
give exactly what they should, as in ROME (Meng et al. 2022, eq. 2) and EMMET.
"""

import torch
from torch import Tensor

# As a share of the mean of the diagonal. Only directions that the text never takes are this small.
_RIDGE = 1e-6


def regularised(moments: Tensor) -> Tensor:
    """Returns second moments that can be inverted.

    If a direction has less than a millionth of the mean second moment, as where the text has fewer tokens than
    directions, that much is added to all.

    Args:
        moments: (D, D), symmetric.

    Returns:
        (D, D) float64, a copy.
    """
    # Matrices of wide layers take gigabytes, so each step is in place.
    matrix = moments.to(torch.float64, copy=True)
    diagonal = matrix.diagonal().clone()
    ridge = _RIDGE * diagonal.mean()
    matrix.diagonal().sub_(ridge)
    failed = bool(torch.linalg.cholesky_ex(matrix).info)
    matrix.diagonal().copy_(diagonal + ridge if failed else diagonal)
    return matrix


def closed_form(keys: Tensor, residuals: Tensor, factor: Tensor | None, *, softness: float) -> Tensor:
    """Returns the change Δ of a weight.

    Args:
        keys: (N, D_in) float64, the rows of Kᵀ.
        residuals: (N, D_out) float64, the rows of Rᵀ.
        factor: (D_in, D_in) float64, the lower Cholesky factor of M; None if M is the identity.
        softness: s, by which the constraint is softened.

    Returns:
        (D_out, D_in) float64.
    """
    spread = keys.T if factor is None else torch.cholesky_solve(keys.T, factor)
    gram = keys @ spread + softness * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
    return residuals.T @ torch.linalg.solve(gram, spread.T)
