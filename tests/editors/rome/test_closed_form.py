"""The closed form of ROME's family against least squares, constraints and the formulas of the papers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grace_bench.editors._rome.closed_form import closed_form, regularised

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 6), st.integers(2, 12), st.integers(1, 8))
"""Numbers of keys, inputs and outputs."""


def drawn(seed: int, size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D_in) keys, (N, D_out) residuals and the (D_in, D_in) second moments of other keys."""
    n, d_in, d_out = size
    generator = torch.Generator().manual_seed(seed)
    keys, residuals, others = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((n, d_in), (n, d_out), (3 * d_in, d_in))
    )
    return keys, residuals, others.T @ others / len(others)


def change_of(keys: Tensor, residuals: Tensor, moments: Tensor, softness: float) -> Tensor:
    return closed_form(keys, residuals, torch.linalg.cholesky(moments), softness=softness)


@given(seeds, sizes, st.floats(0.1, 10.0))
def test_softened_it_is_the_least_squares_solution(seed: int, size: tuple[int, int, int], softness: float) -> None:
    keys, residuals, moments = drawn(seed, size)
    # Other keys should move by nothing, the new ones by their residuals: rows of one system for the changed weight.
    rows = np.linalg.cholesky(moments.numpy()).T
    system = np.concatenate([rows, keys.numpy() / np.sqrt(softness)])
    wanted = np.concatenate([np.zeros((len(rows), size[2])), residuals.numpy() / np.sqrt(softness)])
    solution, *_ = np.linalg.lstsq(system, wanted, rcond=None)
    np.testing.assert_allclose(change_of(keys, residuals, moments, softness).numpy(), solution.T, atol=1e-8)


@given(seeds, sizes)
def test_at_softness_one_it_solves_memits_normal_equations(seed: int, size: tuple[int, int, int]) -> None:
    keys, residuals, moments = drawn(seed, size)
    change = change_of(keys, residuals, moments, 1.0)
    torch.testing.assert_close(change @ (moments + keys.T @ keys), residuals.T @ keys, rtol=0, atol=1e-9)


@given(seeds, st.tuples(st.integers(1, 4), st.integers(5, 12), st.integers(1, 8)))
def test_without_softness_the_keys_give_what_they_should_and_other_keys_move_least(
    seed: int, size: tuple[int, int, int]
) -> None:
    keys, residuals, moments = drawn(seed, size)
    change = change_of(keys, residuals, moments, 0.0)
    scale = float(change.abs().max())
    torch.testing.assert_close(keys @ change.T, residuals, rtol=0, atol=1e-8 * max(1.0, scale))
    # Whatever else fulfils the constraints moves the other keys by more: the change is orthogonal to the null space.
    _, _, directions = torch.linalg.svd(keys)
    free = directions[len(keys) :]
    assert float((change @ moments @ free.T).abs().max()) < 1e-8 * max(1.0, scale)


@given(seeds, st.tuples(st.just(1), st.integers(2, 12), st.integers(1, 8)))
def test_one_key_without_softness_is_romes_update(seed: int, size: tuple[int, int, int]) -> None:
    keys, residuals, moments = drawn(seed, size)
    direction = torch.linalg.inv(moments) @ keys[0]
    expected = torch.outer(residuals[0], direction) / (keys[0] @ direction)
    change = change_of(keys, residuals, moments, 0.0)
    torch.testing.assert_close(change, expected, rtol=1e-7, atol=1e-9)
    # MEMIT's comes close as the weight of other keys vanishes.
    memit = change_of(keys, residuals, 1e-9 * moments, 1.0)
    torch.testing.assert_close(memit, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@given(seeds)
def test_keys_that_the_moments_call_unrelated_keep_their_values(seed: int) -> None:
    keys, residuals, _ = drawn(seed, (2, 8, 3))
    _, _, block = drawn(seed + 1, (1, 4, 1))
    keys[:, 4:] = 0
    change = change_of(keys, residuals, torch.block_diag(block, block), 0.5)
    assert torch.equal(change[:, 4:], torch.zeros(3, 4, dtype=torch.float64))
    assert float(change.abs().max()) > 0


@given(seeds, sizes, st.floats(0.1, 10.0))
def test_the_order_of_the_keys_changes_nothing_beyond_rounding(
    seed: int, size: tuple[int, int, int], softness: float
) -> None:
    keys, residuals, moments = drawn(seed, size)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    change = change_of(keys, residuals, moments, softness)
    shuffled = change_of(keys[order], residuals[order], moments, softness)
    torch.testing.assert_close(shuffled, change, rtol=0, atol=1e-10 * max(1.0, float(change.abs().max())))


# --- second moments that cannot be inverted --------------------------------------------------------------------------


def test_moments_that_can_be_inverted_stay_as_they_are() -> None:
    _, _, moments = drawn(0, (1, 6, 1))
    assert torch.equal(regularised(moments.float()), moments.float().double())


@pytest.mark.parametrize("rank", [1, 5])
def test_directions_that_the_text_never_takes_get_a_millionth_of_the_mean(rank: int) -> None:
    keys, _, _ = drawn(0, (rank, 6, 1))
    moments = keys.T @ keys
    fixed = regularised(moments)
    ridge = 1e-6 * float(moments.diagonal().mean())
    torch.testing.assert_close(fixed - moments, ridge * torch.eye(6, dtype=torch.float64), rtol=1e-6, atol=1e-15)
    torch.linalg.cholesky(fixed)
