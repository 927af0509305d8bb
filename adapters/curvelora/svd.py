"""The few singular triplets of a weight matrix that an init needs, in fp64, with bounds on what they are.

Adapters that start from the weight need r of its n = min(d_out, d_in) triplets, and the last ones as often as the first. The
Gram matrix of the smaller side, W W^T or W^T W, is formed in fp64. Of a small one all eigenvectors are computed (eigh), of a
large one only the extreme ones are searched for (`curvelora.extreme_eigen`); if the search does not converge, or if it cannot be
proved that it missed nothing, eigh is the way out. The triplets follow from a thin SVD of the weight in their subspace
(Rayleigh-Ritz), which makes the singular values as accurate as those of a full SVD: squaring W costs digits of the subspace
only, about (s_1 / s_i)^2 2^-53.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from curvelora.extreme_eigen import extreme_subspace, nothing_missed, rounding

SMALL = 1024  # n up to which all eigenvectors are as fast; measured on a CPU
LARGEST_SHARE = 1 / 64  # of n: with more triplets than that, eigh
RESIDUAL = 1e-13  # ||W W^T U - U S^2|| / ||W W^T||, Frobenius norms, above which a search counts as not converged


@dataclass(frozen=True)
class Bounds:
    """What is known of triplets (U, S, V) beyond their being found.

    With E = W V - U S (W^T U = V S holds by construction), W is U S V^T + E V^T + a rest on the orthogonal complements. A
    Cholesky factorisation shows how far the rest reaches towards the chosen end (`curvelora.extreme_eigen`), and from Weyl's
    inequality, Courant's and the Davis-Kahan theorem follow `values` and `subspace`. The worst-case rounding of the Gram matrix
    and of the factorisation is part of both; the rounding of E itself and of the orthonormality of U and V, each about 1e-15 of
    ||W||, is not.

    Args:
        proved: nothing more extreme was missed. Without it `values` and `subspace` are infinite, and the triplets rest on the
            backward stability of eigh.
        values: no s_i is farther from the i-th exact singular value of that end.
        subspace: the sine of the largest angle between the r vectors of the smaller side and the exact ones is at most this;
            infinite where the next singular value is too close to tell, as the subspace is then not determined.
        residual: ||E||_F.
        solver: "lanczos", or "eigh" for all eigenvectors.
    """

    proved: bool
    values: float
    subspace: float
    residual: float
    solver: str


@dataclass(frozen=True)
class Triplets:
    """W ~ U diag(S) V^T in r terms: U (d_out, r), S (r,) descending, V (d_in, r), all fp64.

    The largest entry of each column of V is positive, so that the same weight gives the same triplets. Where a singular value
    is zero (below about 1e-8 of the largest), the vectors on the larger side are orthonormal and otherwise arbitrary, as they
    enter every product with that zero. `bounds` is None where the triplets were made by hand.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    bounds: Bounds | None = None

    def product(self) -> Tensor:
        """U diag(S) V^T: (d_out, d_in), fp64."""
        return (self.U * self.S) @ self.V.T


@torch.no_grad()
def singular_triplets(weight: Tensor, r: int, end: str, solver: str = "auto") -> Triplets:
    """The first or the last r singular triplets of `weight`.

    Args:
        weight: (d_out, d_in), any floating dtype; the work is done on its device.
        r: how many, at most n = min(d_out, d_in).
        end: "first" for the index set {0 .. r-1} of the descending spectrum, "last" for {n-r .. n-1}.
        solver: "eigh" computes all eigenvectors of the Gram matrix, the reference; "auto" searches where that is faster.

    Raises:
        ValueError: another `end` or `solver`, more triplets than there are, or a weight with NaN or infinite entries.
    """
    if end not in ("first", "last"):
        raise ValueError(f"end must be 'first' or 'last', not {end!r}")
    if solver not in ("auto", "eigh"):
        raise ValueError(f"solver must be 'auto' or 'eigh', not {solver!r}")
    if not 1 <= r <= min(weight.shape):
        raise ValueError(f"a {weight.shape[0]} x {weight.shape[1]} matrix has no {r} singular triplets")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite entries")
    W = weight.double()
    turned = W.shape[0] > W.shape[1]
    U, S, V, bounds = _of_wide(W.T if turned else W, r, end, solver)
    if turned:
        U, V = V, U
    signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    return Triplets(U * signs, S, V * signs, bounds)


