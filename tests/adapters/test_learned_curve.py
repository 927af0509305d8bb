"""LoRAN with amplitudes and frequencies that train: values and gradients against plain autograd in fp64, memory, merging."""

from __future__ import annotations

import pytest
import torch
from inside_operators import InsideOperators
from peft import PeftModel, get_peft_model
from torch.nn import functional as F

from curvelora import LoranConfig, UserError, measure_resolvability, model_resolvability
from curvelora.layers import dense_delta
from curvelora.layers.dense_delta import DeltaMap, dense_delta_product
from curvelora.reference_path import reference_path
from curvelora.series import Series
from curvelora_eval.lab.presence import measure_presence

SHAPES = [(37, 53, 3), (64, 17, 5), (11, 29, 1)]
KINDS = {
    "sinter": {"amplitude": 0.2, "frequency": 300.0},
    "fourier": {"amplitude": 0.2, "frequency": 100.0, "terms": 3},
    "chebyshev": {"amplitude": 0.2, "frequency": 40.0, "terms": 4},  # half of the entries are beyond the range
}
kinds = pytest.mark.parametrize("kind", KINDS)
granularities = pytest.mark.parametrize("granularity", ["layer", "row"])


@pytest.fixture
def learning(loran_layer):
    """-> build(kind, d_in, d_out, **options): a layer whose f has moved away from its start."""

    def build(kind: str, d_in: int = 37, d_out: int = 53, **options):
        dtype = options.pop("dtype", torch.float64)
        layer = loran_layer(
            d_in, d_out, **({"r": 3, "learn": "both", "activation": kind, "alpha": 7.0} | KINDS[kind] | options)
        )
        generator = torch.Generator().manual_seed(5)
        for theta in own_tensors(layer).values():
            theta.data.add_(0.3 * torch.randn(theta.shape, generator=generator))
        return layer.to(dtype)

    return build


def own_tensors(layer) -> dict[str, torch.Tensor]:
    """What trains besides A and B."""
    names = ("amplitude", "frequency")
    return {n: getattr(layer, f"loran_{n}")["default"] for n in names if "default" in getattr(layer, f"loran_{n}")}


def plain_delta(layer, A, B, theta) -> torch.Tensor:
    """dW in plain torch, differentiable; Chebyshev by hand for K = 4."""
    c, s = layer.configs["default"], layer.configs["default"].scale
    u = B @ A
    v = s * u if c.scale_position == "inside" else u
    z = c.frequency * (theta["frequency"].exp().reshape(-1, 1) if "frequency" in theta else 1.0) * v
    if c.activation == "sinter":
        a = c.amplitude * (theta["amplitude"].exp().reshape(-1, 1) if "amplitude" in theta else 1.0)
        f = a * v * torch.sin(z) + v
    else:
        start = torch.eye(c.terms, dtype=A.dtype)[0]
        a = c.amplitude * (theta["amplitude"] + start).reshape(-1, c.terms)
        t = z.clamp(-1, 1)
        if c.activation == "fourier":
            p = [torch.sin(k * z) for k in (1, 2, 3)]
        else:
            p = [t, 2 * t**2, 4 * t**3 - 3 * t, 8 * t**4 - 8 * t**2]  # T_k(t) - T_k(0)
        f = v + v * sum(a[:, k : k + 1] * p[k] for k in range(c.terms))
    return f if c.scale_position == "inside" else s * f


def both(layer, d_in: int, d_out: int):
    """({name: ours}, {name: plain}): output and gradients of x, A, B and the learned tensors."""
    generator = torch.Generator().manual_seed(7)
    dtype = layer.factors("default")[0].dtype
    x = torch.randn(2, 5, d_in, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, 5, d_out, generator=generator).to(dtype)
    leaves = dict(zip("xAB", (x, *layer.factors("default")), strict=True)) | own_tensors(layer)
    y = layer(x)
    ours = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True)) | {"y": y.detach()}
    fp64 = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    delta = plain_delta(layer, fp64["A"], fp64["B"], fp64)
    bias = layer.base_layer.bias.double()
    y = F.linear(fp64["x"], layer.base_layer.weight.double(), bias) + F.linear(fp64["x"], delta)
    found = torch.autograd.grad(y, list(fp64.values()), grad.double())
    return ours, dict(zip(fp64, found, strict=True)) | {"y": y.detach()}


def check(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], bound: float) -> None:
    for name, expected in plain.items():
        assert ours[name].shape == expected.shape, name
        error = (ours[name].double() - expected).norm() / expected.norm()
        assert expected.norm() > 0 and error < bound, (name, error)


