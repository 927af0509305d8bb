"""The singular values of updates, and where their leading subspaces lie in the base weight.

With sigma_1 >= sigma_2 >= ... the singular values of dW (d_out, d_in), n = min(d_out, d_in) and p_i = sigma_i / sum sigma:

    stable_rank         ||dW||_F^2 / sigma_1^2
    effective_rank      exp(- sum p_i ln p_i)                          Roy and Vetterli, EUSIPCO 2007
    energy_beyond_rank  sum_{i > r} sigma_i^2 / sum sigma_i^2          0 for every LoRA
    next_after_rank     sigma_{r+1} / sigma_1                          0 for every LoRA
    overlap             ||U_W^T U_dW||_F^2 / k in [0, 1]               LoRA (arXiv 2106.09685), section 7.2, appendix G

The overlaps compare the k leading singular vectors of dW with the k first (`top`) and the k last (`tail`) of W0, on the left
(outputs) and on the right (inputs). A random subspace overlaps by k / d on average, which stands beside them. k is r, or the
numerical rank of dW where that is lower: beyond it dW has no directions of its own.

All decompositions are made in fp64. A dense fp32 update carries its own rounding, about 1e-8 of sigma_1 per singular value; the
LoRAN identity arm, which is formed in the same way, shows that floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from curvelora.svd import singular_triplets
from curvelora_eval.lab.updates import (
    adapted_layers,
    base_weight,
    best_linear_map,
    can_be_fitted,
    factors,
    is_nonlinear,
    scale,
    update_factors,
    update_weight,
)

RANK_TOLERANCE = 1e-6  # singular values below this share of the largest count as zero: fp32 factors do not carry them
SCALARS = ("stable_rank", "effective_rank", "energy_beyond_rank", "next_after_rank")
OVERLAPS = ("overlap_top_left", "overlap_top_right", "overlap_tail_left", "overlap_tail_right")


@dataclass(frozen=True)
class Subspaces:
    """The first and the last k singular vectors of a base weight, fp64, in descending order of singular value.

    Args:
        top_left, tail_left: (d_out, k).
        top_right, tail_right: (d_in, k). Of a weight that is not square, `tail` are the last of its n triplets.
    """

    top_left: Tensor
    top_right: Tensor
    tail_left: Tensor
    tail_right: Tensor


def base_subspaces(base: Tensor, rank: int) -> Subspaces:
    """Of a weight (d_out, d_in), k = min(rank, d_out, d_in). The base is shared by all arms, so compute it once.

    Raises:
        ValueError: NaN or infinite entries.
    """
    k = min(rank, *base.shape)
    first, last = (singular_triplets(base, k, end) for end in ("first", "last"))
    return Subspaces(first.U, first.V, last.U, last.V)


def spectrum(
    update: Tensor, rank: int, base: Tensor | None = None, subspace: Subspaces | None = None
) -> dict[str, Any]:
    """Describe a dense update; see the module for the formulas.

    Args:
        update: dW (d_out, d_in), any floating dtype.
        rank: r, at least 1.
        base: W0 (d_out, d_in), for the overlaps; not needed with `subspace`.
        subspace: what `base_subspaces(W0, rank)` gave.

    Returns:
        `frobenius`, `spectral`, the scalars of the module's table, `singular_values` (the first min(n, 2 r + 16), divided by
        sigma_1) and, with a base, the four `overlap_*`, `overlap_rank` (k), `chance_left` (k / d_out) and `chance_right`
        (k / d_in). A zero update has norms 0 and everything else None; one with NaN or infinite entries None throughout.
        `next_after_rank` is None where r >= n.

    Raises:
        ValueError: a rank below 1.
    """
    finite = torch.isfinite(update).all()
    return _describe(_thin_svd(update.double()) if finite else None, update.shape, rank, base, subspace)


def spectrum_of_factors(
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    rank: int | None = None,
    base: Tensor | None = None,
    subspace: Subspaces | None = None,
) -> dict[str, Any]:
    """`spectrum` of scale B A without forming it: an SVD of q x q, between QR decompositions of the thin factors.

    Args:
        A, B: (q, d_in) and (d_out, q).
        rank: r; q by default.
        base, subspace: as in `spectrum`.
    """
    found = None
    if torch.isfinite(A).all() and torch.isfinite(B).all():
        Q_B, R_B = torch.linalg.qr(B.double())
        Q_A, R_A = torch.linalg.qr(A.double().T)
        U, S, V = _thin_svd(scale * R_B @ R_A.T)
        found = Q_B @ U, S, Q_A @ V
    return _describe(found, (B.shape[0], A.shape[1]), rank or A.shape[0], base, subspace)


def _thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of a fp64 matrix: (d_out, n), (n,), (d_in, n)."""
    if matrix.shape[0] < matrix.shape[1]:
        V, S, U = _thin_svd(matrix.T)
        return U, S, V
    Q, R = torch.linalg.qr(matrix)  # several times faster than a direct SVD where one side is much longer
    U, S, Vt = torch.linalg.svd(R, full_matrices=False)
    return Q @ U, S, Vt.T


