"""The few triplets that an init takes: against a full SVD, with a bound on residual and orthogonality."""

from __future__ import annotations

import pytest
import torch

from curvelora.svd import singular_triplets

SHAPES = [(40, 40), (53, 37), (37, 53), (5, 3), (1, 7), (7, 1)]


def spectrum(name: str, n: int) -> torch.Tensor:
    return {
        "flat": torch.linspace(1, 0.5, n),
        "decaying": torch.arange(1, n + 1) ** -0.5,
        "steep": 10 ** -torch.linspace(0, 5, n),
        "rank-deficient": torch.cat([torch.ones(n - n // 2), torch.zeros(n // 2)]),
    }[name].double()


def matrix(shape: tuple[int, int], kind: str) -> torch.Tensor:
    """A matrix of known singular values, in fp64."""
    generator = torch.Generator().manual_seed(0)
    n = min(shape)
    U, V = (torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64))[0] for d in shape)
    return (U * spectrum(kind, n)) @ V.T


@pytest.mark.parametrize("kind", ["flat", "decaying", "steep", "rank-deficient"])
@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_and_orthogonality(shape, end, kind):
    W = matrix(shape, kind)
    for r in {1, max(1, min(shape) // 3), min(shape)}:
        found = singular_triplets(W, r, end)
        U, S, V = found.U, found.S, found.V
        assert U.shape == (shape[0], r) and S.shape == (r,) and V.shape == (shape[1], r)
        assert U.dtype == S.dtype == V.dtype == torch.float64
        scale, one = W.norm(), torch.eye(r, dtype=torch.float64)
        positive = S > 1e-8  # s_1 is 1; vectors of a zero singular value may be any
        # measured: at most 5e-15, in the steep tail (s_n = 1e-5 s_1) 2e-11
        assert ((W @ V - U * S)[:, positive]).norm() / scale < 1e-10
        assert ((W.T @ U - V * S)[:, positive]).norm() / scale < 1e-10
        assert (S[~positive] < 1e-12).all()
        assert (U.T @ U - one).norm() < 1e-12 and (V.T @ V - one).norm() < 1e-12
        assert (S[:-1] >= S[1:]).all() and (S >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("end", ["first", "last"])
def test_the_same_as_a_full_svd(end, dtype):
    """Also of a weight in lower precision, which is taken as it is."""
    W = matrix((53, 37), "decaying").to(dtype)
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    # the last r are the index set {n-r .. n-1}, not one fewer
    chosen = slice(0, 4) if end == "first" else slice(33, 37)
    found = singular_triplets(W, 4, end)
    torch.testing.assert_close(found.S, S[chosen], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.product(), (U[:, chosen] * S[chosen]) @ Vt[chosen], rtol=0, atol=1e-12)


def test_taking_the_last_ones_leaves_the_first():
    W = matrix((53, 37), "decaying")
    rest = W - singular_triplets(W, 5, "last").product()
    torch.testing.assert_close(rest, singular_triplets(W, 32, "first").product(), rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(rest, rtol=1e-10) == 32


def test_the_same_signs_every_time():
    W = matrix((53, 37), "decaying")
    for end in ("first", "last"):
        V = singular_triplets(W, 6, end).V
        assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()
        # -U and -V are the same triplet: what decides is the weight, not the solver
        torch.testing.assert_close(singular_triplets(-W, 6, end).V, V)


@pytest.mark.parametrize(
    ("r", "end", "said"), [(0, "last", "no 0"), (38, "last", "no 38"), (2, "tail", "'first' or 'last', not 'tail'")]
)
def test_what_does_not_exist_is_refused(r, end, said):
    with pytest.raises(ValueError, match=said):
        singular_triplets(matrix((53, 37), "flat"), r, end)


def test_a_broken_weight_is_refused():
    W = matrix((5, 3), "flat")
    W[2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        singular_triplets(W, 1, "last")
