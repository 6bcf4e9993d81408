"""What the whitening of activations promises, against numpy and the definition of Mahalanobis distance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grace_bench.editors._grace.whitening import Whitening, shrunk_covariance
from grace_bench.errors import UserError


def samples(n: int, width: int, seed: int = 0) -> Tensor:
    """Gaussian activations far from the origin, whose directions differ a hundredfold in spread."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    return torch.randn(n, width, generator=generator) @ mixing + 20


@given(n=st.integers(2, 60), width=st.integers(1, 30), seed=st.integers(0, 2**16))
def test_covariance_is_shrunk_by_the_share_of_ledoit_and_wolf(n: int, width: int, seed: int) -> None:
    x = samples(n, width, seed).double().numpy()
    x = x - x.mean(axis=0)
    s = x.T @ x / n
    m = np.trace(s) / width
    # Their estimators, sum by sum: d^2 = |S - mI|^2 and b^2 = min(d^2, sum |x x' - S|^2 / n^2), |A|^2 = tr(AA')/p.
    d2 = ((s - m * np.eye(width)) ** 2).sum() / width
    b2 = min(d2, sum(((np.outer(row, row) - s) ** 2).sum() / width for row in x) / n**2)
    share = max(b2 / d2 if d2 > 0 else 1.0, 1e-4)
    if width > 1:
        expected = share * m * np.eye(width) + (1 - share) * s
        np.testing.assert_allclose(shrunk_covariance(torch.tensor(x)).numpy(), expected, rtol=1e-8, atol=1e-8 * m)


@pytest.mark.parametrize(("n", "width"), [(500, 8), (30, 64)])
def test_distances_are_in_proportion_to_those_of_mahalanobis(n: int, width: int) -> None:
    points = samples(n, width)
    whitening = Whitening.from_activations(points)
    covariance = shrunk_covariance(points.double()).numpy()
    mapped = whitening(points).double().numpy()
    ratios = []
    for i, j in ((0, 1), (2, 7), (5, 20)):
        gap = (points[i] - points[j]).double().numpy()
        ratios.append(np.linalg.norm(mapped[i] - mapped[j]) / math.sqrt(gap @ np.linalg.solve(covariance, gap)))
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(("n", "width"), [(500, 8), (30, 64)])
def test_distances_are_of_the_size_of_euclidean_ones(n: int, width: int) -> None:
    points = samples(n, width)
    mapped = Whitening.from_activations(points)(points)
    plain, whitened = (float(torch.cdist(some, some).square().mean()) for some in (points, mapped))
    assert whitened == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_few_samples_and_silent_directions_leave_it_well_conditioned(n: int) -> None:
    points = samples(n, 64)
    points[:, 10:40] = 0.0
    whitening = Whitening.from_activations(points)
    assert bool(torch.isfinite(whitening.matrix).all())
    assert 1 <= whitening.gain <= 100 * 64**0.5
    moved = points[0] + torch.eye(64)
    assert float((whitening(moved) - whitening(points[:1])).norm(dim=1).max()) <= whitening.gain * (1 + 1e-3)


def test_a_point_is_mapped_alike_alone_and_in_a_batch() -> None:
    whitening = Whitening.from_activations(samples(200, 100))
    points = samples(70, 100, seed=1)
    together = whitening(points)
    for row, point in enumerate(points):
        torch.testing.assert_close(whitening(point), together[row], rtol=1.2e-7, atol=0)


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        (torch.ones(1, 4), "at least two"),
        (torch.ones(5, 4), "all are the same"),
        (torch.tensor([[1.0, math.nan], [2.0, 3.0]]), "finite"),
    ],
)
def test_what_no_distance_follows_from_is_refused_in_one_line(activations: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Whitening.from_activations(activations)
    assert "\n" not in str(caught.value)
