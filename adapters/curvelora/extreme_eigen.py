"""Extreme eigenvectors of a positive semidefinite matrix by block Lanczos, and a proof that they are the extreme ones.

Search. Thick-restarted block Lanczos (Golub & Underwood 1977; Wu & Simon 2000) with full reorthogonalisation, on G for the
first pairs and on (G + delta I)^-1 for the last. It converges, or it gives up; that what it found is extreme, it cannot know.

Proof. Let X (n, r) be any matrix and theta a number. If

    last:   M = G - theta I + tau X X^T     is positive definite, then v^T G v > theta v^T v for every v orthogonal to X;
    first:  M = theta I - G + tau X X^T     is positive definite, then v^T G v < theta v^T v for every such v.

So one Cholesky factorisation, n^3 / 3 operations, shows that nothing beyond theta was missed: by interlacing at most r
eigenvalues lie beyond it (Sylvester's law of inertia, with the pairs found taken out by a matrix of rank r). A factorisation
that succeeds in floating point proves that M is positive definite up to `rounding`, below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

UNIT = 2.0**-53
SHIFT = (
    1e-14  # delta / trace(G): far above what rounding can make negative, far below a last eigenvalue that is not zero
)
CONVERGED = 1e-13  # residual of a Ritz pair of the operator, relative to its value
MAX_STEPS = 160  # block steps; about 40 settle a random 4096 x 4096 weight
BASIS_BLOCKS = 16  # blocks of the Krylov basis before it restarts, and
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
        (n, k) fp64, k > r, Ritz vectors from the extreme ones inward; None where it does not converge in `MAX_STEPS` or where
        the shifted matrix cannot be factorised.
    """
    if end == "first":
        return _largest(lambda block: G @ block, G, r)
    shifted = G.clone()
    shifted.diagonal().add_(SHIFT * G.trace())
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed.item():
        return None
    # one product with the inverse is as accurate here as two triangular solves and, with few columns, far faster on a GPU
    inverse = torch.cholesky_inverse(factor)
    basis = _largest(lambda block: inverse @ block, G, r)
    if basis is None:
        return None
    # one step of inverse iteration, written as a correction, takes out what the rounding of the inverse put in
    image = G @ basis
    residual = image - basis @ (basis.T @ image)
    return _orthonormal(basis - inverse @ residual)[0]


def _largest(operator: Callable[[Tensor], Tensor], like: Tensor, r: int) -> Tensor | None:
    """Ritz vectors (n, r + b) of the largest eigenvalues of a symmetric operator; None if the first r do not converge."""
    n, b = like.shape[0], max(r, NARROWEST)
    room = min(BASIS_BLOCKS * b, 3 * n // 4)
    if room < 4 * b:  # a restart keeps half of it, which has to hold r + b vectors and leave room for more
        return None
    # drawn on the CPU, so that every device starts from the same block
    block = torch.randn(n, b, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like.device)
    block = torch.linalg.qr(block)[0]
    Z = like.new_zeros(n, room)
    T = like.new_zeros(room, room)  # Z^T operator Z, upper triangle
    used = 0
    for step in range(1, MAX_STEPS + 1):
        Z[:, used : used + b] = block
        known = Z[:, : used + b]
        image = operator(block)
        for _ in range(2):  # "twice is enough"
            part = known.T @ image
            image -= known @ part
            T[: used + b, used : used + b] += part
        used += b
        block, coupling = _orthonormal(image, known)
        full = used + b > room
        if not full and step % CHECK_EVERY:
            continue
        values, vectors = torch.linalg.eigh(T[:used, :used], UPLO="U")
        values, vectors = values.flip(0), vectors.flip(1)
        residuals = (coupling @ vectors[-b:, :r]).norm(dim=0)
        if (residuals <= CONVERGED * values[:r].abs()).all():
            return Z[:, :used] @ vectors[:, : r + b]
        if full:
            kept = room // 2
            Z[:, :kept] = Z[:, :used] @ vectors[:, :kept]
            T.zero_()
            T[:kept, :kept] = values[:kept].diag()
            used = kept
    return None


def _orthonormal(block: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Q with Q^T Q = I, orthogonal to `others`, and R with block = Q R up to rounding.

    Two Cholesky-QR passes: a Householder QR of a few columns costs milliseconds on a GPU. It is the way out for a block that is
    nearly dependent, whose other columns are then drawn by rounding and have to be cleared of what is known already.
    """
    Q, R = block, None
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(Q.T @ Q)
        pivots = factor.diagonal()
        if failed.item() or not (pivots.min() > DEPENDENT * pivots.max()).item():
            Q, R = torch.linalg.qr(block)
            if others is not None:
                for _ in range(2):
                    Q = torch.linalg.qr(Q - others @ (others.T @ Q))[0]
            return Q, R
        Q = torch.linalg.solve_triangular(factor.T, Q, upper=True, left=False)
        R = factor.T if R is None else factor.T @ R
    return Q, R


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