def _of_wide(W: Tensor, r: int, end: str, solver: str) -> tuple[Tensor, Tensor, Tensor, Bounds]:
    """U (n, r), S (r,), V (m, r) and their bounds, of W (n, m) with n <= m."""
    n = W.shape[0]
    gram = W @ W.T
    norm = W.norm().item()
    if solver == "auto" and n > SMALL and r <= LARGEST_SHARE * n:
        basis = extreme_subspace(gram, r, end)
        if basis is not None:
            inner, S, Vt = torch.linalg.svd(basis.T @ W, full_matrices=False)
            if end == "first":
                chosen, following = slice(0, r), S[r].item()
            else:
                chosen, following = slice(len(S) - r, len(S)), S[-r - 1].item()
            U, S, V = basis @ inner[:, chosen], S[chosen], Vt[chosen].T
            E = W @ V - U * S
            if ((E * S).norm() <= RESIDUAL * gram.norm()).item():
                bounds = _bounds(gram, U, S, E, following**2, end, norm, W.shape[1], "lanczos")
                if bounds.proved:
                    return U, S, V, bounds
    values, vectors = torch.linalg.eigh(gram)  # ascending
    basis = vectors[:, :r] if end == "last" else vectors[:, -r:]
    following = 0.0 if r == n else values[r if end == "last" else -r - 1].clamp(min=0).item()
    inner, S, Vt = torch.linalg.svd(basis.T @ W, full_matrices=False)
    U, V = basis @ inner, Vt.T
    return U, S, V, _bounds(gram, U, S, W @ V - U * S, following, end, norm, W.shape[1], "eigh")


def _bounds(
    gram: Tensor, U: Tensor, S: Tensor, E: Tensor, following: float, end: str, norm: float, m: int, solver: str
) -> Bounds:
    """See `Bounds`.

    Args:
        gram: (n, n), W W^T of a W (n, m) with the norm `norm`.
        E: (n, r), W V - U S.
        following: the eigenvalue of `gram` next to the chosen ones, as far as it is known; it only steers where to look.
    """
    n, r = U.shape
    residual = E.norm().item()
    if r == n:
        return Bounds(True, residual, 0.0, residual, solver)
    edge = (S[-1] if end == "first" else S[0]).item() ** 2
    inward = -1 if end == "first" else 1  # where the rest of the spectrum lies
    # what one test can lose, roughly: M's diagonal is not yet known, and its trace is at most this
    worst = rounding(gram.diagonal() + max(edge, following), norm, m, r, 2 * edge + norm**2)
    limit = None
    if inward * (following - edge) > 8 * worst:  # half of the gap, as the next value is known from one side only
        limit = nothing_missed(gram, U, (edge + following) / 2, end, norm, m)
    if limit is None:  # none that matters is missed: none beyond the rounding of the Gram matrix
        limit = nothing_missed(gram, U, edge - inward * 4 * worst, end, norm, m)
    if limit is None:
        return Bounds(False, inf, inf, residual, solver)
    gap = inward * (limit - edge)
    subspace = (E * S).norm().item() / gap if gap > 0 else inf
    if end == "first":
        values = residual + max(0.0, sqrt(limit) - S[-1].item())
    else:
        rest = sqrt(max(0.0, limit - residual**2))  # of the part of W on the complements of U and of V
        values = min(residual + max(0.0, S[0].item() - rest), S[0].item())  # Courant: no exact value is above its s_i
    return Bounds(True, values, subspace, residual, solver)
