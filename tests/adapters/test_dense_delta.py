"""Weight-space layer: forward and all gradients against plain autograd in fp64, written from h = W0 x + b + dW x."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from curvelora.activations import NAMES, Activation
from curvelora.layers import dense_delta
from curvelora.layers.dense_delta import DeltaMap, dense_delta_product

# (d_in, d_out, r): odd sizes on purpose, wide and tall, so that no transposition and no multiple of 8 can hide an error
SHAPES = [(37, 53, 3), (64, 17, 5), (11, 29, 1)]


def relative(error: torch.Tensor, reference: torch.Tensor) -> float:
    return (error.double().norm() / reference.double().norm()).item()


def random_batch(d_in: int, d_out: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 5, d_in, generator=generator, dtype=dtype)
    return x, torch.randn(2, 5, d_out, generator=generator, dtype=dtype)


@pytest.mark.parametrize("position", ["outside", "inside"])
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp64_matches_plain_autograd(loran_layer, run_adapter, plain_adapter, shape, activation, position):
    d_in, d_out, r = shape
    layer = loran_layer(
        d_in, d_out, r=r, alpha=7.0, activation=activation, scale_position=position, dtype=torch.float64
    )
    x, grad = random_batch(d_in, d_out, torch.float64)
    ours, reference = run_adapter(layer, x, grad), plain_adapter(layer, x, grad)
    for name, expected in reference.items():
        assert relative(ours[name] - expected, expected) < 1e-10, name


# Sinter and cos turn rounding of u into phase (w u: up to 1e3 rad here, times 6e-8); cos multiplies f' by that phase.
@pytest.mark.parametrize(("activation", "bound"), [(n, 2e-3 if n == "cos" else 1e-5) for n in NAMES])
@pytest.mark.parametrize("position", ["outside", "inside"])
def test_fp32_is_near_the_fp64_reference(loran_layer, run_adapter, plain_adapter, activation, position, bound):
    layer = loran_layer(37, 53, r=3, alpha=7.0, activation=activation, scale_position=position)
    x, grad = random_batch(37, 53, torch.float32)
    ours, reference = run_adapter(layer, x, grad), plain_adapter(layer, x, grad)
    for name, expected in reference.items():
        assert ours[name].dtype == torch.float32
        assert relative(ours[name] - expected, expected) < bound, name


@pytest.mark.parametrize("position", [False, True])
def test_gradcheck(position):
    """Finite differences, so the reference is no formula at all; w = 5 because 1e4 is too fast for them."""
    torch.manual_seed(0)
    x, A, B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(4, 7), (2, 7), (5, 2)])
    delta_map = DeltaMap(Activation("sinter", amplitude=0.3, frequency=5.0), 1.7, position)
    assert torch.autograd.gradcheck(lambda *t: dense_delta_product(*t, delta_map), (x, A, B))


@pytest.mark.parametrize("frozen", ["x", "A", "B", "factors"])
def test_gradients_that_nobody_wants_change_nothing(loran_layer, plain_adapter, frozen):
    layer = loran_layer(37, 53, r=3)
    x, grad = random_batch(37, 53, torch.float32)
    expected = plain_adapter(layer, x, grad)
    A, B = layer.factors("default")
    leaves = {"x": x.requires_grad_(), "A": A, "B": B}
    for name in {"factors": ["A", "B"]}.get(frozen, [frozen]):
        leaves.pop(name).requires_grad_(False)
    gradients = torch.autograd.grad(layer(x), list(leaves.values()), grad)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert relative(gradient - expected[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("entries", [1, 40, 500])
def test_the_size_of_a_block_does_not_matter(loran_layer, run_adapter, monkeypatch, entries):
    """Only rounding changes, of u as well: BLAS picks its kernel by the number of rows, so not even dW is bit-equal."""
    layer = loran_layer(37, 53, r=3, amplitude=2e-2)
    x, grad = random_batch(37, 53, torch.float32)
    whole = run_adapter(layer, x, grad)
    monkeypatch.setattr(dense_delta, "BLOCK_ENTRIES", entries)
    blocked = run_adapter(layer, x, grad)
    for name in whole:
        assert relative(blocked[name] - whole[name], whole[name]) < 2e-5, name


@pytest.mark.parametrize(("d_out", "d_in", "entries"), [(10, 4, 4), (10, 4, 12), (10, 4, 1), (1, 9, 100), (10, 4, 40)])
def test_row_blocks_cover_every_row_once(monkeypatch, d_out, d_in, entries):
    monkeypatch.setattr(dense_delta, "BLOCK_ENTRIES", entries)
    blocks = list(dense_delta.row_blocks(d_out, d_in))
    assert [i for b in blocks for i in range(b.start, b.stop)] == list(range(d_out))
    assert all((b.stop - b.start) * d_in <= entries or b.stop - b.start == 1 for b in blocks)


def test_relu_gets_no_gradient_from_a_zero_start(loran_layer, run_adapter):
    """BA = 0 and relu'(0) = 0: both factors receive exactly zero, for ever (methods.md, finding 4)."""
    x, grad = random_batch(37, 53, torch.float32)
    dead = run_adapter(loran_layer(37, 53, r=3, activation="relu", B_std=0.0), x, grad)
    assert dead["A"].abs().max() == 0 and dead["B"].abs().max() == 0
    alive = run_adapter(loran_layer(37, 53, r=3, activation="relu", B_std=0.02), x, grad)
    assert alive["A"].abs().max() > 0 and alive["B"].abs().max() > 0


