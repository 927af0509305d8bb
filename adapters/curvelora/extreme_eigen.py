"""Extreme eigenvectors of a positive semidefinite matrix by block Lanczos, and a proof that they are the extreme ones.

Search. Thick-restarted block Lanczos (Golub & Underwood 1977; Wu & Simon 2000) with full reorthogonalisation, on G for the
first pairs and on (G + delta I)^-1 for the last. What has not converged after a few steps goes on with the inverse of G shifted
to just beyond the edge of the spectrum, which the first steps have located and which spreads a crowded edge. It converges, or it
gives up; that what it found is extreme, it cannot know.

Proof. Let X (n, r) be any matrix and theta a number. If

    last:   M = G - theta I + tau X X^T     is positive definite, then v^T G v > theta v^T v for every v orthogonal to X;
    first:  M = theta I - G + tau X X^T     is positive definite, then v^T G v < theta v^T v for every such v.

So one Cholesky factorisation, n^3 / 3 operations, shows that nothing beyond theta was missed: by interlacing at most r
eigenvalues lie beyond it (Sylvester's law of inertia, with the pairs found taken out by a matrix of rank r). A factorisation
that succeeds in floating point proves that M is positive definite up to `rounding`, below.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

UNIT = 2.0**-53
SHIFT = 1e-14  # delta / trace(G): above what rounding makes negative, below a last eigenvalue that is not zero
CONVERGED = 1e-13  # residual of a Ritz pair of the operator, relative to its value; rounding leaves UNIT of the largest value
FIRST_STEPS = 16  # block steps (at least 2) with G, or with its inverse for the last; then the matrix is shifted
MAX_STEPS = 64  # block steps after that
BASIS_BLOCKS = 16  # blocks of the Krylov basis before it restarts
CHECK_EVERY = 8  # after so many steps the projected problem is solved
DEPENDENT = 1e-6  # ratio of pivots below which a block is orthonormalised by Householder QR, not by Cholesky
NARROWEST = 16  # block width: at least r, so that a value repeated r times is seen r times


def extreme_subspace(G: Tensor, r: int, end: str) -> Tensor | None:
    """An orthonormal basis that holds the r extreme eigenvectors of G and some more as guards, or None.

    Args:
        G: (n, n) fp64, symmetric positive semidefinite.
        r: how many.
        end: "first" for the largest, "last" for the smallest.

    Returns:
        (n, k) fp64, k > r, Ritz vectors from the extreme ones inward; None where it does not converge or where the shifted
        matrix cannot be factorised.
    """
    b = max(r, NARROWEST)
    # drawn on the CPU, so that every device starts from the same block
    start = torch.randn(len(G), b, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(G.device)
    delta = SHIFT * G.trace().item()
    inverse = None
    if end == "last":
        inverse = _inverse(G, -delta, end)
        if inverse is None:
            return None
    operator = G if inverse is None else inverse
    basis, values, converged = _largest(operator, start, r, FIRST_STEPS)
    if not converged:
        if basis is None:
            return None
        edge, inner, guard = (values if end == "first" else 1 / values - delta)[[0, r - 1, r + b - 1]].tolist()
        width = abs(edge - guard)
        sigma = edge + width if end == "first" else edge - width
        # the ratio of the r-th value to the first beyond the guards decides how fast it goes: as it is, and shifted
        if abs(sigma - guard) / abs(sigma - inner) > (values[r - 1] / values[r + b - 1]).item():
            near = _inverse(G, sigma, end)
            if near is not None:  # None where an eigenvalue lies beyond sigma, as the edge was not settled
                operator = inverse = near
        basis, values, converged = _largest(operator, basis[:, :b], r, MAX_STEPS)
        if not converged:
            return None
    if inverse is None:
        return basis
    # one step of inverse iteration, written as a correction, takes out what the rounding of the inverse put in
    image = G @ basis
    residual = image - basis @ (basis.T @ image)
    return _orthonormal(basis + inverse @ residual if end == "first" else basis - inverse @ residual)[0]


def _inverse(G: Tensor, sigma: float, end: str) -> Tensor | None:
    """(sigma I - G)^-1 for the first, (G - sigma I)^-1 for the last; None where that matrix is not positive definite.

    One product with it is as accurate here as two triangular solves and, with few columns, far faster on a GPU.
    """
    shifted = -G if end == "first" else G.clone()
    shifted.diagonal().add_(sigma if end == "first" else -sigma)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return None if failed.item() else torch.cholesky_inverse(factor)


def _largest(operator: Tensor, start: Tensor, r: int, steps: int) -> tuple[Tensor | None, Tensor | None, bool]:
    """Ritz vectors (n, r + b) and all Ritz values, descending, of the largest eigenvalues of a symmetric matrix.

    Args:
        operator: (n, n).
        start: (n, b), the first block.
        r: how many have to converge.
        steps: the most that are taken; fewer where the residuals grow from one look to the next.

    Returns:
        Vectors, values, and whether the first r converged; None for the first two where n is too small for blocks this wide.
    """
    n, b = start.shape
    room = min(BASIS_BLOCKS * b, 3 * n // 4)
    if room < 4 * b:  # a restart keeps half of it, which has to hold r + b vectors and leave room for more
        return None, None, False
    block = torch.linalg.qr(start)[0]
    Z = start.new_zeros(n, room)
    T = start.new_zeros(room, room)  # Z^T operator Z, upper triangle
    used, before = 0, inf
    for step in range(1, steps + 1):
        Z[:, used : used + b] = block
        known = Z[:, : used + b]
        image = operator @ block
        part = known.T @ image
        image.addmm_(known, part, alpha=-1)
        again = known.T @ image  # "twice is enough"
        image.addmm_(known, again, alpha=-1)
        T[: used + b, used : used + b] = part + again
        used += b
        block, coupling = _orthonormal(image, known)
        full = used + b > room
        if not full and step % CHECK_EVERY and step < steps:
            continue
        values, vectors = torch.linalg.eigh(T[:used, :used], UPLO="U")
        values, vectors = values.flip(0), vectors.flip(1)
        residuals = (coupling @ vectors[-b:, :r]).norm(dim=0)
        enough = (CONVERGED * values[:r].abs()).clamp(min=UNIT * values[0].abs().item())
        converged, worst = bool((residuals <= enough).all()), residuals.max().item()
        if converged or step == steps or worst > before:  # a block that gets worse sits in a cluster wider than itself
            break
        before = worst
        if full:
            kept = room // 2
            Z[:, :kept] = Z[:, :used] @ vectors[:, :kept]
            T.zero_()
            T[:kept, :kept] = values[:kept].diag()
            used = kept
    return Z[:, :used] @ vectors[:, : r + b], values, converged


def _orthonormal(block: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Q with Q^T Q = I, orthogonal to `others`, and R with block = Q R up to rounding.

    Two Cholesky-QR passes: a Householder QR of a few columns costs milliseconds on a GPU, and so would their many small kernels
    if the b x b part were not done on the host. Householder QR is the way out for a block that is nearly dependent, whose other
    columns are then drawn by rounding and have to be cleared of what is known already.
    """
    Q, R = block, None
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex((Q.T @ Q).cpu())
        pivots = factor.diagonal()
        if failed.item() or not (pivots.min() > DEPENDENT * pivots.max()).item():
            Q, R = torch.linalg.qr(block)
            if others is not None:
                for _ in range(2):
                    Q = torch.linalg.qr(Q - others @ (others.T @ Q))[0]
            return Q, R
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        Q = Q @ torch.linalg.solve_triangular(factor, identity, upper=False).T.to(Q.device)
        R = factor.T if R is None else factor.T @ R
    return Q, R.to(Q.device)


