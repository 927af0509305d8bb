"""Sinter and its generalisations with the amplitudes and the frequency as tensors, so that they can be learned and scheduled.

    f(u) = u + u sum_k c_k p_k(z),    z = w u,    k = 1 ... K

    sinter      K = 1, p_1 = sin z
    fourier     p_k = sin(k z)
    chebyshev   p_k = T_k(clamp(z, -1, 1)) - T_k(0), T_k the Chebyshev polynomial of the first kind; 1 / w is the range in u

Fourier with one term is Sinter with a = c_1; Chebyshev with one term is Sinter to first order in z, and has constant p_k beyond
its range. All have f(0) = 0 and f'(0) = 1 whatever c and w are, so that near zero they are LoRA. (Fourier and Chebyshev are
extensions of this package and in no paper.) Derivatives, entry by entry:

    f' = 1 + sum_k c_k (p_k(z) + z p_k'(z))        df/dc_k = u p_k(z)        df/dw = u^2 sum_k c_k p_k'(z)

for Sinter, a = c_1:  df/da = u sin(w u),  df/dw = a u^2 cos(w u).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = ("sinter", "fourier", "chebyshev")


@dataclass(frozen=True)
class Series:
    """One such f; it can stand where an `Activation` stands.

    Args:
        name: one of `NAMES`.
        amplitude: c, (rows, K), dimensionless; rows is 1 or d_out.
        frequency: w, (rows, 1), in radians per unit of u; rows is 1 or d_out.
    """

    name: str
    amplitude: Tensor
    frequency: Tensor
    value_at_zero = 0.0
    slope_at_zero = 1.0

    def rows(self, chosen: Any) -> Series:
        """f of the rows that the slice or index `chosen` takes out of u."""
        a, w = (t if t.shape[0] == 1 else t[chosen] for t in (self.amplitude, self.frequency))
        return Series(self.name, a, w)

    def value(self, u: Tensor) -> Tensor:
        """f(u), (rows, d_in), in the dtype of u."""
        return u + u * _total(c * p for c, p, _ in self._terms(self._phase(u)))

    def slope(self, u: Tensor) -> Tensor:
        """f'(u), (rows, d_in), in the dtype of u."""
        z = self._phase(u)
        return 1 + _total(c * (p + z * d) for c, p, d in self._terms(z, derivatives=True))

    def parameter_gradients(self, grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(dL/dc (rows, K), dL/dw (rows, 1)) of the rows of u, given dL/df; one row where c or w has one row."""
        through = grad * u
        of_c: list[Tensor] = []

        def bends() -> Iterator[Tensor]:
            for c, p, d in self._terms(self._phase(u), derivatives=True):
                of_c.append((through * p).sum(1))
                yield c * d

        of_w = (through * u * _total(bends())).sum(1, keepdim=True)
        return _like(torch.stack(of_c, 1), self.amplitude), _like(of_w, self.frequency)

    def _phase(self, u: Tensor) -> Tensor:
        return self.frequency.to(u.dtype) * u

    def _terms(self, z: Tensor, derivatives: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(c_k, p_k(z), p_k'(z) if wanted) for k = 1 ... K: one after the other, because each has the size of z."""
        basis = _chebyshev if self.name == "chebyshev" else _sines
        coefficients = self.amplitude.to(z.dtype).split(1, dim=1)
        for c, (p, d) in zip(coefficients, basis(z, len(coefficients), derivatives), strict=True):
            yield c, p, d


def _total(terms: Iterator[Tensor]) -> Tensor:
    """Their sum, without the addition of 0 that `sum` begins with."""
    return functools.reduce(torch.add, terms)


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Summed over rows where `tensor` has one for all of them."""
    return gradient.sum(0, keepdim=True) if tensor.shape[0] == 1 else gradient


def _sines(z: Tensor, terms: int, derivatives: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    for k in range(1, terms + 1):
        yield torch.sin(k * z), k * torch.cos(k * z) if derivatives else None


def _chebyshev(z: Tensor, terms: int, derivatives: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """T_k and T_k' = k U_{k-1} by their recurrences; T_k(0) is 0 for odd k, else 1 or -1 in turn."""
    t = z.clamp(-1, 1)
    inside = (z.abs() <= 1).to(z.dtype)
    T, T_next = torch.ones_like(t), t
    U, U_next = torch.ones_like(t), 2 * t
    for k in range(1, terms + 1):
        at_zero = (0, -1, 0, 1)[(k - 1) % 4]
        yield T_next - at_zero, k * U * inside if derivatives else None
        T, T_next = T_next, 2 * t * T_next - T
        if derivatives:
            U, U_next = U_next, 2 * t * U_next - U