@pytest.mark.parametrize("activation", [n for n in NAMES if n != "relu"])
def test_every_other_activation_trains_B_from_a_zero_start(loran_layer, run_adapter, activation):
    x, grad = random_batch(37, 53, torch.float32)
    first = run_adapter(loran_layer(37, 53, r=3, activation=activation, B_std=0.0), x, grad)
    assert first["B"].abs().max() > 0 and first["A"].abs().max() == 0


@pytest.mark.parametrize("activation", NAMES)
def test_a_zero_start_is_the_base_layer_except_for_sigmoid(loran_layer, activation):
    layer = loran_layer(37, 53, r=4, alpha=2, activation=activation, B_std=0.0)
    x, _ = random_batch(37, 53, torch.float32)
    if activation == "sigmoid":  # f(0) = 0.5: dW = s/2 in every entry
        shift = 0.5 * 0.5 * x.sum(-1, keepdim=True)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + shift)
        assert not torch.allclose(layer(x), layer.base_layer(x))
    else:
        assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_acts_on_the_adapter_path_only(loran_layer):
    layer = loran_layer(37, 53, r=3, dropout=0.5)
    x, _ = random_batch(37, 53, torch.float32)
    torch.manual_seed(3)
    trained = layer.train()(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5, training=True)
    expected = layer.base_layer(x) + F.linear(dropped, layer.delta_weight("default"))
    assert not torch.equal(dropped, x)
    torch.testing.assert_close(trained, expected)


def test_dropout_is_off_in_eval(loran_layer):
    layer = loran_layer(37, 53, r=3, dropout=0.5).eval()
    x, _ = random_batch(37, 53, torch.float32)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + F.linear(x, layer.delta_weight("default")))
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("position", ["outside", "inside"])
def test_delta_weight_is_what_the_layer_adds(loran_layer, plain_delta_weight, position):
    layer = loran_layer(37, 53, r=3, alpha=7, amplitude=2e-2, scale_position=position)
    A, B = (factor.double() for factor in layer.factors("default"))
    delta = layer.delta_weight("default")
    assert delta.shape == (53, 37) and delta.dtype == torch.float32
    expected = plain_delta_weight(A, B, layer.configs["default"])
    assert relative(delta - expected, expected) < 1e-5
    eye = torch.eye(37)
    torch.testing.assert_close(layer(eye) - layer.base_layer(eye), delta.T, rtol=0, atol=1e-6)


def test_torch_compile_computes_the_same(loran_layer, run_adapter):
    """Bit for bit: the evaluation of f is never traced, so no compiler reorders it (the price is a graph break)."""
    layer = loran_layer(37, 53, r=3, amplitude=2e-2)
    x, grad = random_batch(37, 53, torch.float32)
    expected = run_adapter(layer, x, grad)
    compiled = torch.compile(layer.forward, backend="aot_eager")
    found = x.detach().clone().requires_grad_()
    y = compiled(found)
    gradients = torch.autograd.grad(y, (found, *layer.factors("default")), grad)
    assert torch.equal(y, expected["output"])
    assert all(torch.equal(g, expected[name]) for g, name in zip(gradients, ("x", "A", "B"), strict=True))
