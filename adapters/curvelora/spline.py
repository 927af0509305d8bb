"""B-splines on uniform knots: the basis by Cox and de Boor's recursion, and its sum over a vector with little memory.

Grid of G intervals on [low, high] and order k (degree k; 3 is cubic): the knots go on by k steps h = (high - low) / G on both
sides, t_i = low + (i - k) h for i = 0 .. G + 2k, and G + k basis functions are left after k steps of the recursion

    b_i^0(z) = 1 where t_i <= z < t_{i+1}, else 0
    b_i^d(z) = (z - t_i) / (d h) b_i^{d-1}(z) + (t_{i+d+1} - z) / (d h) b_{i+1}^{d-1}(z)

They sum to 1 on [low, high) and are all zero outside [low - k h, high + k h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A uniform knot vector.

    Args:
        intervals: G, at least 1.
        order: k, at least 1.
        low, high: ends of the range on which the basis sums to 1.
    """

    intervals: int = 5
    order: int = 3
    low: float = -1.0
    high: float = 1.0

    @property
    def size(self) -> int:
        """How many basis functions there are: G + k."""
        return self.intervals + self.order

    @property
    def step(self) -> float:
        """h, the distance of two knots."""
        return (self.high - self.low) / self.intervals

    @property
    def support(self) -> tuple[float, float]:
        """Outside of this range every basis function and its derivative is zero."""
        return self.low - self.order * self.step, self.high + self.order * self.step

    def basis(self, z: Tensor) -> Tensor:
        """The basis at z: (...) -> (..., G + k), in the dtype of z, which should be fp32 or wider."""
        return self._recursion(z, self.order)

    def slope(self, z: Tensor) -> Tensor:
        """d basis / d z: (...) -> (..., G + k). For k = 1 at a knot, the slope to its right."""
        lower = self._recursion(z, self.order - 1)
        return (lower[..., :-1] - lower[..., 1:]) / self.step

    def _recursion(self, z: Tensor, order: int) -> Tensor:
        knots = torch.arange(self.intervals + 2 * self.order, dtype=z.dtype, device=z.device)
        u = (z[..., None] - self.support[0]) / self.step - knots  # distance from knot i, in steps
        b = ((u >= 0) & (u < 1)).to(z.dtype)
        for d in range(1, order + 1):
            b = (u[..., :-d] * b[..., :-1] + (d + 1 - u[..., :-d]) * b[..., 1:]) / d
        return b


class _BasisSum(torch.autograd.Function):
    """Sum of the basis over the last dimension of z; saves z alone, which is G + k times smaller than the basis.

    The backward pass is made of plain operations on z, so it can be differentiated in its turn.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(z)
        ctx.grid = grid
        return grid.basis(z).sum(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return (ctx.grid.slope(z) * grad[..., None, :]).sum(-1), None


def basis_sum(z: Tensor, grid: Grid) -> Tensor:
    """Sum_i b(z_i), over the last dimension of z: (..., r) -> (..., G + k). Differentiable in z, also twice."""
    return _BasisSum.apply(z, grid)
