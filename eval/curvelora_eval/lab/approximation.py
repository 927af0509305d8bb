"""How well each method's function can stand for a given update on real inputs, next to the best linear map of that rank.

For a target D (d_out, d_in), for example of full fine-tuning, and inputs X (tokens, d_in), the error of a function g is

    ||D X^T - g(X)||_F / ||D X^T||_F

Best linear map of rank r (reduced-rank regression: Izenman, J. Multivariate Anal. 5, 1975): with D X^T = U S V^T the minimiser is
M = U_r U_r^T D, and its error sqrt(sum_{i>r} s_i^2 / sum s_i^2), because M X^T is the truncated SVD of D X^T.

What a nonlinearity between two factors can gain: nothing on the inputs that it is fitted to. B m(A X^T) has rank at most r
whatever m is, since its columns lie in the range of B, so by Eckart and Young (1936) no LoRA, RanLoRA or AuroRA gets below the
best linear map there; on other inputs the same holds for the best map of *those*, `floor_held`. AuroRA's proposition (arXiv
2505.18738) on approximation by a nonlinear bottleneck is therefore measured here as what it can be: how far training stays above
that floor. (RanLoRA's init R or P adds a frozen term of rank r; the fit has none.) LoRAN, s f(BA), is not bound to rank r and may
get below, which is then reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import curvelora  # registers the methods in PEFT
from curvelora.activations import Activation
from curvelora.errors import UserError, nearest
from curvelora.precision import at_least_fp32, exact_products
from curvelora_eval.lab.updates import factors

KINDS = ("lora", "loran", "ranlora", "aurora")
BOUND_BY_RANK = ("lora", "ranlora", "aurora")  # by Eckart and Young never below the best linear map; see above
BEATS_BY = 1e-3  # relative: less is the optimiser's and rounding's
# Largest |z| over the inputs at the start. The smaller, the closer the method starts to the linear optimum; AuroRA's grid ends
# at 1, and GELU is z / 2 + z^2 / sqrt(2 pi), whose second term fades slowly.
START = {"ranlora": 0.05, "aurora": 0.25}


def best_linear(D: Tensor, X: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A (r, d_in), B (d_out, r)), fp64, of which B A is the best map of rank r on X; z = A x and B have alike sizes.

    Args:
        D: (d_out, d_in).
        X: (tokens, d_in).
        rank: r, at least 1 and at most min(d_out, d_in, tokens).

    Raises:
        UserError: shapes that do not fit, a rank out of its range, or a target that is zero (or not finite) on X.
    """
    U, S = _spectrum(D, X, rank)
    U = U[:, :rank]
    root = (S[:rank] / len(X) ** 0.5).sqrt()
    root = torch.where(root > 0, root, torch.ones_like(root))  # outputs of fewer than r dimensions
    return (U.T @ D.double()) / root[:, None], U * root


def best_linear_error(D: Tensor, X: Tensor, rank: int) -> float:
    """The relative error of the best map of rank r on X, the floor of every map of rank r; arguments as `best_linear`."""
    _, S = _spectrum(D, X, rank)
    return (S[rank:].norm() / S.norm()).item()


