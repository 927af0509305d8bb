"""The path of an update through training, seen in the plane in which most of it lies.

All dW of all layers and snapshots are too many numbers to keep. A snapshot is kept as a two-sided Gaussian sketch, layer by layer

    S = P dW Q      P: (p, d_out), Q: (d_in, p), independent entries N(0, 1/p)

joined over the layers. Inner products survive in expectation: E <S_X, S_Z>_F = <X, Z>_F. With G = X^T X and
rho = ||G||_F^2 / (tr G)^2 = sum sigma^4 / (sum sigma^2)^2 (1 for rank one, 1/r for r equal singular values)

    Var ||S_X||_F^2 / ||X||_F^4 = (2/p) [(2 + 1/p) rho + 1/p]
    Var <S_X, S_Z>             <= (2/p) (2 + 2/p) ||X||_F^2 ||Z||_F^2

(from E[N G N] = (1 + 1/p) G + (tr G / p) I and Var tr(N C) <= (2/p) ||C||_F^2 for N = Q Q^T). For p = 16 and rho = 1/8 that is
a standard deviation of 20 % for one layer, 52 % for rank one; layers have independent sketches, so over L alike layers it falls
as 1 / sqrt(L). P and Q depend on the seed, the layer's name and its shape alone: every arm and every run has the same ones,
so that what the sketch distorts it distorts alike, and the difference of two sketches is the sketch of the difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvelora.errors import UserError
from curvelora.precision import at_least_fp32, exact_products
from curvelora_eval.lab.updates import Factors, adapted_layers, can_be_fitted, update_factors, update_weight

Updates = Mapping[str, Tensor | Factors]


class Sketcher:
    """Draws P and Q, and sketches updates.

    Args:
        seed: of all projections.
        size: p, at least 1; a layer takes p^2 numbers.

    Raises:
        UserError: a size below 1.
    """

    def __init__(self, seed: int = 0, size: int = 16) -> None:
        if size < 1:
            raise UserError(f"a sketch has at least 1 row and column, not {size}: write for example size=16")
        self.seed, self.size = seed, size

    def projections(self, name: str, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
        """P (p, d_out) and Q (d_in, p) of a layer: fp64, on the CPU."""
        key = f"{self.seed}/{self.size}/{name}/{d_out}x{d_in}"
        digest = hashlib.sha256(key.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        P = torch.randn(self.size, d_out, generator=generator, dtype=torch.float64)
        Q = torch.randn(d_in, self.size, generator=generator, dtype=torch.float64)
        return P / self.size**0.5, Q / self.size**0.5

    @torch.no_grad()
    def sketch(self, model_or_updates: nn.Module | Updates, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """The sketch of a model's update, or of given ones: (layers * p * p,), fp64, on the CPU.

        Args:
            model_or_updates: a model with adapters (or under full fine-tuning), or layer name -> dW (d_out, d_in) or its
                factors (A (q, d_in), B (d_out, q)), dW = B A. Products run in the update's dtype, at least fp32.
            inputs: layer name -> x (tokens, d_in), for methods that are nonlinear in them (`updates.update_factors`). Keep them
                the same for all snapshots, else the path shows the inputs too.

        Layers are joined in the order of their names. A nonlinear layer of which `inputs` holds fewer than r + 2 tokens, or none,
        has NaN for its part, and `pca_paths` leaves the snapshot out. Factors are sketched as (P B)(A Q), without forming dW.

        Raises:
            ValueError: a nonlinear bottleneck without any inputs.
            UserError: there is no layer.
        """
        if isinstance(model_or_updates, nn.Module):
            layers = adapted_layers(model_or_updates)
            # one at a time: the dense updates of a model need not exist together
            parts = [self._part(name, layers[name], inputs) for name in sorted(layers)]
        else:
            parts = [self._layer(name, model_or_updates[name]) for name in sorted(model_or_updates)]
        if not parts:
            raise UserError("there is no adapted layer to sketch: give a model with an adapter")
        return torch.cat(parts)

    def _part(self, name: str, layer: nn.Module, inputs: Mapping[str, Tensor] | None) -> Tensor:
        x = (inputs or {}).get(name)
        if inputs is not None and not can_be_fitted(layer, x):
            return torch.full((self.size**2,), torch.nan, dtype=torch.float64)
        return self._layer(name, _update(layer, x))

    def _layer(self, name: str, update: Tensor | Factors) -> Tensor:
        A, B = (update, None) if isinstance(update, Tensor) else update
        work = at_least_fp32(A.dtype)
        P, Q = self.projections(name, len(A if B is None else B), A.shape[1])
        P, Q, A = (t.to(A.device, work) for t in (P, Q, A))
        with exact_products(A.device):
            sketched = P @ (A @ Q) if B is None else (P @ B.to(work)) @ (A @ Q)
        return sketched.flatten().double().cpu()


def _update(layer: nn.Module, x: Tensor | None) -> Tensor | Factors:
    pair = update_factors(layer, x)
    return update_weight(layer, x) if pair is None else pair


def pca_paths(paths: Mapping[Hashable, tuple[list[int], Tensor]], components: int = 2) -> dict[str, Any]:
    """Lay all paths into the plane (by default) that holds most of their energy.

    The origin is dW = 0, the base model, and not the mean: every path can then be read as a way from the base, and an axis as
    a direction of update. The axes are the leading right singular vectors of all snapshots stacked, each as it is, so a run with
    larger updates or more snapshots counts more.

    Args:
        paths: run -> (steps, snapshots (len(steps), dim)), with one dim for all.
        components: how many axes.

    Returns:
        {"explained": share of the sum of squares about the origin, per axis, "paths": {run: [[step, pc1, pc2], ...]}}. An axis
        points to where the coordinate of largest size is. Snapshots with NaN or infinite entries, of diverged runs, are left
        out. Axes beyond the rank of the snapshots have share and coordinates 0.

    Raises:
        UserError: no run, snapshots of different dimensions, or another number of steps than of snapshots.
    """
    if not paths:
        raise UserError("there is no path to lay out: give at least one run with snapshots")
    if len({snapshots.shape[1:] for _, snapshots in paths.values()}) > 1:
        raise UserError("the runs have sketches of different lengths: their adapters must sit on the same layers")
    kept: dict[Hashable, tuple[list[int], Tensor]] = {}
    for run, (steps, snapshots) in paths.items():
        if len(steps) != len(snapshots):
            raise UserError(f"run {run!r} has {len(steps)} steps for {len(snapshots)} snapshots: give one step each")
        finite = torch.isfinite(snapshots).all(1)
        kept[run] = [s for s, ok in zip(steps, finite.tolist(), strict=True) if ok], snapshots[finite].double()
    stacked = torch.cat([snapshots for _, snapshots in kept.values()])
    energy = stacked.square().sum()
    coordinates = stacked.new_zeros(len(stacked), components)
    explained = stacked.new_zeros(components)
    if energy > 0:
        U, S, _ = torch.linalg.svd(stacked, full_matrices=False)
        k = min(components, len(S))
        found = U[:, :k] * S[:k]
        found *= found.gather(0, found.abs().argmax(0, keepdim=True)).sign()
        coordinates[:, :k], explained[:k] = found, S[:k].square() / energy
    parts = coordinates.split([len(snapshots) for _, snapshots in kept.values()])
    return {
        "explained": explained.tolist(),
        "paths": {
            run: [[step, *row] for step, row in zip(steps, part.tolist(), strict=True)]
            for (run, (steps, _)), part in zip(kept.items(), parts, strict=True)
        },
    }
