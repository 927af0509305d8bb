"""Few tokens: shares that do not depend on their number, and layers with too few that do not stop a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from curvelora import RanloraConfig
from curvelora.methods.ranlora import RanloraLayer
from curvelora_eval.lab.path import Sketcher, pca_paths
from curvelora_eval.lab.presence import activation_space_presence
from curvelora_eval.lab.spectra import by_module_type, spectra
from curvelora_eval.lab.updates import adapted_layers, best_linear_map, factors, fit_correction

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapted(rank: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.ModuleDict({"q_proj": nn.Linear(13, 7), "v_proj": nn.Linear(9, 5)})
    model = get_peft_model(net, RanloraConfig(r=rank, target_modules=["q_proj", "v_proj"], dropout=0.0))
    for layer in adapted_layers(model).values():
        for i, factor in enumerate(factors(layer)):
            factor.copy_(0.3 * draw(*factor.shape, seed=i))
    return model


@pytest.mark.parametrize("tokens", [128, 256])
def test_the_share_does_not_depend_on_the_number_of_tokens(tokens):
    """gelu of z ~ N(0, I), r = 64: E g^2 - (E g)^2 - (E g z)^2 over E g^2, by quadrature, is what many tokens give."""
    z, weights = np.polynomial.hermite_e.hermegauss(120)
    g, weights = 0.5 * z * (1 + torch.erf(torch.from_numpy(z) / math.sqrt(2)).numpy()), weights / weights.sum()
    mean, slope, square = (weights @ v for v in (g, g * z, g * g))
    wanted = math.sqrt((square - mean**2 - slope**2) / square)
    layer = RanloraLayer(nn.Linear(64, 64), "layer")
    layer.add_adapter("default", RanloraConfig(r=64, init="K", use_v=False, target_modules=["layer"]))
    for factor in layer.eval().factors("default"):
        factor.data = torch.eye(64)
    many = activation_space_presence(layer, draw(16_384, 64))
    few = activation_space_presence(layer, draw(tokens, 64))
    for key in ("nonlinear_share", "nonlinear_share_bottleneck"):
        assert many[key] == pytest.approx(wanted, rel=0.01)
        assert few[key] == pytest.approx(many[key], rel=0.05)
    assert best_linear_map(layer, draw(tokens, 64)).residual == pytest.approx(few["nonlinear_share"], rel=1e-5)


def test_the_correction_needs_more_tokens_than_unknowns():
    assert fit_correction(10, 4) == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="5 tokens leave nothing of a fit with 5 unknowns"):
        fit_correction(5, 4)


def test_spectra_leave_out_a_layer_with_too_few_tokens():
    model = adapted(3)
    inputs = {"q_proj": draw(4, 13), "v_proj": draw(5, 9)}  # r + 2 = 5
    found = spectra(model, 3, inputs)
    assert found["q_proj"]["update"] is None and found["q_proj"]["linear_map"] is None
    assert found["q_proj"]["BA"]["spectral"] > 0
    assert found["v_proj"]["update"]["spectral"] > 0 and found["v_proj"]["linear_map"]["residual"] > 0
    uncalled = spectra(model, 3, {"v_proj": inputs["v_proj"]})
    assert uncalled == found
    means = by_module_type({"0.q_proj": found["q_proj"], "1.q_proj": found["q_proj"]})["q_proj"]
    assert means["update"] is None and means["layers"] == 2


def test_a_sketch_has_nan_for_a_layer_with_too_few_tokens():
    model = adapted(2)
    enough = {"q_proj": draw(4, 13), "v_proj": draw(4, 9)}  # r + 2 = 4
    whole = Sketcher(size=3).sketch(model, enough)
    assert torch.isfinite(whole).all()
    for few in (enough | {"v_proj": draw(3, 9)}, {"q_proj": enough["q_proj"]}):
        sketch = Sketcher(size=3).sketch(model, few)
        assert sketch.shape == (18,) and sketch[9:].isnan().all() and torch.equal(sketch[:9], whole[:9])
        assert pca_paths({"run": ([1, 2], torch.stack([whole, sketch]))})["paths"]["run"][-1][0] == 1