def _spectrum(D: Tensor, X: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U, S) of D X^T, fp64."""
    if D.ndim != 2 or X.ndim != 2 or D.shape[1] != X.shape[1]:
        raise UserError(
            f"a target (d_out, d_in) needs inputs (tokens, d_in), found {tuple(D.shape)} and {tuple(X.shape)}"
        )
    if not 1 <= rank <= min(*D.shape, len(X)):
        raise UserError(
            f"the rank must lie between 1 and {min(*D.shape, len(X))} for a target {tuple(D.shape)} on {len(X)} tokens, "
            f"found {rank}"
        )
    Y = D.double() @ X.double().T
    if not torch.isfinite(Y).all() or not Y.any():
        raise UserError(
            "the target is zero or not finite on these inputs, so no relative error exists: take another layer"
        )
    # R of Y^T = Q R has Y's left side in a square: cheaper where there are more tokens than outputs
    U, S, _ = torch.linalg.svd(torch.linalg.qr(Y.T, mode="r").R.T, full_matrices=False)
    return U, S


def fit_error(
    kind: str,
    D: Tensor,
    X: Tensor,
    rank: int,
    steps: int = 300,
    lr: float = 3e-3,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fit one adapter layer to x -> D x on the first half of X, and measure it on both halves.

    The layer is the method's own, without dropout, on a linear layer whose weight is zero. It starts from the best linear map:
    exactly (LoRA), up to its activation (LoRAN), or scaled to where its nonlinearity is nearly linear (RanLoRA with init K;
    AuroRA with H = I and w = 0). Adam on all tokens at once, the rate falling as a cosine from `lr` times the root mean square of
    each tensor; the best state on the first half counts, the start included. Nothing is random.

    Args:
        kind: one of `KINDS`.
        D: (d_out, d_in).
        X: (tokens, d_in), in their order, so that the halves come from different sequences; fitted in their dtype, at least fp32.
        rank: r, below half the tokens, else any data are fitted.
        steps, lr: of Adam; lr is relative to each tensor's size.
        options: further fields of the method's config, for example {"activation": "tanh"}.

    Returns:
        {"rank", "best_linear": {"fit", "held", "floor_held"}, kind: {"fit", "held", "start", "beats_fit", "beats_held"}}

        `fit` and `held` are the relative errors on the fitted and the held-out half (None where they are not finite). best_linear
        is found on the first half; `floor_held` is the best map of the second, below which no map of rank r comes. `start` is the
        error on the first half before training, `beats_*` whether the method's error is below best_linear's by more than 0.1 %.

    Raises:
        UserError: an unknown kind or a bad option, or as `best_linear`.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}{nearest(kind, KINDS)} (known: {', '.join(KINDS)})")
    fit, held, linear = _halves(D, X, rank)
    A, B = best_linear(D, fit, rank)
    own = _fit(_start(kind, A, B, fit, options or {}), D, fit, held, steps, lr)
    for half in ("fit", "held"):
        # NaN beats nothing
        own[f"beats_{half}"] = own[half] is not None and own[half] < linear[half] * (1 - BEATS_BY)
    return {"rank": rank, "best_linear": linear, kind: own}


def approximation(
    D: Tensor, X: Tensor, rank: int, kinds: Iterable[str] = KINDS, steps: int = 300, lr: float = 3e-3
) -> dict[str, Any]:
    """`fit_error` of several kinds in one record: {"rank", "best_linear": {...}, kind: {...}, ...}."""
    record: dict[str, Any] = {}
    for kind in kinds:
        record |= fit_error(kind, D, X, rank, steps, lr)
    return record


def _halves(D: Tensor, X: Tensor, rank: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    half = len(X) // 2
    if half <= rank:
        raise UserError(
            f"half of {len(X)} tokens is fitted exactly by rank {rank}: give more than {2 * rank + 1} tokens"
        )
    fit, held = X[:half], X[half:]
    A, B = best_linear(D, fit, rank)
    held_error = _relative(D.double() @ held.double().T, B @ (A @ held.double().T))
    errors = {"fit": best_linear_error(D, fit, rank), "held": held_error}
    return fit, held, {**errors, "floor_held": best_linear_error(D, held, rank)}


def _relative(wanted: Tensor, found: Tensor) -> float | None:
    error = ((wanted - found).norm() / wanted.norm()).item()
    return error if math.isfinite(error) else None


def _config(kind: str, rank: int, options: Mapping[str, Any]) -> Any:
    # alpha only fixes how B is measured: s = 1, or what makes GELU's slope at zero 1
    common = {"r": rank, "target_modules": ["linear"]}
    if kind == "lora":
        return LoraConfig(**{**common, "lora_alpha": rank, "lora_dropout": 0.0, **options})
    own = {
        "loran": (curvelora.LoranConfig, {"alpha": rank}),
        "ranlora": (curvelora.RanloraConfig, {"init": "K"}),
        "aurora": (curvelora.AuroraConfig, {"alpha": rank}),
    }
    config_class, defaults = own[kind]
    return config_class(**{**common, "dropout": 0.0, **defaults, **options})


@torch.no_grad()
def _start(kind: str, A: Tensor, B: Tensor, X: Tensor, options: Mapping[str, Any]) -> nn.Module:
    """An adapter layer over a zero weight, near x -> B A x on X."""
    (rank, d_in), d_out = A.shape, len(B)
    config = _config(kind, rank, options)
    holder = nn.Module()
    with torch.random.fork_rng(devices=[]):  # what is drawn is replaced below, so the caller's draws stay as they were
        holder.linear = nn.Linear(d_in, d_out, bias=False)
        nn.init.zeros_(holder.linear.weight)
        layer = get_peft_model(holder, config).base_model.model.linear
    layer.to(X.device, at_least_fp32(X.dtype))
    slope = layer.scaling["default"] if kind == "lora" else config.scale
    if kind == "loran":
        slope = layer.delta_map("default").slope_at_zero
    elif kind == "ranlora":
        slope *= Activation(config.activation).slope_at_zero
    if kind in START:
        size = START[kind] / (X.double() @ A.T).abs().amax(0).clamp_min(1e-30)[:, None]
        A, B = size * A, B / size.T
    if kind == "aurora" and config.fixed:
        nn.init.eye_(layer.aurora_H["default"])
    if kind == "aurora" and config.learnable:
        nn.init.zeros_(layer.aurora_spline["default"])
    own_A, own_B = factors(layer)
    own_A.copy_(A)
    own_B.copy_(B / (slope or 1.0))  # ReLU has slope 0 at 0: the start is then another function, and `start` says so
    return layer


def _fit(layer: nn.Module, D: Tensor, fit: Tensor, held: Tensor, steps: int, lr: float) -> dict[str, float | None]:
    work = at_least_fp32(fit.dtype)
    x, wanted = fit.to(work), (D.double() @ fit.double().T).T
    target, energy = wanted.to(work), wanted.square().sum().item()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    groups = [{"params": [p], "lr": lr * (p.square().mean().sqrt().item() or 1.0)} for p in parameters]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    best, state, start = math.inf, [p.detach().clone() for p in parameters], None
    with exact_products(x.device):
        for step in range(steps + 1):
            optimiser.zero_grad()
            loss = (layer(x) - target).square().sum() / energy
            value = loss.item()
            start = value if step == 0 else start
            if value < best:
                best, state = value, [p.detach().clone() for p in parameters]
            if step == steps or not math.isfinite(value):
                break
            loss.backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            for parameter, kept in zip(parameters, state, strict=True):
                parameter.copy_(kept)
            errors = [_relative(D.double() @ X.double().T, layer(X.to(work)).double().T) for X in (fit, held)]
    return {"fit": errors[0], "held": errors[1], "start": math.sqrt(start) if math.isfinite(start) else None}
