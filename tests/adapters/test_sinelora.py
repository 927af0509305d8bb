"""SineLoRA: gradients against plain autograd in fp64, the gain of each layer's shape, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from curvelora import SineloraConfig, UserError, model_resolvability
from curvelora.methods.sinelora import SineloraLayer


def layer_of(d_in: int, d_out: int, **options) -> SineloraLayer:
    torch.manual_seed(0)
    layer = SineloraLayer(nn.Linear(d_in, d_out).requires_grad_(False), "layer")
    layer.add_adapter("default", SineloraConfig(**({"r": 3, "init_B_std": 0.05} | options)))
    return layer.double()


@pytest.mark.parametrize("options", [{}, {"gain": 7, "frequency": 30.0}, {"alpha": 6}], ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), [(37, 53), (64, 17), (11, 29)])
def test_fp64_matches_plain_autograd(d_in, d_out, options):
    layer = layer_of(d_in, d_out, **options)
    config, (A, B) = layer.configs["default"], layer.factors("default")
    x = torch.randn(2, 5, d_in, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, d_out, dtype=torch.float64)
    g = config.gain if config.gain != "sqrt" else math.sqrt(d_out)
    s = {"r": 1.0}.get(config.alpha, 2.0)
    delta = s * torch.sin(config.frequency * (B @ A)) / g
    plain = layer.base_layer(x) + x @ delta.T
    torch.testing.assert_close(layer(x), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.delta_weight("default"), delta, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(layer(x), (x, A, B), grad)
    for ours, expected in zip(found, torch.autograd.grad(plain, (x, A, B), grad), strict=True):
        assert (ours - expected).norm() < 1e-12 * expected.norm()


def test_the_gain_follows_each_layer_and_not_the_rank():
    slopes = {d: layer_of(8, d, r=r).delta_map("default").slope_at_zero for d, r in ((16, 2), (64, 8))}
    assert slopes == {16: 50.0, 64: 25.0}


def test_every_entry_is_bounded_and_resolved():
    """An update of the size of 1 / g, none of it lost in bf16, unlike Sinter's."""
    layer = layer_of(64, 64, frequency=400.0).float()
    assert layer.delta_weight("default").abs().max() <= 1 / 8
    measured = model_resolvability(nn.Sequential(layer), torch.bfloat16)["0"]
    assert measured.forward > 0.95 and measured.derivative > 0.95


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gain": 0}, "gain must be a positive number or sqrt"),
        ({"gain": "root"}, "not 'root'"),
        ({"frequency": -1}, "frequency must be a positive number, not -1"),
        ({"init_B_std": -1}, "init_B_std must be a non-negative number"),
        ({"alpha": "2r"}, "alpha must be a positive number, not '2r'"),
    ],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        SineloraConfig(**options)
