"""NEAT: PEFT's PEANuT in fp32, also on packed weights, without ever forming dW, and merged from the weight as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import PeanutConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from curvelora import METHODS, UserError
from curvelora.layers import weight_product
from curvelora.layers.weight_product import weight_blocks
from curvelora.methods.neat import NeatConfig, NeatLayer

IDS = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj", "down_proj"]
bnb = pytest.importorskip("bitsandbytes")


def layer_over(base: nn.Module, **options) -> NeatLayer:
    """One layer with an adapter that does something."""
    torch.manual_seed(0)
    layer = NeatLayer(base.requires_grad_(False), "layer")
    layer.add_adapter("default", NeatConfig(**({"r": 3} | options)))
    layer.neat_B["default"].data.normal_(std=0.1)
    return layer


def packed(kind: str, d_out: int, d_in: int) -> nn.Module:
    """A linear layer of bitsandbytes."""
    torch.manual_seed(0)
    plain = nn.Linear(d_in, d_out, bias=False)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.LinearNF4(d_in, d_out, bias=False, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(
            plain.weight.data,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=kind == "double",
            quant_storage=torch.bfloat16 if kind == "stored as bf16" else torch.uint8,
        )
    return layer.to("cpu")


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize(("alpha", "scaling"), [("r", 1.0), (2, 0.5)])
def test_equals_peft_s_peanut_in_training(llama, depth, alpha, scaling):
    """The same tensors, the same logits and gradients, and after three steps too; fp32."""
    options = dict(target_modules=TARGETS)
    ours = get_peft_model(llama(), METHODS["neat"].build_config(r=4, depth=depth, alpha=alpha, **options))
    theirs = get_peft_model(llama(), PeanutConfig(r=4, depth=depth, scaling=scaling, act_fn="relu", **options))
    for name, layer in ours.named_modules():
        if isinstance(layer, NeatLayer):
            twin = theirs.get_submodule(name)
            layer.neat_B["default"].data.normal_(std=0.02)
            twin.peanut_A["default"].weight.data = layer.neat_A["default"].data.clone()
            twin.peanut_B["default"].weight.data = layer.neat_B["default"].data.clone()
            for i in range(depth):
                twin.peanut_encoders["default"][i].weight.data = layer.neat_E["default"][i].data.clone()
                twin.peanut_decoders["default"][i].weight.data = layer.neat_D["default"][i].data.clone()

    def train(model: nn.Module) -> list[torch.Tensor]:
        optimizer, seen = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), []
        for _ in range(3):
            optimizer.zero_grad()
            output = model(IDS, labels=IDS)
            output.loss.backward()
            optimizer.step()
            seen.append(output.logits.detach())
        return seen

    for one, two in zip(train(ours), train(theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(48, 64), (130, 64), (64, 192), (1, 64), (7, 100), (33, 96)])
@pytest.mark.parametrize("kind", ["nf4", "double", "stored as bf16", "int8", "plain", "conv1d"])
def test_blocks_are_the_weight(shape, kind, monkeypatch):
    """One row, several blocks, a last one that is smaller; for 4 bits on a CPU see the next test."""
    if kind in ("nf4", "double", "stored as bf16") and shape[1] % 64:
        shape = (shape[0], 128)
    monkeypatch.setattr(weight_product, "BLOCK_ENTRIES", 700)
    d_out, d_in = shape
    if kind == "conv1d":
        base = Conv1D(d_out, d_in)
        wanted = base.weight.data.T
    elif kind == "plain":
        base = nn.Linear(d_in, d_out)
        wanted = base.weight.data
    else:
        from peft.utils.integrations import dequantize_bnb_weight

        base = packed(kind, d_out, d_in)
        wanted = dequantize_bnb_weight(base.weight, state=getattr(base, "state", None)).float()
    found = list(weight_blocks(base))
    assert len(found) > 1 or d_out * d_in <= 700 * 64
    assert [rows.start for rows, _ in found] == [0, *(rows.stop for rows, _ in found[:-1])]
    assert found[-1][0].stop == d_out
    torch.testing.assert_close(torch.cat([block.float() for _, block in found]), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(7, 100), (33, 96), (35, 160)])
def test_blocks_of_codes_that_end_inside_a_row(shape, monkeypatch):
    """bitsandbytes (0.50.2) dequantises such weights on a GPU only: on a CPU it takes the wrong scales for them."""
    monkeypatch.setattr(weight_product, "BLOCK_ENTRIES", 700)
    base = packed("double", *shape).to("cuda")
    wanted = bnb.functional.dequantize_4bit(base.weight.data, quant_state=base.weight.quant_state)
    found = torch.cat([block for _, block in weight_blocks(base)])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("depth", [0, 2])
def test_gradients_against_autograd_in_fp64(depth):
    torch.manual_seed(0)
    layer = layer_over(nn.Linear(37, 53), depth=depth, activation="tanh").double()
    x = torch.randn(5, 37, dtype=torch.float64)
    names = [name for name in ("neat_A", "neat_B", "neat_E", "neat_D") if "default" in getattr(layer, name)]
    tensors = {name: getattr(layer, name)["default"].detach().clone().requires_grad_() for name in names}
    z, skipped = torch.tanh(layer.base_layer.weight.T @ tensors["neat_A"].T), []
    for E in tensors.get("neat_E", []):
        skipped.append(z)
        z = torch.tanh(z @ E.T)
    for D in tensors.get("neat_D", []):
        z = torch.tanh(z @ D.T) + skipped.pop()
    wanted = layer.base_layer(x) + x @ (z @ tensors["neat_B"].T)
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    found = layer(x)
    found.backward(grad)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for name in names:
        torch.testing.assert_close(getattr(layer, name)["default"].grad, tensors[name].grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["double", "int8"])
def test_on_a_packed_weight_it_is_the_update_of_the_dequantised_one(kind):
    base = packed(kind, 48, 64)
    layer = layer_over(base)
    weight = layer.get_base_weight().float()
    plain = nn.Linear(64, 48, bias=False)
    plain.weight.data = weight
    twin = layer_over(plain)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer.adapter_output("default", x), twin.adapter_output("default", x))
    torch.testing.assert_close(layer.delta_weight("default"), twin.delta_weight("default"))
    layer(x)  # int8 moves its codes at the first call
    torch.testing.assert_close(layer.delta_weight("default"), twin.delta_weight("default"))


def test_autograd_keeps_nothing_of_the_size_of_the_weight():
    layer, kept = layer_over(packed("double", 256, 256), r=2), []
    x = torch.randn(3, 256)
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer.adapter_output("default", x)
    assert kept and max(kept) < 256 * 256 / 8


@pytest.mark.parametrize("kind", ["plain", "double"])
def test_merging_one_after_the_other_starts_from_the_weight_as_it_was(kind):
    base = nn.Linear(64, 48, bias=False) if kind == "plain" else packed(kind, 48, 64)
    layer = layer_over(base)
    layer.add_adapter("second", NeatConfig(r=2))
    layer.neat_B["second"].data.normal_(std=0.1)
    before = layer.get_base_weight().clone()
    delta = layer.delta_weight("second")
    layer.merge(adapter_names=["default"])
    merged = layer.get_base_weight().clone()
    assert not torch.equal(merged, before)
    assert torch.equal(layer.delta_weight("second"), delta)
    assert torch.equal(layer.get_base_weight(), merged)
    layer.merge(adapter_names=["second"])
    if kind == "plain":
        torch.testing.assert_close(layer.get_base_weight(), merged + delta)
    layer.unmerge()
    assert torch.equal(layer.get_base_weight(), before)


def test_an_offloaded_weight_comes_block_by_block(monkeypatch):
    """Nothing of its size is brought to the device."""
    monkeypatch.setattr(weight_product, "BLOCK_ENTRIES", 700)
    plain = nn.Linear(64, 48)
    weight = plain.weight.detach().clone()
    offloaded = nn.Linear(64, 48)
    offloaded.load_state_dict(plain.state_dict())
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.weight.is_meta
    blocks = [block for _, block in weight_blocks(offloaded)]
    assert max(block.numel() for block in blocks) <= 700
    assert torch.equal(torch.cat(blocks), weight)


def test_a_copy_has_a_weight_of_its_own():
    layer = layer_over(nn.Linear(64, 48))
    twin = copy.deepcopy(layer)
    twin.base_layer.weight.data.mul_(2)
    assert not torch.allclose(twin.delta_weight("default"), layer.delta_weight("default"))
    torch.testing.assert_close(twin.delta_weight("default"), 2 * layer.delta_weight("default"))  # ReLU is homogeneous


@pytest.mark.parametrize("options", [{"depth": -1}, {"depth": 1.5}, {"activation": "sinter"}, {"alpha": 0}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(UserError):
        NeatConfig(**options)
