"""Weight-space layer: u and f in fp32 whatever the surroundings are, and f's own contribution measured against fp64.

At the published setting f adds 3.5e-5 of dW. A test of the whole output passes without f; these look at the difference
between the Sinter arm and the identity arm, which is all that f adds.
"""

from __future__ import annotations

import math

import pytest
import torch
from inside_operators import InsideOperators

from curvelora.activations import Activation
from curvelora.precision import exact_products

D_IN, D_OUT, R = 96, 80, 8


def draw_factors(std_u: float):
    """A (r, d_in), B (d_out, r) with std(BA) = std_u."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(R, D_IN, generator=generator)
    return A, torch.randn(D_OUT, R, generator=generator) * std_u / math.sqrt(R)


def contribution(loran_layer, run, std_u: float, amplitude: float, position: str) -> dict[str, torch.Tensor]:
    """Sinter arm minus identity arm: output and gradients. W0 = 0, so that W0 x does not drown the difference."""
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(40, D_IN, generator=generator), torch.randn(40, D_OUT, generator=generator)
    arms = []
    for activation in ("sinter", "identity"):
        options = dict(r=R, alpha=16, activation=activation, amplitude=amplitude, scale_position=position)
        layer = loran_layer(D_IN, D_OUT, bias=False, **options)
        layer.base_layer.weight.data.zero_()
        for factor, value in zip(layer.factors("default"), draw_factors(std_u), strict=True):
            factor.data.copy_(value)
        arms.append(run(layer, x, grad))
    return {name: arms[0][name].double() - arms[1][name].double() for name in ("output", "x", "A", "B")}


def errors(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: ((ours[name] - value).norm() / value.norm()).item() for name, value in reference.items()}


# Bounds: three times the largest error measured (7.1e-3 on output and x, 5.5e-4 on A and B; 3.3e-5 at amplitude 2e-2).
@pytest.mark.parametrize("position", ["outside", "inside"])
@pytest.mark.parametrize("std_u", [1e-3, 1e-2])
@pytest.mark.parametrize(("amplitude", "on_products", "on_factors"), [(5e-5, 2.1e-2, 1.7e-3), (2e-2, 1e-4, 1e-4)])
def test_what_f_adds_is_right(
    loran_layer, run_adapter, plain_adapter, std_u, amplitude, position, on_products, on_factors
):
    case = (std_u, amplitude, position)
    found = errors(contribution(loran_layer, run_adapter, *case), contribution(loran_layer, plain_adapter, *case))
    assert max(found["output"], found["x"]) < on_products, found
    assert max(found["A"], found["B"]) < on_factors, found


def test_that_measure_is_one_where_f_is_missing(loran_layer, run_adapter, plain_adapter, monkeypatch):
    """Delete f from the layer and the relative error is 1.0 exactly, far above the bounds of the test above."""
    case = (1e-2, 5e-5, "outside")
    reference = contribution(loran_layer, plain_adapter, *case)
    monkeypatch.setattr(Activation, "value", lambda self, u: u)
    monkeypatch.setattr(Activation, "slope", lambda self, u: torch.ones_like(u))
    assert errors(contribution(loran_layer, run_adapter, *case), reference) == dict.fromkeys(reference, 1.0)


def test_autocast_changes_the_product_but_not_the_evaluation(loran_layer):
    """dW, read off the layer under bf16 autocast (one-hot rows make the product exact), is the fp32 dW rounded once."""
    layer = loran_layer(D_IN, D_OUT, r=R, alpha=16, amplitude=2e-2)
    A, B = draw_factors(1e-2)
    for factor, value in zip(layer.factors("default"), (A, B), strict=True):
        factor.data.copy_(value)
    with torch.autocast("cpu", torch.bfloat16):
        used = layer.adapter_output("default", torch.eye(D_IN)).detach().T
    assert used.dtype == torch.bfloat16
    u = B @ A
    in_fp32 = 2.0 * (2e-2 * u * torch.sin(1e4 * u) + u)
    assert torch.equal(used, in_fp32.to(torch.bfloat16))

    # what bf16 factors would have done instead: 0.2 rad of phase (rms), and another dW
    u_16 = (B.bfloat16().double() @ A.bfloat16().double()).float()
    phase_error = 1e4 * (u_16 - u).double()
    assert 0.1 < phase_error.square().mean().sqrt() < 0.5
    from_bf16 = 2.0 * (2e-2 * u_16 * torch.sin(1e4 * u_16) + u_16)
    assert (from_bf16.to(torch.bfloat16) != used).float().mean() > 0.2


def test_gradients_under_autocast_use_the_fp32_slope(loran_layer, run_adapter, plain_adapter):
    """bf16 rounds x, g and g^T x (relative 4e-3 each), but not f', which would be off by far more at this frequency."""
    layer = loran_layer(D_IN, D_OUT, r=R, alpha=16, amplitude=2e-2)
    for factor, value in zip(layer.factors("default"), draw_factors(1e-2), strict=True):
        factor.data.copy_(value)
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    grad = torch.randn(40, D_OUT, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    reference = plain_adapter(layer, x, grad)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run_adapter(layer, x, grad)
    for name in ("A", "B"):
        assert ours[name].dtype == torch.float32
        assert (ours[name] - reference[name]).norm() / reference[name].norm() < 1e-2, name


@pytest.mark.parametrize("inside_autocast", [False, True])
def test_backward_inside_autocast_is_the_same(loran_layer, run_adapter, inside_autocast):
    """An fp32 forward pass whose backward is called under autocast still multiplies in fp32."""
    layer = loran_layer(D_IN, D_OUT, r=R)
    generator = torch.Generator().manual_seed(3)
    x, grad = torch.randn(9, D_IN, generator=generator), torch.randn(9, D_OUT, generator=generator)
    expected = run_adapter(layer, x, grad)
    A, B = layer.factors("default")
    y = layer.adapter_output("default", x.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=inside_autocast):
        gradients = torch.autograd.grad(y, (A, B), grad)
    assert torch.equal(gradients[0], expected["A"]) and torch.equal(gradients[1], expected["B"])


@pytest.fixture
def low_precision_products():
    """fp32 products done in bf16 by the CPU's library: what TF32 is on a GPU, and a global setting of users as well."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    yield backend
    backend.fp32_precision = before


class PrecisionOfProducts(InsideOperators):
    """Notes the global precision setting at every fp32 matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: list[str] = []

    def see(self, func, args, result):
        products = (torch.ops.aten.matmul, torch.ops.aten.mm, torch.ops.aten.addmm)
        if func.overloadpacket in products and args[-1].dtype == torch.float32:
            self.settings.append(torch.backends.mkldnn.matmul.fp32_precision)


def test_a_global_low_precision_setting_does_not_reach_f(loran_layer, low_precision_products):
    """Of the settings, not of the numbers, because many CPUs (this library's choice) ignore them.

    Under bf16 autocast the only fp32 products are the adapter's: u in both passes, M A^T and B^T M.
    """
    layer = loran_layer(D_IN, D_OUT, r=R)
    x = torch.randn(4, D_IN, requires_grad=True)
    with PrecisionOfProducts() as products:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.adapter_output("default", x)
        y.sum().backward()
    assert products.settings == ["ieee"] * 4
    assert low_precision_products.fp32_precision == "bf16", "the user's setting is restored"


def test_the_setting_is_restored_after_both_passes_and_after_an_error(loran_layer, run_adapter, low_precision_products):
    run_adapter(loran_layer(D_IN, D_OUT, r=R), torch.randn(4, D_IN), torch.randn(4, D_OUT))
    assert low_precision_products.fp32_precision == "bf16"

    def fails_on_the_way():
        with exact_products(torch.device("cpu")):
            assert low_precision_products.fp32_precision == "ieee"
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fails_on_the_way()
    assert low_precision_products.fp32_precision == "bf16"


def test_autocast_is_off_inside_exact_products():
    a = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with exact_products(torch.device("cpu")):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_factors_in_bf16_are_still_evaluated_in_fp32(loran_layer):
    """model.to(bfloat16) rounds the factors; what follows is not rounded a second time."""
    layer = loran_layer(D_IN, D_OUT, r=R, alpha=16, amplitude=2e-2).to(torch.bfloat16)
    A, B = layer.factors("default")
    u = B.float() @ A.float()
    torch.testing.assert_close(
        layer.delta_weight("default"), 2.0 * (2e-2 * u * torch.sin(1e4 * u) + u), rtol=1e-6, atol=0
    )
    assert layer(torch.randn(3, D_IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
