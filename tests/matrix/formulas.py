"""What each method adds to the base layer's output, written from the papers in plain PyTorch and without the package's layers.

    formula(tensors, config, x) -> what is added to W0 x + b,    x: (..., d_in) -> (..., d_out)

`tensors` are those of one layer, fp64, under their names without the method's prefix: "A" (r, d_in), "B" (d_out, r), ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
F = {
    "identity": lambda u: u,
    "tanh": torch.tanh,
    "sigmoid": lambda u: 1 / (1 + torch.exp(-u)),
    "relu": lambda u: u.clamp(min=0),
    "leaky_relu": lambda u: torch.where(u > 0, u, 0.01 * u),
    "silu": lambda u: u / (1 + torch.exp(-u)),
    "swish": lambda u: u / (1 + torch.exp(-25 * u)),
    "gaussian": lambda u: 0.5 * u * torch.exp(-(u**2)),
    "gelu": lambda u: 0.5 * u * (1 + torch.erf(u / 2**0.5)),
}


def lora(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s B A x."""
    s = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return s * x @ (t["B"] @ t["A"]).T


def loran(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s f(BA) x, or f(s BA) x; a and w are their starts times exp of what is learned; coefficients are linear in it."""
    learned = {name: t[name].reshape(-1, 1) for name in ("amplitude", "frequency") if name in t}  # a column: one a row
    a, w = (
        getattr(config, n) * torch.exp(learned.get(n, torch.zeros((), dtype=torch.float64)))
        for n in ("amplitude", "frequency")
    )

    factors = t.get("schedule", torch.ones(2, dtype=torch.float64))
    a, w = factors[0] * a, factors[1] * w

    def of_coefficients(basis: Callable[[int, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        c = [factors[0] * config.amplitude * (t["amplitude"][..., k : k + 1] + (k == 0)) for k in range(config.terms)]
        return lambda u: u + u * sum(c[k] * basis(k + 1, w * u) for k in range(config.terms))

    def polynomial(k: int, z: Tensor) -> Tensor:
        return torch.cos(k * torch.arccos(z.clamp(-1, 1))) - torch.cos(torch.tensor(k * torch.pi / 2, dtype=z.dtype))

    with_period = {
        "sinter": lambda u: a * u * torch.sin(w * u) + u,
        "cos": lambda u: u * torch.cos(w * u) + u,
        "fourier": lambda u: of_coefficients(lambda k, z: torch.sin(k * z))(u),
        "chebyshev": lambda u: of_coefficients(polynomial)(u),
    }
    f = (F | with_period)[config.activation]
    s, u = config.alpha / config.r, t["B"] @ t["A"]
    return x @ (f(s * u) if config.scale_position == "inside" else s * f(u)).T


def ranlora(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s B(v * phi(A x)) - B0 A0 x."""
    alpha = 2 * config.r if config.alpha == "2r" else config.alpha
    s = {"none": 1.0}.get(config.scale_position, alpha / config.r)
    phi, v = F[config.activation], t.get("v", 1.0)
    z = x @ t["A"].T
    added = (v * (phi(s * z) if config.scale_position == "inside" else s * phi(z))) @ t["B"].T
    return added - x @ (t["B0"] @ t["A0"]).T if "A0" in t else added


def bspline(z: Tensor, knots: list[float], i: int, order: int) -> Tensor:
    """The i-th B-spline, by the recursion as it is printed in textbooks."""
    if order == 0:
        return ((knots[i] <= z) & (z < knots[i + 1])).to(z.dtype)
    left = (z - knots[i]) / (knots[i + order] - knots[i])
    right = (knots[i + order + 1] - z) / (knots[i + order + 1] - knots[i + 1])
    return left * bspline(z, knots, i, order - 1) + right * bspline(z, knots, i + 1, order - 1)


def aurora(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s B sigma(A x), or s B sigma(A) x with sigma on the columns of A."""
    G, k, limit = config.grid_size, config.spline_order, config.grid_limit
    knots = [-limit + (i - k) * 2 * limit / G for i in range(G + 2 * k + 1)]

    def sigma(z: Tensor) -> Tensor:  # (..., r)
        total = torch.zeros_like(z)
        if config.fixed:
            f = F[config.activation]
            total = total + f(f(z) @ t["H"].T)
        if config.learnable:
            basis = torch.stack([bspline(z, knots, i, k) for i in range(G + k)], -1)
            total = total + basis.sum(-2) @ t["spline"].T
        return total

    s = config.alpha / config.r
    if config.mode == "static":
        return s * x @ (t["B"] @ sigma(t["A"].T).T).T
    return s * sigma(x @ t["A"].T) @ t["B"].T


def sinelora(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s sin(w BA) x / g; s is 1 in the paper."""
    g = len(t["B"]) ** 0.5 if config.gain == "sqrt" else config.gain
    s = 1.0 if config.alpha == "r" else config.alpha / config.r
    return s / g * x @ torch.sin(config.frequency * t["B"] @ t["A"]).T


FORMULAS: dict[str, Callable[[Tensors, Any, Tensor], Tensor]] = {
    "lora": lora,
    "qlora": lora,
    "loran": loran,
    "ranlora": ranlora,
    "aurora": aurora,
    "sinelora": sinelora,
}
