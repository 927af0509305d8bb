"""Sketches against exact inner products and their stated variance; principal axes against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.decomposition import PCA
from torch import nn

import curvelora
from curvelora.errors import UserError
from curvelora_eval.lab.path import Sketcher, pca_paths
from curvelora_eval.lab.updates import adapted_layers, factors

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"v_proj": nn.Linear(9, 5), "q_proj": nn.Linear(13, 7)})


def adapted(config: object) -> nn.Module:
    """A model with the same factors whatever the method is."""
    model = get_peft_model(net(), config)
    for seed, (_, layer) in enumerate(sorted(adapted_layers(model).items())):
        for i, factor in enumerate(factors(layer)):
            factor.copy_(0.3 * draw(*factor.shape, seed=10 * seed + i))
    return model


def test_inner_products_are_kept_in_expectation_with_the_stated_variance():
    p, seeds = 4, 2000
    X, Z = draw(11, 3, seed=1) @ draw(3, 7, seed=2), draw(11, 7, seed=3)
    sketches = [torch.stack([s.sketch({"q": M}) for M in (X, Z)]) for s in (Sketcher(seed, p) for seed in range(seeds))]
    grams = torch.stack([s @ s.T for s in sketches])
    exact = torch.stack([X.flatten(), Z.flatten()])
    exact = exact @ exact.T
    error = (grams.mean(0) - exact).abs()
    assert (error <= 4 * grams.std(0) / math.sqrt(seeds)).all()
    # the tolerance means something: it is a tenth of what is measured
    assert (4 * grams.std(0) / math.sqrt(seeds)).diagonal().div(exact.diagonal()).max() < 0.1

    G = X.T @ X
    rho = (G.square().sum() / G.trace() ** 2).item()
    stated = (2 / p) * ((2 + 1 / p) * rho + 1 / p)
    found = (grams[:, 0, 0].var() / exact[0, 0] ** 2).item()
    assert found == pytest.approx(stated, rel=0.25) and stated < 0.75 * (2 / p) * (2 + 2 / p)
    bound = (2 / p) * (2 + 2 / p) * exact[0, 0] * exact[1, 1]
    assert grams[:, 0, 1].var() <= bound


def test_a_large_sketch_over_many_layers_has_the_exact_gram_matrix():
    updates = [{f"layers.{i}.q": draw(30, 40, seed=100 * k + i) for i in range(12)} for k in range(3)]
    sketched = torch.stack([Sketcher(size=64).sketch(u) for u in updates])
    whole = torch.stack([torch.cat([u[n].flatten() for n in sorted(u)]) for u in updates])
    scale = whole.norm(dim=1)
    difference = (sketched @ sketched.T - whole @ whole.T) / torch.outer(scale, scale)
    assert sketched.shape == (3, 12 * 64 * 64) and difference.abs().max() < 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_factors_give_the_sketch_of_their_product(dtype, tolerance):
    A, B = draw(3, 13).to(dtype), draw(7, 3, seed=1).to(dtype)
    one, other = Sketcher().sketch({"q": (A, B)}), Sketcher().sketch({"q": B.double() @ A.double()})
    assert one.dtype == torch.float64 and one.shape == (256,)
    assert (one - other).norm() <= tolerance * other.norm()


def test_a_sketch_by_hand():
    P, Q = Sketcher(3, 5).projections("q", 7, 13)
    update = draw(7, 13)
    assert P.shape == (5, 7) and Q.shape == (13, 5)
    expected = np.einsum("ia,ab,bj->ij", P.numpy(), update.numpy(), Q.numpy())
    assert np.allclose(Sketcher(3, 5).sketch({"q": update}).reshape(5, 5).numpy(), expected, rtol=0, atol=1e-13)


def test_projections_depend_on_seed_name_and_shape_alone():
    P, Q = Sketcher(1).projections("q", 7, 13)
    torch.manual_seed(5)
    again = Sketcher(1).projections("q", 7, 13)
    assert torch.equal(P, again[0]) and torch.equal(Q, again[1])
    for other in (Sketcher(2).projections("q", 7, 13), Sketcher(1).projections("v", 7, 13)):
        assert not torch.isclose(P, other[0]).any()
    assert not torch.isclose(P, Sketcher(1).projections("q", 7, 14)[0]).any()


def test_models_of_other_arms_share_axes():
    lora = adapted(LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    options = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["v_proj", "q_proj"]}
    identity = adapted(curvelora.LoranConfig(activation="identity", **options))
    tanh = adapted(curvelora.LoranConfig(activation="tanh", **options))
    sketcher = Sketcher()
    one, two, three = (sketcher.sketch(model) for model in (lora, identity, tanh))
    assert (one - two).norm() < 1e-5 * one.norm() < 1e-2 * (one - three).norm()
    # in the order of the names, the model's own being another one
    assert list(adapted_layers(lora)) == ["v_proj", "q_proj"]
    A, B = factors(adapted_layers(lora)["q_proj"])
    assert torch.allclose(one[:256], sketcher.sketch({"q_proj": (A, 2 * B)}))


def test_a_nonlinear_model_needs_inputs_and_is_sketched_by_its_best_linear_map():
    model = adapted(curvelora.RanloraConfig(r=2, target_modules=["q_proj"], dropout=0.0))
    with pytest.raises(ValueError, match="give inputs"):
        Sketcher().sketch(model)
    small = 1e-3 * draw(200, 13)
    layer = adapted_layers(model)["q_proj"]
    A, B = (t.double() for t in factors(layer))
    A0, B0 = (t.double() for t in layer.removed("default"))
    # s gelu(z) = z for small z, s = 2
    expected = Sketcher().sketch({"q_proj": B @ A - B0 @ A0})
    found = Sketcher().sketch(model, {"q_proj": small.float()})
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_no_layer_and_no_size():
    with pytest.raises(UserError, match="no adapted layer"):
        Sketcher().sketch(net())
    with pytest.raises(UserError, match="at least 1 row"):
        Sketcher(size=0)


def noisy_paths() -> dict[tuple[str, int], tuple[list[int], torch.Tensor]]:
    plane = draw(2, 50)
    paths = {}
    for i, length in enumerate((7, 5)):
        t = torch.linspace(0, 1, length, dtype=torch.float64)[:, None]
        way = torch.cat([(1 + i) * t, (1 - 2 * i) * t**2], 1) @ plane
        paths["arm", i] = list(range(0, 10 * length, 10)), way + 0.01 * draw(length, 50, seed=i)
    return paths


def test_axes_and_shares_are_those_of_scikit_learn():
    paths = noisy_paths()
    found = pca_paths(paths, components=3)
    stacked = torch.cat([snapshots for _, snapshots in paths.values()]).numpy()
    # a set and its negatives have mean zero, so that PCA, which centres, looks from dW = 0
    reference = PCA(3, svd_solver="full").fit(np.concatenate([stacked, -stacked]))
    assert np.allclose(found["explained"], reference.explained_variance_ratio_, rtol=1e-10)
    expected = stacked @ reference.components_.T
    rows = np.array([row for run in paths for row in found["paths"][run]])
    assert rows[:, 0].tolist() == [*range(0, 70, 10), *range(0, 50, 10)]
    assert np.allclose(np.abs(rows[:, 1:]), np.abs(expected), rtol=0, atol=1e-10)
    ratios = rows[:, 1:] / expected
    assert np.allclose(ratios, np.sign(ratios[0]))


def test_the_largest_coordinate_is_positive_so_that_the_picture_is_the_same():
    paths = noisy_paths()
    found = pca_paths(paths)
    turned = pca_paths({run: (steps, -snapshots) for run, (steps, snapshots) in paths.items()})
    for run in paths:
        assert np.allclose(found["paths"][run], turned["paths"][run])
    rows = np.array([row[1:] for run in paths for row in found["paths"][run]])
    assert (rows[np.abs(rows).argmax(0), [0, 1]] > 0).all()


def test_a_path_in_a_plane_keeps_its_lengths():
    way = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    basis = torch.linalg.qr(draw(30, 2)).Q.T
    found = pca_paths({"a": ([0, 5, 10], way @ basis)})
    assert sum(found["explained"]) == pytest.approx(1, abs=1e-12)
    rows = torch.tensor(found["paths"]["a"], dtype=torch.float64)
    assert torch.allclose(torch.cdist(rows[:, 1:], rows[:, 1:]), torch.cdist(way, way))
    assert rows[0].tolist() == pytest.approx([0, 0, 0], abs=1e-14)


def test_one_dimension_zero_and_diverged_snapshots():
    line = torch.tensor([[0.0], [1.0], [math.nan], [3.0]]) * torch.tensor([[0.6, 0.8]])
    found = pca_paths({"a": ([0, 1, 2, 3], line)}, components=3)
    assert found["explained"] == pytest.approx([1, 0, 0], abs=1e-6)
    assert np.allclose(found["paths"]["a"], [[0, 0, 0, 0], [1, 1, 0, 0], [3, 3, 0, 0]], atol=1e-6)
    nothing = pca_paths({"a": ([0, 1], torch.zeros(2, 4)), "b": ([0], torch.full((1, 4), math.inf))})
    assert nothing == {"explained": [0.0, 0.0], "paths": {"a": [[0, 0.0, 0.0], [1, 0.0, 0.0]], "b": []}}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({}, "no path"),
        ({"a": ([0], torch.ones(1, 4)), "b": ([0], torch.ones(1, 5))}, "different lengths"),
        ({"a": ([0, 1, 2], torch.ones(2, 4))}, "3 steps for 2 snapshots"),
    ],
)
def test_bad_paths(paths, message):
    with pytest.raises(UserError, match=message):
        pca_paths(paths)