def _describe(
    found: tuple[Tensor, Tensor, Tensor] | None,
    shape: Iterable[int],
    rank: int,
    base: Tensor | None,
    subspace: Subspaces | None,
) -> dict[str, Any]:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, found {rank}")
    d_out, d_in = shape
    n = min(d_out, d_in)
    compared = base is not None or subspace is not None
    keys = [*SCALARS, "singular_values"]
    if compared:
        keys += [*OVERLAPS, "overlap_rank", "chance_left", "chance_right"]
    nothing = dict.fromkeys(keys)
    if found is None:
        return {"frobenius": None, "spectral": None, **nothing}
    U, S, V = found
    if S[0] == 0:
        return {"frobenius": 0.0, "spectral": 0.0, **nothing}
    values = torch.cat([S, S.new_zeros(n - len(S))])  # factors of rank q have n - q zeros more
    energy, shares = values.square(), values / values.sum()
    result = {
        "frobenius": values.norm().item(),
        "spectral": values[0].item(),
        "stable_rank": (energy.sum() / energy[0]).item(),
        "effective_rank": torch.special.entr(shares).sum().exp().item(),
        "energy_beyond_rank": (energy[rank:].sum() / energy.sum()).item(),
        "next_after_rank": (values[rank] / values[0]).item() if rank < n else None,
        "singular_values": (values[: 2 * rank + 16] / values[0]).tolist(),
    }
    if compared:
        k = min(rank, int((values > RANK_TOLERANCE * values[0]).sum()))
        own = subspace if subspace is not None else base_subspaces(base, k)
        result |= {
            "overlap_top_left": _overlap(own.top_left[:, :k], U[:, :k]),
            "overlap_top_right": _overlap(own.top_right[:, :k], V[:, :k]),
            "overlap_tail_left": _overlap(own.tail_left[:, -k:], U[:, :k]),
            "overlap_tail_right": _overlap(own.tail_right[:, -k:], V[:, :k]),
            "overlap_rank": k,
            "chance_left": k / d_out,
            "chance_right": k / d_in,
        }
    return result


def _overlap(one: Tensor, other: Tensor) -> float:
    """||one^T other||_F^2 / k of two orthonormal bases (d, k)."""
    return ((one.T @ other).square().sum() / one.shape[1]).item()


@torch.no_grad()
def spectra(
    model: nn.Module,
    rank: int,
    inputs: Mapping[str, Tensor] | None = None,
    layers: Iterable[str] | None = None,
    base_overlap: bool = True,
    subspaces: Mapping[str, Subspaces] | None = None,
) -> dict[str, dict[str, Any]]:
    """Layer -> {"update": spectrum of what is really added, "BA": spectrum of s B A, the LoRA with these factors}.

    Args:
        rank: r of energy_beyond_rank and of the overlaps.
        inputs: layer -> x (tokens, d_in), for methods that are nonlinear in them; `presence.capture_inputs` collects them.
        layers: names of the layers to look at; all adapted ones by default.
        base_overlap: whether to compare with the base weight, which costs two eigendecompositions per layer ...
        subspaces: ... unless they are given: layer -> `base_subspaces`.

    For LoRA the two coincide, and full fine-tuning has no factors: both have "update" only. Where a best linear map stands for a
    nonlinear bottleneck, "linear_map" has its `residual` and `intercept_share` (`updates.LinearMap`). A layer of which `inputs`
    holds fewer than the r + 2 tokens of that fit, or none, has None for "update" and "linear_map".

    Raises:
        ValueError: a method that is nonlinear in its inputs without inputs, or a name in `layers` that is not adapted.
    """
    adapted = adapted_layers(model)
    wanted = list(adapted) if layers is None else list(layers)
    if unknown := [name for name in wanted if name not in adapted]:
        raise ValueError(f"no adapted layer is called {', '.join(unknown)}; the adapted ones are {', '.join(adapted)}")
    result = {}
    for name in wanted:
        layer, x = adapted[name], (inputs or {}).get(name)
        subspace = (subspaces or {}).get(name)
        if subspace is None and base_overlap:
            subspace = base_subspaces(base_weight(layer), rank)
        pair = factors(layer)
        # without any inputs it is the caller's error, and raises
        fitted = inputs is None or can_be_fitted(layer, x)
        thin = update_factors(layer, x) if fitted else None
        if not fitted:
            record = {"update": None}
        elif thin is not None:
            record = {"update": spectrum_of_factors(*thin, rank=rank, subspace=subspace)}
        else:
            record = {"update": spectrum(update_weight(layer, x), rank, subspace=subspace)}
        if pair is not None and not isinstance(layer, LoraLayer):
            record["BA"] = spectrum_of_factors(*pair, scale(layer), rank=rank, subspace=subspace)
        if is_nonlinear(layer):
            record["linear_map"] = best_linear_map(layer, x).as_dict() if fitted else None
        result[name] = record
    return result


def by_module_type(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Module type, the last part of a layer's name -> the mean of each scalar over its layers, nested as they are.

    None is left out of a mean; where there is nothing else, the mean is None. Lists are left out. `layers` counts the layers.
    """
    types: dict[str, list[Mapping[str, Any]]] = {}
    for name, record in layers.items():
        types.setdefault(name.rpartition(".")[2], []).append(record)
    return {kind: {**_means(records), "layers": len(records)} for kind, records in types.items()}


def _means(records: list[Mapping[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for key in dict.fromkeys(key for record in records for key in record):
        values = [record[key] for record in records if record.get(key) is not None]
        if any(isinstance(value, Mapping) for value in values):
            means[key] = _means(values)
        elif not any(isinstance(value, list) for value in values) and key != "singular_values":
            means[key] = sum(values) / len(values) if values else None
    return means
