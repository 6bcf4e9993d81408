"""The linear map under which Mahalanobis distance is euclidean distance, estimated from activations."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from grace_bench.errors import UserError

# At least this share of the mean variance is added to every direction: one that never varied would count infinitely,
# and with it the rounding of a query along it.
_LEAST_SHRINKAGE = 1e-4


@dataclass(frozen=True)
class Whitening:
    """Maps x to W (x - m), with W = c C^(-1/2), C the shrunk covariance of activations and m their mean.

    The length of a mapped difference is c times its Mahalanobis distance. The scale c makes its mean square over pairs
    of activations equal to that of euclidean distance, so that a radius has the same size relative to the differences
    of activations.

    Attributes:
        mean: (D,) float64, m.
        matrix: (D, D) float64, W; symmetric.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def from_activations(cls, activations: Tensor) -> "Whitening":
        """Estimates mean and covariance, the latter shrunk towards v I (Ledoit & Wolf 2004).

        Args:
            activations: (n, D), n at least 2; n may be below D.

        Raises:
            UserError: If there are fewer than two, or they do not vary, or are not finite.
        """
        device = activations.device
        # On the CPU wherever the model is, because there the same numbers give the same bits.
        samples = activations.detach().cpu().double()
        if len(samples) < 2 or not bool(torch.isfinite(samples).all()):
            raise UserError("whitening needs at least two upstream activations, all of them finite")
        mean = samples.mean(dim=0)
        covariance = shrunk_covariance(samples)
        if float(covariance.trace()) <= 0:
            raise UserError("whitening needs upstream activations that differ: here all are the same")
        eigenvalues, directions = torch.linalg.eigh(covariance)
        matrix = (directions / eigenvalues.sqrt()) @ directions.T
        centred = samples - mean
        scale = centred.norm() / (centred @ matrix).norm()
        return cls(mean.to(device), (scale * matrix).to(device))

    @cached_property
    def gain(self) -> float:
        """The largest factor by which a difference grows, at least 1."""
        return max(1.0, float(torch.linalg.eigvalsh(self.matrix.cpu()).max()))

    def __call__(self, points: Tensor) -> Tensor:
        """Maps (..., D) points of any float dtype to float32.

        The product is computed in float64, so that rounding does not depend on whether a point is alone or in a batch.
        """
        with torch.autocast(points.device.type, enabled=False):
            return ((points.double() - self.mean) @ self.matrix).float()


def shrunk_covariance(samples: Tensor) -> Tensor:
    """Returns (1 - s) S + s v I, where S is the covariance of (n, D) samples and v the mean of its diagonal.

    The share s is the estimate of Ledoit & Wolf 2004 (A well-conditioned estimator for large-dimensional covariance
    matrices), but at least 1e-4.

    Args:
        samples: (n, D) float64, on the CPU.
    """
    # Imported here, because it takes a second.
    from sklearn.covariance import empirical_covariance, ledoit_wolf_shrinkage, shrunk_covariance

    points = samples.numpy()
    share = max(ledoit_wolf_shrinkage(points), _LEAST_SHRINKAGE)
    return torch.from_numpy(shrunk_covariance(empirical_covariance(points), shrinkage=share))
