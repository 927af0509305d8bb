"""Sharpness: the largest eigenvalue of the loss's Hessian in the adapter's parameters.

Lanczos (Lanczos, J. Res. Natl. Bur. Stand. 45, 1950), for neural networks as in Ghorbani, Krishnan and Xiao, ICML 2019,
section 2: only products H v are formed, each by differentiating the gradient once more. From a random q_1,

    w = H q_k      alpha_k = q_k . w      beta_k q_{k+1} = w - alpha_k q_k - beta_{k-1} q_{k-1}

and the eigenvalues of the tridiagonal matrix of the alphas and betas (Ritz values) close in on the two ends of H's spectrum
from inside. A Ritz value theta whose eigenvector ends in s has an eigenvalue of H within |beta_m s|, the residual. Each w is made
orthogonal to all earlier q twice, because the recursion alone loses that in floating point and then finds eigenvalues twice.

A sharpness belongs to its coordinates: it compares arms whose parameters mean the same, such as LoRA and LoRAN at equal rank and
scale, and one arm with itself over training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvelora.errors import UserError
from curvelora.reference_path import reference_path

Loss = Callable[[], Tensor]


def top_eigenvalue(
    loss: Loss | Sequence[Loss],
    parameters: Sequence[Tensor],
    iterations: int = 20,
    tolerance: float = 1e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, float | int | bool | None]:
    """Largest (algebraic) eigenvalue of the Hessian of `loss` in `parameters`.

    Args:
        loss: gives the scalar loss, with a graph that differentiates twice; of several, their mean, one graph at a time.
        parameters: tensors that require grad, n entries in all; one that the loss does not use counts as flat.
        iterations: most Lanczos steps, each with one product H v; n steps are exact.
        tolerance: stop when residual <= tolerance * |value|.
        seed: of q_1. It decides rounding and the last digits within the tolerance.
        dtype: of the `iterations` vectors of n entries, on the parameters' device; fp32 halves their memory.

    Returns:
        value: the largest Ritz value, in the loss's units per squared unit of parameter; never above the eigenvalue.
        smallest: the smallest one, negative where the loss curves down; it has no bound of its own here.
        residual: an eigenvalue of H lies within it of `value`.
        iterations: how many steps were made.
        converged: whether the residual met the tolerance.
        A loss whose derivatives are not finite gives None for the three numbers.

    Raises:
        UserError: no loss, no parameter, or no iteration.
    """
    losses = [loss] if callable(loss) else list(loss)
    if not losses:
        raise UserError("a sharpness needs a loss, found none: give at least one batch")
    if not parameters:
        raise UserError("a sharpness needs parameters that train, found none")
    if iterations < 1:
        raise UserError(f"iterations must be at least 1, not {iterations}: each one is a product with the Hessian")
    size = sum(parameter.numel() for parameter in parameters)
    device = parameters[0].device
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed means the same on every device
    q = torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
    steps = min(iterations, size)
    basis = torch.empty(steps, size, dtype=dtype, device=device)
    alphas: list[float] = []
    betas: list[float] = []
    basis[0] = q / q.norm()
    while True:
        k = len(alphas)
        w = _hessian_product(losses, parameters, basis[k])
        alphas.append((basis[k] @ w).item())
        for _ in range(2):
            w -= basis[: k + 1].T @ (basis[: k + 1] @ w)
        beta = w.norm().item()
        if not math.isfinite(alphas[-1]) or not math.isfinite(beta):
            return {"value": None, "smallest": None, "residual": None, "iterations": k + 1, "converged": False}
        ritz, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
        value, residual = ritz[-1].item(), abs(beta * vectors[-1, -1].item())
        if k + 1 == size:
            residual = 0.0  # the basis spans everything, and beta is rounding
        converged = residual <= tolerance * abs(value)
        if converged or k + 1 == steps:
            smallest = ritz[0].item()
            return {
                "value": value,
                "smallest": smallest,
                "residual": residual,
                "iterations": k + 1,
                "converged": converged,
            }
        betas.append(beta)
        basis[k + 1] = w / beta


def adapter_sharpness(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    iterations: int = 20,
    tolerance: float = 1e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, float | int | bool | None]:
    """Sharpness of a PEFT model's loss in its adapter, by the reference path: fp32, without dropout.

    Args:
        model: parameters that require grad count, except those of `modules_to_save`, whose curvature would drown the adapter's.
        batches: keyword arguments of its forward pass, with `labels`, on its device; each batch's loss counts the same.
        iterations, tolerance, seed, dtype: as in `top_eigenvalue`.

    Returns:
        What `top_eigenvalue` gives, and `parameters`, how many numbers the adapter has.

    Gradients that are stored on the parameters, and the model's mode, stay as they are.

    Raises:
        UserError: no batch, a batch without labels, or nothing that trains.
    """
    batches = list(batches)
    if not all("labels" in batch for batch in batches):
        raise UserError("a sharpness is of the loss, and a batch has no labels: add them to each batch")
    named = model.named_parameters()
    parameters = [p for name, p in named if p.requires_grad and ".modules_to_save." not in name]
    losses = [lambda batch=batch: model(**batch).loss for batch in batches]
    with reference_path(model):
        found = top_eigenvalue(losses, parameters, iterations, tolerance, seed, dtype)
    return found | {"parameters": sum(p.numel() for p in parameters)}


def _tridiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    off = torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
    return torch.diag(torch.tensor(alphas, dtype=torch.float64)) + off + off.T


@torch.enable_grad()
def _hessian_product(losses: Sequence[Loss], parameters: Sequence[Tensor], v: Tensor) -> Tensor:
    """H v for the mean of the losses: (n,), in the dtype of v."""
    sizes = [parameter.numel() for parameter in parameters]
    parts = [part.view_as(p).to(p.dtype) for part, p in zip(v.split(sizes), parameters, strict=True)]
    total = torch.zeros_like(v)
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
        # a gradient without a graph is constant: the loss is linear in that parameter, or does not use it
        curved = [(g, part) for g, part in zip(gradients, parts, strict=True) if g is not None and g.requires_grad]
        if not curved:
            continue
        outputs, directions = zip(*curved, strict=True)
        products = torch.autograd.grad(outputs, parameters, directions, allow_unused=True)
        offset = 0
        for product, size in zip(products, sizes, strict=True):
            if product is not None:
                total[offset : offset + size] += product.flatten()
            offset += size
    return total / len(losses)
