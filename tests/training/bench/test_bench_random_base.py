"""Random bases: packed codes and scales must be what quantising a Gaussian weight gives, in the very layout of bitsandbytes."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from curvelora_training.bench.adapted import arm_model
from curvelora_training.bench.arms import named_arm
from curvelora_training.bench.random_base import STD, nf4_byte_table, random_nf4_linear
from curvelora_training.bench.shapes import SHAPES, shape_config

CPU = torch.device("cpu")
D_IN, D_OUT = 1024, 512


@pytest.fixture(scope="module")
def drawn() -> bnb.nn.Linear4bit:
    """A layer as the lab draws it."""
    return random_nf4_linear(D_IN, D_OUT, torch.float32, nf4_byte_table(CPU), torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def quantised() -> bnb.nn.Linear4bit:
    """A layer of N(0, STD^2) weights that bitsandbytes itself has quantised."""
    weight = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(2)) * STD
    layer = bnb.nn.Linear4bit(D_IN, D_OUT, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cpu")


def codes(layer: bnb.nn.Linear4bit) -> torch.Tensor:
    """The NF4 codes two by two: (entries / 2, 2)."""
    packed = layer.weight.data.flatten()
    return torch.stack([packed >> 4, packed & 15], 1).long()


def scales(layer: bnb.nn.Linear4bit) -> torch.Tensor:
    """The scale of every block of 64, after double quantisation."""
    state = layer.weight.quant_state
    return dequantize_blockwise(state.absmax, state.state2) + state.offset


def test_codes_are_as_frequent_as_in_a_quantised_gaussian(drawn, quantised):
    for side in (0, 1):
        ours, theirs = (
            torch.bincount(codes(layer)[:, side], minlength=16) / (D_IN * D_OUT / 2) for layer in (drawn, quantised)
        )
        assert theirs.min() > 0.005
        torch.testing.assert_close(ours, theirs, atol=0.004, rtol=0)  # five standard errors of a share of 0.1


def test_neighbouring_codes_are_independent(drawn):
    pairs = torch.bincount(drawn.weight.data.flatten().long(), minlength=256).view(16, 16).double()
    joint = pairs / pairs.sum()
    torch.testing.assert_close(joint, torch.outer(joint.sum(1), joint.sum(0)), atol=6e-4, rtol=0)


def test_scales_are_distributed_as_the_largest_of_64_normals(drawn, quantised):
    shares = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    ours, theirs = (torch.quantile(scales(layer), shares) for layer in (drawn, quantised))
    torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0)
    assert 2.0 * STD < ours[3] < 2.8 * STD


def test_dequantised_weights_have_the_size_of_a_gaussian(drawn, quantised):
    ours, theirs = (dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in (drawn, quantised))
    assert theirs.std().item() == pytest.approx(STD, rel=0.01)
    # codes and scales are drawn independently; in a real block a large scale goes with small codes, hence 3.5 % more
    independent = (codes_squared(drawn) * scales(drawn).square().mean()) ** 0.5
    assert ours.std().item() == pytest.approx(independent.item(), rel=0.005)
    assert ours.std().item() == pytest.approx(STD, rel=0.045)
    assert abs(ours.mean().item() - theirs.mean().item()) < 0.01 * STD


def codes_squared(layer: bnb.nn.Linear4bit) -> torch.Tensor:
    """The mean square of the levels that the codes stand for."""
    return layer.weight.quant_state.code[codes(layer)].square().mean()


def test_memory_layout_is_bitsandbytes_own(drawn, quantised):
    ours, theirs = drawn.state_dict(), quantised.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items() if "bitsandbytes__" not in k} == {
        k: (v.shape, v.dtype) for k, v in theirs.items() if "bitsandbytes__" not in k
    }
    assert ours.keys() == theirs.keys() and any("bitsandbytes__" in k for k in ours)
    a, b = drawn.weight.quant_state, quantised.weight.quant_state
    for name in ("shape", "dtype", "blocksize", "quant_type", "nested"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.state2.blocksize, a.state2.absmax.shape) == (b.state2.blocksize, b.state2.absmax.shape)
    assert torch.equal(a.code, b.code) and torch.equal(a.state2.code, b.state2.code)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_forward_is_the_product_with_the_dequantised_weight(dtype, tolerance):
    layer = random_nf4_linear(64, 96, dtype, nf4_byte_table(CPU), torch.Generator().manual_seed(0))
    layer.support_avx512bf16_for_cpu = False
    x = torch.randn(5, 64)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert weight.shape == (96, 64) and weight.dtype == dtype
    expected = x.double() @ weight.double().T
    found = layer(x.to(dtype)).double()
    assert ((found - expected).norm() / expected.norm()).item() < tolerance


@pytest.mark.parametrize("stored", ["nf4", "bf16", "fp32"])
def test_a_base_is_whole_and_frozen(base, config, stored):
    model = base(stored)
    built = LlamaForCausalLM(config())
    dtype = torch.float32 if stored == "fp32" else torch.bfloat16
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert not any(p.requires_grad for p in model.parameters())
    buffers = dict(built.named_buffers())
    assert buffers and buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in built.named_parameters()]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            assert isinstance(module, bnb.nn.Linear4bit) == (stored == "nf4"), name
        elif name.endswith("norm"):
            assert torch.equal(module.weight, torch.ones(64, dtype=dtype))
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight.dtype == dtype
    assert model.lm_head.weight.float().std().item() == pytest.approx(STD, rel=0.05)
    assert model.config.dtype == dtype and not model.training


def test_a_base_is_the_same_each_time_and_other_layers_differ(base):
    one, two = (dict(base("nf4").named_parameters()) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    q = "model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(one[q.format(0)], one[q.format(1)])


def test_tied_embeddings_are_one_tensor(base):
    tied, untied = base("nf4", tie_word_embeddings=True), base("nf4")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("arm", ["qlora", "loran:sinter", "ranlora", "aurora"])
@pytest.mark.parametrize("stored", ["nf4", "bf16", "fp32"])
def test_adapters_train_on_it(base, options, batches, arm, stored):
    model = arm_model(base(stored), named_arm(arm), options, [], 0, random=True).train()
    half = stored != "fp32"
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(**batches[0]).loss
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(128.0).log().item(), abs=0.2)  # it knows nothing
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads.values())
    assert any(g.abs().max() > 0 for n, g in grads.items() if "_B." in n)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-1b", 1.236),
        ("llama2-7b", 6.738),
        ("llama2-13b", 13.016),
        ("llama2-70b", 68.977),
        ("llama3-8b", 8.030),
        ("llama3-70b", 70.554),
    ],
)
def test_built_in_shapes_have_their_published_sizes(name, billions):
    assert name in SHAPES
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    model.tie_weights()
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == pytest.approx(billions, abs=1e-9)
