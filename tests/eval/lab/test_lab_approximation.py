"""Reduced-rank regression against brute force and another closed form; fits against Eckart and Young's bound."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from curvelora.errors import UserError
from curvelora_eval.lab.approximation import (
    BOUND_BY_RANK,
    KINDS,
    _fit,
    _start,
    approximation,
    best_linear,
    best_linear_error,
    fit_error,
)

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target(seed: int = 0) -> Tensor:
    return draw(9, 13, seed=seed) * torch.arange(1, 14) ** -0.5


def inputs(tokens: int = 80, seed: int = 5) -> Tensor:
    """Correlated, skewed and with heavy tails."""
    return torch.expm1(0.7 * draw(tokens, 13, seed=seed)) @ (torch.eye(13) + 0.3 * draw(13, 13, seed=seed + 1))


def error(D: Tensor, X: Tensor, M: Tensor) -> float:
    return (((D - M) @ X.T).norm() / (D @ X.T).norm()).item()


@pytest.mark.parametrize("tokens", [80, 7])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_best_linear_map_is_that_of_whitening(rank, tokens):
    """M = trunc(D C^1/2) C^-1/2 with C = X^T X, by scipy."""
    D, X = target(), inputs(tokens)
    root = scipy.linalg.sqrtm((X.T @ X).numpy()).real
    U, S, Vt = np.linalg.svd(D.numpy() @ root)
    expected = (U[:, :rank] * S[:rank]) @ Vt[:rank] @ np.linalg.pinv(root, rcond=1e-6)
    A, B = best_linear(D, X, rank)
    assert (A.shape, B.shape) == ((rank, 13), (9, rank))
    outputs = torch.from_numpy(expected) @ X.T
    assert ((B @ A) @ X.T - outputs).norm() < 1e-6 * outputs.norm()
    stated = np.linalg.norm(S[rank:]) / np.linalg.norm(S)
    assert best_linear_error(D, X, rank) == pytest.approx(stated, rel=1e-6)
    assert error(D, X, B @ A) == pytest.approx(stated, rel=1e-6)


def test_no_perturbation_is_better():
    D, X = target(), inputs()
    A, B = best_linear(D, X, 2)
    best = best_linear_error(D, X, 2)
    for seed in range(200):
        size = 10.0 ** -(seed % 5)
        step = size * draw(2, 13, seed=seed) * A.abs().mean(), size * draw(9, 2, seed=seed + 500) * B.abs().mean()
        assert error(D, X, (B + step[1]) @ (A + step[0])) > best


def test_on_white_inputs_it_is_the_truncated_svd():
    D = target()
    X = 2 * torch.linalg.qr(draw(40, 13)).Q
    U, S, Vt = torch.linalg.svd(D, full_matrices=False)
    A, B = best_linear(D, X, 3)
    assert torch.allclose(B @ A, (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-12)
    # and on others it is not
    A, B = best_linear(D, inputs(), 3)
    assert error(D, inputs(), B @ A) < 0.99 * error(D, inputs(), (U[:, :3] * S[:3]) @ Vt[:3])


def test_outputs_of_few_dimensions_are_reached_exactly():
    D = draw(9, 2) @ draw(2, 13)
    A, B = best_linear(D, inputs(), 4)
    assert error(D, inputs(), B @ A) < 1e-12 and best_linear_error(D, inputs(), 4) < 1e-12


def test_lora_reaches_the_optimum_and_never_beats_it():
    D, X = target(), inputs(60)
    floor = best_linear_error(D, X, 2)
    A, B = best_linear(D, X, 2)
    layer = _start("lora", A + 0.2 * draw(2, 13, seed=8), B + 0.2 * draw(9, 2, seed=9), X, {})
    found = _fit(layer, D, X, inputs(60, seed=6), steps=1500, lr=0.05)
    assert found["start"] > 1.05 * floor
    assert floor * (1 - 1e-12) <= found["fit"] < 1.001 * floor


@pytest.mark.parametrize("seed", [0, 1])
def test_no_bottleneck_beats_it_on_the_fitted_half_nor_the_floor_on_the_other(seed):
    """B m(A X^T) has rank r at most, whatever m is."""
    found = approximation(target(seed), inputs(seed=10 * seed), 3, BOUND_BY_RANK, steps=120)
    assert found.keys() == {"rank", "best_linear", *BOUND_BY_RANK} and found["rank"] == 3
    for kind in BOUND_BY_RANK:
        own, linear = found[kind], found["best_linear"]
        assert own["fit"] >= linear["fit"] * (1 - 1e-12) and own["held"] >= linear["floor_held"] * (1 - 1e-12)
        # they are fitted, and not merely started
        assert own["fit"] < 1.001 * linear["fit"] and own["beats_fit"] is False
        assert kind == "lora" or own["fit"] < own["start"]


def test_overfitting_is_visible():
    """12 tokens for 13 inputs: what is found on them says little about others."""
    found = fit_error("lora", target(), inputs(24), 4, steps=5)
    assert found["best_linear"]["held"] > 1.2 * found["best_linear"]["floor_held"]
    assert found["best_linear"]["held"] > 1.2 * found["best_linear"]["fit"]
    A, B = best_linear(target(), inputs(24)[:12], 4)
    assert found["best_linear"]["held"] == pytest.approx(error(target(), inputs(24)[12:], B @ A), rel=1e-12)


def test_a_weight_space_map_may_beat_it():
    D = torch.tanh(1.5 * draw(9, 2) @ draw(2, 13, seed=1))
    found = fit_error("loran", D, inputs(200), 2, steps=300, lr=0.03, options={"activation": "tanh"})
    own, linear = found["loran"], found["best_linear"]
    assert own["fit"] < 0.8 * linear["fit"] and own["beats_fit"] is True
    assert own["held"] < linear["floor_held"] and own["beats_held"] is True


def test_sinter_at_its_published_setting_is_the_linear_optimum():
    found = fit_error("loran", target(), inputs(), 3, steps=20)
    assert found["loran"]["fit"] == pytest.approx(found["best_linear"]["fit"], rel=1e-3)
    assert found["loran"]["beats_fit"] is False and found["loran"]["beats_held"] is False


@pytest.mark.parametrize(
    ("kind", "within", "options"),
    [
        ("lora", 1e-12, {}),
        ("lora", 1e-12, {"lora_alpha": 7}),
        ("loran", 1e-3, {}),
        ("loran", 1e-3, {"activation": "identity", "alpha": 7.0}),
        ("ranlora", 0.05, {}),
        ("ranlora", 0.05, {"activation": "tanh", "scale_position": "inside", "alpha": 7.0}),
        ("aurora", 0.05, {}),
        ("aurora", 0.05, {"alpha": 7.0, "learnable": False}),
    ],
)
def test_every_kind_starts_near_the_best_linear_map(kind, within, options):
    D, X = target(), inputs()
    A, B = best_linear(D, X, 2)
    layer = _start(kind, A, B, X, options)
    expected = X @ A.T @ B.T
    with torch.no_grad():
        distance = ((layer(X) - expected).norm() / expected.norm()).item()
    assert distance < within


def test_a_measured_error_is_the_layers_own():
    """In fp32, as it is used on real inputs."""
    D, X = target().float(), inputs().float()
    A, B = best_linear(D, X[:40], 2)
    layer = _start("aurora", A, B, X[:40], {})
    found = _fit(layer, D, X[:40], X[40:], steps=30, lr=0.03)
    for name, half in (("fit", X[:40]), ("held", X[40:])):
        with torch.no_grad():
            wanted = half @ D.T
            assert found[name] == pytest.approx(((layer(half) - wanted).norm() / wanted.norm()).item(), rel=1e-4)


def test_nothing_is_random_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = fit_error("aurora", target(), inputs(), 2, steps=10, options={"init_A": "xavier"})
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert fit_error("aurora", target(), inputs(), 2, steps=10) == one


def test_a_fit_that_diverges_keeps_its_best_state():
    found = fit_error("ranlora", target(), inputs(), 2, steps=30, lr=1e200)["ranlora"]
    assert found["fit"] <= found["start"] * (1 + 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lorann", target(), inputs(), 2), "did you mean 'loran'"),
        (("lora", target(), inputs()[:, :5], 2), "needs inputs"),
        (("lora", target(), inputs(), 10), "between 1 and 9"),
        (("lora", target(), inputs(), 0), "between 1 and 9"),
        (("lora", target(), inputs(7), 3), "more than 7 tokens"),
        (("lora", torch.zeros(9, 13), inputs(), 2), "zero or not finite"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        fit_error(*arguments)
    assert arguments[0] not in KINDS or KINDS.index(arguments[0]) == 0
