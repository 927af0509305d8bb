"""The spline basis: against SciPy's, by its textbook properties, and its derivative."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from curvelora.spline import Grid, basis_sum

GRIDS = [Grid(), Grid(intervals=3, order=2), Grid(intervals=7, order=1), Grid(5, 3, -2.0, 2.0), Grid(1, 4, 0.0, 1.0)]


def points(grid: Grid, count: int = 997) -> torch.Tensor:
    """Over the support and beyond it; no point is a knot."""
    low, high = grid.support
    return torch.linspace(low - 0.7, high + 0.613, count, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_basis_is_scipy_s(grid):
    z = points(grid)
    count = grid.intervals + 2 * grid.order + 1
    knots = np.linspace(*grid.support, count)
    found, slope = grid.basis(z), grid.slope(z)
    assert found.shape == (len(z), grid.size) == (len(z), grid.intervals + grid.order)
    for i in range(grid.size):
        element = BSpline.basis_element(knots[i : i + grid.order + 2], extrapolate=False)
        np.testing.assert_allclose(found[:, i].numpy(), np.nan_to_num(element(z.numpy())), atol=1e-12)
        np.testing.assert_allclose(slope[:, i].numpy(), np.nan_to_num(element.derivative()(z.numpy())), atol=1e-10)


def test_aurora_s_grid_is_the_published_one():
    """G = 5, k = 3 on [-1, 1]: eight functions, knots -2.2 ... 2.2 in steps of 0.4."""
    grid = Grid()
    assert grid.size == 8 and grid.step == pytest.approx(0.4) and grid.support == pytest.approx((-2.2, 2.2))


def test_partition_of_unity_inside_and_zero_outside():
    grid = Grid()
    inside = torch.linspace(-1, 0.999, 101, dtype=torch.float64)
    torch.testing.assert_close(grid.basis(inside).sum(-1), torch.ones(101, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(grid.slope(inside).sum(-1), torch.zeros(101, dtype=torch.float64), rtol=0, atol=1e-11)
    outside = torch.tensor([-50.0, -2.3, -2.2001, 2.2001, 2.5, 1e4], dtype=torch.float64)
    assert (grid.basis(outside) == 0).all() and (grid.slope(outside) == 0).all()
    between = torch.tensor([-1.5, 1.5], dtype=torch.float64)  # beyond the grid, within the support
    total = grid.basis(between).sum(-1)
    assert ((total > 0) & (total < 1)).all()


def test_hand_computed_values_at_zero():
    """0 is half-way between two knots; a cubic B-spline is 23/48 half a step beside its middle and 1/48 one and a half beside."""
    expected = torch.tensor([0, 0, 1 / 48, 23 / 48, 23 / 48, 1 / 48, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(Grid().basis(torch.zeros((), dtype=torch.float64)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS[:2] + GRIDS[3:], ids=str)
def test_gradients_of_the_sum(grid):
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(basis_sum(z, grid), grid.basis(z).sum(-2))
    assert torch.autograd.gradcheck(lambda t: basis_sum(t, grid), z)


def test_the_sum_keeps_its_input_alone():
    saved = []
    z = torch.randn(6, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        basis_sum(z, Grid())
    assert [t.data_ptr() for t in saved] == [z.data_ptr()]


def test_it_does_not_see_the_order_of_its_inputs():
    """The summed basis is the paper's; splines of each entry's own would tell them apart."""
    z = torch.randn(5, 4)
    torch.testing.assert_close(basis_sum(z, Grid()), basis_sum(z.flip(-1), Grid()))


def test_fp32_is_enough_and_bf16_is_not():
    z = points(Grid())
    exact = Grid().basis(z)
    assert (Grid().basis(z.float()).double() - exact).abs().max() < 1e-5  # measured: 1.6e-6
    assert (Grid().basis(z.bfloat16()).double() - Grid().basis(z.bfloat16().double())).abs().max() > 1e-2
