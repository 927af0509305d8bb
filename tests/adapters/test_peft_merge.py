"""Merging: exact in fp32, undone bit for bit, and refused where the sum is broken."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model

from curvelora import LoranConfig
from curvelora.activations import NAMES

BOUND = 1e-5  # relative, fp32


def config(**options) -> LoranConfig:
    return LoranConfig(
        **(dict(r=4, alpha=8, dropout=0.1, target_modules=["q_proj", "v_proj"], amplitude=2e-2) | options)
    )


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def model(llama, randomise):
    model = get_peft_model(llama(), config())
    randomise(model)
    return model.eval()


def base_weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "loran_" not in name}


def test_merging_keeps_the_function_and_unmerging_the_bits(model, token_ids):
    before, weights = logits(model, token_ids), base_weights(model)
    model.merge_adapter()
    assert relative(logits(model, token_ids), before) < BOUND
    changed = [name for name, p in base_weights(model).items() if not torch.equal(p, weights[name])]
    assert len(changed) == 4  # the adapter is in the weights, not in the forward pass
    with model.disable_adapter():  # the next forward pass unmerges by itself
        logits(model, token_ids)
        assert all(torch.equal(p, weights[name]) for name, p in base_weights(model).items())
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in base_weights(model).items())
    assert torch.equal(logits(model, token_ids), before)


@pytest.mark.parametrize("position", ["outside", "inside"])
@pytest.mark.parametrize("activation", NAMES)
def test_every_activation_merges(loran_layer, activation, position):
    layer = loran_layer(37, 53, r=3, alpha=7, activation=activation, scale_position=position).eval()
    x, weight = torch.randn(4, 37), layer.base_layer.weight.clone()
    before = layer(x)
    layer.merge()
    assert layer.merged and relative(layer(x), before) < BOUND
    assert relative(layer.base_layer.weight - weight, layer.delta_weight("default")) < 1e-4
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


def test_merging_twice_adds_once(model, token_ids):
    model.merge_adapter()
    once = logits(model, token_ids)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(logits(model, token_ids), once)


def test_two_adapters_merge_one_after_the_other_and_unmerge_together(model, token_ids, randomise):
    weights = base_weights(model)
    model.add_adapter("second", config(r=2, activation="tanh"))
    randomise(model, "second", seed=5)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    both = layer.delta_weight("default") + layer.delta_weight("second")
    model.merge_adapter(adapter_names=["default"])
    model.merge_adapter(adapter_names=["second"])
    original = weights["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert relative(layer.base_layer.weight - original, both) < 1e-4
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in base_weights(model).items())


def test_a_bf16_base_is_summed_in_fp32_and_rounded_once(loran_layer):
    layer = loran_layer(37, 53, r=3, amplitude=2e-2)
    layer.base_layer.to(torch.bfloat16)
    expected = (layer.base_layer.weight.float() + layer.delta_weight("default")).to(torch.bfloat16)
    layer.merge()
    assert layer.base_layer.weight.dtype == torch.bfloat16 and torch.equal(layer.base_layer.weight, expected)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, float("nan")), (torch.float16, 1e7)])
def test_safe_merge_refuses_what_is_not_finite(loran_layer, dtype, value):
    """Also where the sum is finite in fp32 and not in the base's own dtype."""
    layer = loran_layer(37, 53, r=3)
    layer.base_layer.to(dtype)
    weight = layer.base_layer.weight.clone()
    layer.factors("default")[1].data[0, 0] = value
    with pytest.raises(ValueError, match=r"\['default'\] into module 'layer' gives NaN or infinite weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_merged_layer_unmerges_itself(loran_layer, duplicate):
    layer = loran_layer(7, 9, r=3)
    weight = layer.base_layer.weight.clone()
    layer.merge()
    merged = layer.base_layer.weight.clone()
    copied = duplicate(layer)
    copied.unmerge()
    assert torch.equal(copied.base_layer.weight, weight) and torch.equal(layer.base_layer.weight, merged)