@kinds
@granularities
@pytest.mark.parametrize("position", ["outside", "inside"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp64_matches_plain_autograd(learning, kind, granularity, position, shape):
    d_in, d_out, r = shape
    layer = learning(kind, d_in, d_out, r=r, granularity=granularity, scale_position=position)
    check(*both(layer, d_in, d_out), 1e-11)


@kinds
@granularities
def test_fp32_is_near_and_keeps_fp32(learning, kind, granularity):
    ours, plain = both(learning(kind, granularity=granularity, dtype=torch.float32), 37, 53)
    assert all(t.dtype == torch.float32 for t in ours.values())
    check(ours, plain, 1e-4)


@pytest.mark.parametrize("learn", ["amplitude", "frequency"])
@granularities
def test_one_of_the_two_alone(learning, learn, granularity):
    layer = learning("sinter", learn=learn, granularity=granularity)
    assert set(own_tensors(layer)) == {learn}
    check(*both(layer, 37, 53), 1e-11)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("inside", [False, True])
def test_gradcheck(name, rows, inside):
    """Finite differences, so the reference is no formula at all."""
    torch.manual_seed(0)
    shapes = [(4, 7), (2, 7), (5, 2), (rows, 1 if name == "sinter" else 3)]
    x, A, B, a = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)
    w = (0.5 + torch.rand(rows, 1, dtype=torch.float64)).requires_grad_()

    def product(x, A, B, a, w):
        return dense_delta_product(x, A, B, DeltaMap(Series(name, a, w), 1.7, inside))

    assert torch.autograd.gradcheck(product, (x, A, B, a, w))


@granularities
@pytest.mark.parametrize("entries", [1, 40, 500])
def test_the_size_of_a_block_does_not_matter(learning, granularity, entries, monkeypatch):
    monkeypatch.setattr(dense_delta, "BLOCK_ENTRIES", entries)
    check(*both(learning("fourier", granularity=granularity), 37, 53), 1e-11)


@pytest.mark.parametrize("frozen", ["A", "B", "factors", "curve", "x"])
def test_gradients_that_nobody_wants_change_nothing(learning, frozen):
    layer = learning("sinter")
    _, plain = both(layer, 37, 53)
    x = torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(7)).double()
    A, B = layer.factors("default")
    leaves = {"x": x.requires_grad_(), "A": A, "B": B} | own_tensors(layer)
    for name in {"factors": ["A", "B"], "curve": ["amplitude", "frequency"]}.get(frozen, [frozen]):
        leaves.pop(name).requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    torch.randn(2, 5, 37, generator=generator)
    grad = torch.randn(2, 5, 53, generator=generator).double()
    found = dict(zip(leaves, torch.autograd.grad(layer(x), list(leaves.values()), grad), strict=True))
    check(found, {name: plain[name] for name in leaves}, 1e-11)


@granularities
def test_at_the_start_it_is_the_fixed_sinter(loran_layer, granularity):
    fixed = loran_layer(37, 53, r=3, amplitude=2e-2)
    for options in ({}, {"activation": "fourier", "terms": 3}):
        free = loran_layer(37, 53, r=3, amplitude=2e-2, learn="both", granularity=granularity, **options)
        expected = fixed.delta_weight("default")
        torch.testing.assert_close(free.delta_weight("default"), expected, rtol=1e-5, atol=1e-9)


