"""What each method adds to the base layer's output, written from the papers in plain PyTorch and without the package's layers.

    formula(tensors, config, x) -> what is added to W0 x + b,    x: (..., d_in) -> (..., d_out)

`tensors` are those of one layer, fp64, under their names without the method's prefix: "A" (r, d_in), "B" (d_out, r), ...,
and W0 (d_out, d_in) where the base is not quantised.
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


def moslora(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s B M A x."""
    return config.alpha / config.r * x @ (t["B"] @ t["M"] @ t["A"]).T


def neat(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s dW x with dW^T = f(W0^T T1) T2, and between the two encoders and decoders with skips from first to last."""
    f, s = F[config.activation], 1.0 if config.alpha == "r" else config.alpha / config.r
    z, before = f(t["W0"].T @ t["A"].T), []
    for E in t.get("E", []):
        before.append(z)
        z = f(z @ E.T)
    for D in t.get("D", []):
        z = f(z @ D.T) + before.pop()
    return s * x @ (z @ t["B"].T)


def from_factors(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s B A x - B0 A0 x."""
    return config.alpha / config.r * x @ (t["B"] @ t["A"]).T - x @ (t["B0"] @ t["A0"]).T


def dora(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """m * (W0 + s BA) x / |W0 + s BA| - W0 x, with the norms of the rows as constants (section 4.3 of the paper)."""
    s = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    changed = t["W0"] + s * t["B"] @ t["A"]
    lengths = changed.square().sum(1).sqrt().detach()
    return t["magnitude_vector"] / lengths * (x @ changed.T) - x @ t["W0"].T


def adalora(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s B diag(e) A x, with 1e-5 beside the rank as the authors have it."""
    return config.lora_alpha / (config.init_r + 1e-5) * ((x @ t["A"].T) * t["E"].squeeze(1)) @ t["B"].T


def fourierft(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """s Re(ifft2(F)) x, the transform written as its two sums; the positions are a draw that PEFT's seed defines."""
    d_out, d_in = t["W0"].shape
    draw = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(config.random_loc_seed))
    where = draw[: config.n_frequency]
    F_ = torch.zeros(d_out * d_in, dtype=x.dtype, device=x.device).index_put((where.to(x.device),), t["spectrum"])

    def waves(d: int) -> Tensor:  # exp(2 pi i j k / d), (d, d)
        j = torch.arange(d, dtype=x.dtype, device=x.device)
        angle = 2 * torch.pi * torch.outer(j, j) / d
        return torch.complex(angle.cos(), angle.sin())

    dW = (waves(d_out) @ F_.view(d_out, d_in).to(waves(1).dtype) @ waves(d_in)).real / (d_out * d_in)
    return config.scaling * x @ dW.T


def delora(t: Tensors, config: Any, x: Tensor) -> Tensor:
    """(lambda / r) sum over k of b_k a_k^T (w_j x_j) / (|a_k| |b_k|), each norm at least 1e-4; w_j = |W0_j| rounded to fp32."""
    torch.testing.assert_close(t["w_norm"], t["W0"].square().sum(0).sqrt().to(x.dtype), rtol=1e-6, atol=0)
    z = x * t["w_norm"]
    lengths = (t["A"].square().sum(1).sqrt().clamp(min=1e-4), t["B"].square().sum(0).sqrt().clamp(min=1e-4))
    return t["lambda"] / config.r * (z @ t["A"].T / (lengths[0] * lengths[1])) @ t["B"].T


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
    "neat": neat,
    "moslora": moslora,
    "pissa": from_factors,
    "milora": from_factors,
    "olora": from_factors,
    "rslora": lora,
    "dora": dora,
    "adalora": adalora,
    "fourierft": fourierft,
    "delora": delora,
    "sinelora": sinelora,
}