def rounding(diagonal: Tensor, norm: Tensor | float, m: int, r: int, tau: float) -> float:
    """How far below zero an eigenvalue of the exact M may be when Cholesky of the computed M succeeds.

    With gamma_k = k u / (1 - k u), u = 2^-53, the sum of

    * gamma_(n+1) trace(M), twice: the factorisation's own backward error (Higham 2002, theorem 10.3; Rump 2006), doubled for a
      library that works block by block and multiplies by inverses of small diagonal blocks;
    * gamma_m ||W||_F^2: G = W W^T as a matrix product in fp64, in any order of summation;
    * (gamma_r + 4 u) (tau r + ||W||_F^2 + max |M_ii|): forming tau X X^T and adding it up.

    Args:
        diagonal: of the computed M, (n,).
        norm: ||W||_F of the matrix whose Gram matrix G is.
        m: the length of the rows of W.
        r: columns of X, which are orthonormal.
        tau: as in M.
    """

    def gamma(k: int) -> float:
        return k * UNIT / (1 - k * UNIT)

    trace, square = float(diagonal.abs().sum()), float(norm) ** 2
    own = 2 * gamma(len(diagonal) + 1) * trace
    return own + gamma(m) * square + (gamma(r) + 4 * UNIT) * (tau * r + square + float(diagonal.abs().max()))


def nothing_missed(G: Tensor, X: Tensor, theta: float, end: str, norm: float, m: int) -> float | None:
    """Whether G is beyond `theta` on everything orthogonal to X, by one Cholesky factorisation.

    Args:
        G: (n, n) fp64, the computed Gram matrix W W^T.
        X: (n, r) fp64, orthonormal columns: the vectors that were found.
        theta: the limit.
        end: "last": above theta; "first": below.
        norm: ||W||_F.
        m: the length of the rows of W.

    Returns:
        The limit that is proved for the exact Gram matrix, which is theta moved by `rounding` to the safe side; None where the
        factorisation fails, which proves nothing.
    """
    tau = 2 * abs(theta) + norm**2 if end == "first" else 2 * abs(theta) + norm**2 / len(G)
    M = tau * (X @ X.T)
    if end == "first":
        M -= G
        M.diagonal().add_(theta)
    else:
        M += G
        M.diagonal().sub_(theta)
    lost = rounding(M.diagonal(), norm, m, X.shape[1], tau)
    failed = torch.linalg.cholesky_ex(M)[1]
    if failed.item():
        return None
    return theta + lost if end == "first" else theta - lost
