"""The few singular triplets of a weight matrix that an init needs, in fp64.

Adapters that start from the weight need r of its n = min(d_out, d_in) triplets, and the last ones as often as the first. The
Gram matrix of the smaller side, W W^T or W^T W, is formed and decomposed in fp64; only r of its eigenvectors are kept, and the
triplets follow from a thin SVD of the weight in their subspace (Rayleigh-Ritz), which makes the singular values as accurate as
those of a full SVD: squaring W costs digits of the subspace only, about (s_1 / s_i)^2 2^-53.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Triplets:
    """W ~ U diag(S) V^T in r terms: U (d_out, r), S (r,) descending, V (d_in, r), all fp64.

    The largest entry of each column of V is positive, so that the same weight gives the same triplets. Where a singular value
    is zero (below about 1e-8 of the largest), the vectors on the larger side are orthonormal and otherwise arbitrary, as they
    enter every product with that zero.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def product(self) -> Tensor:
        """U diag(S) V^T: (d_out, d_in), fp64."""
        return (self.U * self.S) @ self.V.T


@torch.no_grad()
def singular_triplets(weight: Tensor, r: int, end: str) -> Triplets:
    """The first or the last r singular triplets of `weight`.

    Args:
        weight: (d_out, d_in), any floating dtype; the work is done on its device.
        r: how many, at most n = min(d_out, d_in).
        end: "first" for the index set {0 .. r-1} of the descending spectrum, "last" for {n-r .. n-1}.

    Raises:
        ValueError: another `end`, more triplets than there are, or a weight with NaN or infinite entries.
    """
    if end not in ("first", "last"):
        raise ValueError(f"end must be 'first' or 'last', not {end!r}")
    if not 1 <= r <= min(weight.shape):
        raise ValueError(f"a {weight.shape[0]} x {weight.shape[1]} matrix has no {r} singular triplets")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite entries")
    W = weight.double()
    if W.shape[0] > W.shape[1]:
        turned = singular_triplets(W.T, r, end)
        U, S, V = turned.V, turned.S, turned.U
    else:
        _, vectors = torch.linalg.eigh(W @ W.T)  # ascending
        basis = vectors[:, :r] if end == "last" else vectors[:, -r:]
        inner, S, Vt = torch.linalg.svd(basis.T @ W, full_matrices=False)
        U, V = basis @ inner, Vt.T
    signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    return Triplets(U * signs, S, V * signs)