@kinds
@granularities
def test_no_tensor_of_the_size_of_the_weight_is_kept(learning, kind, granularity):
    """The graph saves x, A, B and f's own small tensors; the temporaries of both passes are gone afterwards."""
    layer = learning(kind, 96, 80, granularity=granularity, dtype=torch.float32)
    x = torch.randn(2, 5, 96, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.adapter_output("default", x).sum().backward()
    assert saved and max(t.numel() for t in saved) < 96 * 80
    assert all(theta.grad is not None and theta.grad.abs().max() > 0 for theta in own_tensors(layer).values())


class Largest(InsideOperators):
    """The largest fp32 tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def see(self, func, args, result):
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.entries = max(self.entries, tensor.numel())


@kinds
def test_fp32_temporaries_are_no_larger_than_a_block(learning, kind, monkeypatch):
    monkeypatch.setattr(dense_delta, "BLOCK_ENTRIES", 1024)
    layer = learning(kind, 96, 80, granularity="row", dtype=torch.float32)
    x = torch.randn(4, 96, requires_grad=True)
    with Largest() as largest:
        with torch.autocast("cpu", torch.bfloat16):
            adapter = layer.adapter_output("default", x)
        adapter.float().sum().backward()
    assert 0 < largest.entries <= 1024


@kinds
@granularities
def test_compiled_without_a_graph_break(learning, kind, granularity):
    layer = learning(kind, granularity=granularity, dtype=torch.float32)
    x = torch.randn(3, 37)
    tensors = [*layer.factors("default"), *own_tensors(layer).values()]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(f(x).square().sum(), tensors) for f in (layer, compiled))
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@kinds
@granularities
def test_saved_loaded_and_merged(llama, token_ids, kind, granularity, tmp_path):
    options = KINDS[kind] | {"r": 3, "dropout": 0.0, "learn": "both", "granularity": granularity, "init_B_std": 0.02}
    model = get_peft_model(llama(), LoranConfig(activation=kind, target_modules=["q_proj", "v_proj"], **options))
    for name, parameter in model.named_parameters():
        if "loran_amplitude" in name or "loran_frequency" in name:
            parameter.data.add_(0.3)
    expected = model.eval()(token_ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(token_ids).logits, expected)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(token_ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_resolvability_and_presence_see_the_learned_values(learning):
    layer = learning("sinter", 64, 64, granularity="row", dtype=torch.float32)
    model = torch.nn.Sequential(layer)
    before = model_resolvability(model, torch.bfloat16)["0"]
    layer.loran_amplitude["default"].data[:32] = -30.0  # half of the rows are LoRA's
    after = model_resolvability(model, torch.bfloat16)["0"]
    assert after.forward == pytest.approx(before.forward / 2, rel=0.1)
    halves = [
        measure_resolvability(A, B, layer.delta_map("default").rows(rows), torch.bfloat16)
        for rows in (slice(0, 32), slice(32, 64))
        for A, B in [(layer.factors("default")[0], layer.factors("default")[1][rows])]
    ]
    assert halves[0].forward == 0 and halves[1].forward > 0.8
    sampled = model_resolvability(model, torch.bfloat16, max_entries_per_layer=16 * 64)["0"]
    assert sampled.forward == pytest.approx(after.forward, rel=0.2)

    slow = measure_presence(model, {}, torch.bfloat16, max_entries=16 * 64)["0"]
    layer.loran_frequency["default"].data.add_(1.0)
    fast = measure_presence(model, {}, torch.bfloat16, max_entries=16 * 64)["0"]
    assert fast["phase"]["p50"] / slow["phase"]["p50"] == pytest.approx(torch.e, rel=1e-4)


@kinds
def test_the_reference_path_differentiates_twice(learning, kind):
    layer = learning(kind, dtype=torch.float32)
    x = torch.randn(3, 37)
    tensors = list(own_tensors(layer).values())
    expected = torch.autograd.grad(layer(x).square().sum(), tensors)
    with reference_path(torch.nn.Sequential(layer)):
        found = torch.autograd.grad(layer(x).square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in found), tensors)
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-5)
    assert all(torch.isfinite(h).all() and h.abs().max() > 0 for h in second)


@granularities
def test_adam_finds_amplitude_and_frequency(loran_layer, granularity):
    """With one learning rate for both, although a0 and w0 differ by a factor of 100.

    A row in which w u is small determines the product a w only (a u sin(w u) ~ a w u^2), so there dW is compared instead.
    """
    options = {"r": 3, "alpha": 3, "B_std": 0.5, "activation": "sinter"}
    target = loran_layer(37, 53, amplitude=0.13, frequency=11.0, **options).delta_weight("default").detach()
    layer = loran_layer(37, 53, amplitude=0.1, frequency=10.0, learn="both", granularity=granularity, **options)
    before = (layer.delta_weight("default").detach() - target).norm()
    optimizer = torch.optim.Adam(own_tensors(layer).values(), lr=1e-2)
    x = torch.eye(37)
    for _ in range(300):
        optimizer.zero_grad()
        (layer.adapter_output("default", x) - target.T).square().sum().backward()
        optimizer.step()
    assert (layer.delta_weight("default").detach() - target).norm() < 0.02 * before
    if granularity == "row":
        return
    f = layer.delta_map("default").activation
    torch.testing.assert_close(f.amplitude, torch.full_like(f.amplitude, 0.13), rtol=2e-2, atol=0)
    torch.testing.assert_close(f.frequency, torch.full_like(f.frequency, 11.0), rtol=5e-3, atol=0)


def test_the_fixed_curve_still_takes_the_operator_without_tensors(loran_layer):
    layer = loran_layer(37, 53, r=3)
    assert not own_tensors(layer) and not isinstance(layer.delta_map("default").activation, Series)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learn": "amplitud"}, "learn must be one of none, amplitude.*did you mean 'amplitude'"),
        ({"learn": "both", "activation": "tanh"}, "needs one of sinter, fourier, chebyshev, not activation tanh"),
        ({"learn": "amplitude", "amplitude": 0}, "amplitude 0 leaves nothing to learn"),
        ({"learn": "both", "granularity": "column"}, "granularity must be one of layer, row"),
        ({"granularity": "row"}, "write learn: amplitude, frequency or both"),
        ({"terms": 2}, "terms 2 needs activation fourier or chebyshev"),
        ({"terms": 0}, "terms must be a whole number of at least 1, not 0"),
        ({"activation": "fourier"}, "fourier has coefficients to learn"),
        ({"activation": "chebyshev", "learn": "frequency"}, "chebyshev has coefficients to learn"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        LoranConfig(**options)
