"""The few triplets that an init takes: against a full SVD, with a bound on residual and orthogonality."""

from __future__ import annotations

from math import inf

import pytest
import torch

from curvelora import extreme_eigen, svd
from curvelora.extreme_eigen import nothing_missed
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


@pytest.fixture
def searching(monkeypatch):
    """The search for extreme triplets, which is meant for large weights, on small ones."""
    monkeypatch.setattr(svd, "SMALL", 32)
    monkeypatch.setattr(svd, "LARGEST_SHARE", 1 / 8)


KINDS = {
    "decaying": lambda n: torch.arange(1, n + 1) ** -0.5,
    "outliers": lambda n: torch.cat([torch.tensor([100.0, 50.0, 20.0]), torch.linspace(1, 0.5, n - 3)]),
    "clustered tail": lambda n: torch.cat([torch.linspace(1, 0.6, n - 40), 0.5 + 1e-9 * torch.linspace(1, 0, 40)]),
    "equal tail": lambda n: torch.cat([torch.linspace(1, 0.6, n - 40), torch.full((40,), 0.5)]),
    "threefold": lambda n: torch.linspace(1, 0.5, n).repeat_interleave(3)[:n],
    "rank-deficient": lambda n: torch.cat([torch.linspace(1, 0.5, n - n // 3), torch.zeros(n // 3)]),
    "steep": lambda n: 10 ** -torch.linspace(0, 4, n),
}


def of_kind(kind: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (fp64), its exact singular values, descending, and its exact vectors on the smaller side."""
    generator = torch.Generator().manual_seed(1)
    n = min(shape)
    S = KINDS[kind](n).double()
    U, V = (torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64))[0] for d in shape)
    return (U * S) @ V.T, S, U if shape[0] <= shape[1] else V


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("shape", [(211, 211), (180, 333), (333, 180)])
def test_the_search_finds_the_extreme_ones_and_proves_it(searching, shape, end, kind):
    W, exact, vectors = of_kind(kind, shape)
    for r in (1, 2, 7):
        found = singular_triplets(W, r, end)
        bounds = found.bounds
        assert bounds.solver == "lanczos" and bounds.proved
        chosen = slice(0, r) if end == "first" else slice(len(exact) - r, None)
        error = (found.S - exact[chosen]).abs().max().item()
        assert error <= 1e-12 * exact[0]
        # what is said to be proved holds, and says something: the worst rounding of the Gram matrix costs half the digits
        assert error <= bounds.values + 1e-14 * exact[0] and bounds.values < 1e-5 * exact[0]
        mine, wanted = found.U if shape[0] <= shape[1] else found.V, vectors[:, chosen]
        angle = torch.linalg.matrix_norm(wanted - mine @ (mine.T @ wanted), 2).item()
        assert angle <= bounds.subspace + 1e-13
        one = torch.eye(r, dtype=torch.float64)
        assert (found.U.T @ found.U - one).norm() < 1e-12 and (found.V.T @ found.V - one).norm() < 1e-12
        if kind in ("decaying", "outliers"):
            assert angle < 1e-9 and bounds.subspace < 1e-6
        if kind == "equal tail" and end == "last":  # any r of the 40 will do, and no bound is claimed
            assert bounds.subspace == inf


@pytest.mark.parametrize("end", ["first", "last"])
def test_the_search_agrees_with_the_reference_and_with_torch(searching, end):
    W = torch.randn(150, 240, generator=torch.Generator().manual_seed(3), dtype=torch.float64).bfloat16()
    found, reference = singular_triplets(W, 5, end), singular_triplets(W, 5, end, "eigh")
    assert (found.bounds.solver, reference.bounds.solver) == ("lanczos", "eigh")
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    chosen = slice(0, 5) if end == "first" else slice(145, 150)
    for triplets in (found, reference):
        torch.testing.assert_close(triplets.S, S[chosen], rtol=0, atol=1e-12 * S[0].item())
        assert triplets.bounds.proved and triplets.bounds.subspace < 1e-9
        torch.testing.assert_close(triplets.product(), (U[:, chosen] * S[chosen]) @ Vt[chosen], rtol=0, atol=1e-10)
    torch.testing.assert_close(singular_triplets(W, 5, end).U, found.U, rtol=0, atol=0)  # nothing is drawn anew


@pytest.mark.parametrize("end", ["first", "last"])
def test_what_was_missed_is_noticed(end):
    """The proof is given the second to fifth vectors, or those from the middle, in the place of the extreme ones."""
    W, exact, vectors = of_kind("decaying", (120, 120))
    G, norm = W @ W.T, W.norm().item()
    order = vectors if end == "first" else vectors.flip(1)
    values = (exact if end == "first" else exact.flip(0)).square()
    theta = ((values[3] + values[4]) / 2).item()
    limit = nothing_missed(G, order[:, :4], theta, end, norm, 120)
    assert limit is not None and (limit > theta if end == "first" else limit < theta)
    for wrong in (order[:, 1:5], order[:, [0, 1, 2, 9]], order[:, 50:54], order[:, :3]):
        assert nothing_missed(G, wrong, theta, end, norm, 120) is None


def interior(G, r, end):
    """A search that converges, to other eigenvectors than the extreme ones."""
    return torch.linalg.eigh(G)[1][:, 40:60]


@pytest.mark.parametrize("broken", [interior, lambda *_: None], ids=["missed", "not converged"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_without_a_proof_all_eigenvectors_are_computed(searching, monkeypatch, end, broken):
    W, exact, _ = of_kind("decaying", (120, 150))
    monkeypatch.setattr(svd, "extreme_subspace", broken)
    found = singular_triplets(W, 3, end)
    assert found.bounds.solver == "eigh" and found.bounds.proved
    torch.testing.assert_close(found.S, exact[:3] if end == "first" else exact[-3:], rtol=0, atol=1e-13)


def test_no_proof_at_all_is_said(searching, monkeypatch):
    """The triplets of eigh are returned all the same, and nothing is claimed."""
    monkeypatch.setattr(svd, "nothing_missed", lambda *_: None)
    W, exact, _ = of_kind("decaying", (120, 150))
    found = singular_triplets(W, 3, "last")
    assert (found.bounds.solver, found.bounds.proved, found.bounds.values) == ("eigh", False, inf)
    torch.testing.assert_close(found.S, exact[-3:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 1, 20])
def test_a_matrix_of_low_rank(searching, rank):
    """The Krylov space ends early, and the columns that rounding makes up are cleared of what is known."""
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(130, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, 140, generator=generator, dtype=torch.float64
    )
    exact = torch.linalg.svdvals(W)
    for end in ("first", "last"):
        found = singular_triplets(W, 5, end)
        wanted = exact[:5] if end == "first" else exact[-5:]
        assert (found.S - wanted).abs().max() <= 1e-12 * max(1.0, exact[0].item())


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="'auto' or 'eigh', not 'qr'"):
        singular_triplets(matrix((5, 3), "flat"), 1, "last", "qr")


@pytest.mark.parametrize("end", ["first", "last"])
def test_a_search_that_runs_out_of_steps_gives_up(searching, monkeypatch, end):
    monkeypatch.setattr(extreme_eigen, "FIRST_STEPS", 2)
    monkeypatch.setattr(extreme_eigen, "MAX_STEPS", 2)
    W, exact, _ = of_kind("clustered tail", (180, 200))
    found = singular_triplets(W, 3, end)
    assert found.bounds.solver == "eigh" and found.bounds.proved
    torch.testing.assert_close(found.S, exact[:3] if end == "first" else exact[-3:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("end", ["first", "last"])
def test_an_edge_that_was_not_settled_does_not_stop_the_search(searching, monkeypatch, end):
    """The shifted matrix is then not positive definite, and the search goes on with the matrix that it has."""
    inverse, sigmas = extreme_eigen._inverse, []

    def refusing(G, sigma, end):
        sigmas.append(sigma)
        return None if abs(sigma) > 1e-6 else inverse(G, sigma, end)

    monkeypatch.setattr(extreme_eigen, "FIRST_STEPS", 2)
    monkeypatch.setattr(extreme_eigen, "_inverse", refusing)
    W, exact, _ = of_kind("threefold", (180, 200))
    found = singular_triplets(W, 3, end)
    assert found.bounds.solver == "lanczos" and found.bounds.proved and abs(sigmas[-1]) > 1e-6
    torch.testing.assert_close(found.S, exact[:3] if end == "first" else exact[-3:], rtol=0, atol=1e-13)
