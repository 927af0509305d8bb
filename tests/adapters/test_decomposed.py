"""PiSSA, MiLoRA and OLoRA: the function is that of the papers' rewritten base, and the base is never written."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from curvelora import METHODS, UserError
from curvelora.svd import singular_triplets

IDS = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj", "down_proj"]


def steps(model: nn.Module, count: int) -> torch.Tensor:
    """Logits after so many steps of plain gradient descent, which does not mind the signs of singular vectors."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("method", "alpha"), [("pissa", 4), ("pissa", 10), ("olora", 4), ("olora", 2)])
def test_the_same_function_as_peft_s_rewritten_base(llama, method, alpha):
    """At the start, and after each of three steps; fp32."""
    base = llama()
    ours = METHODS[method].build_config(r=4, alpha=alpha, target_modules=TARGETS)
    theirs = LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=method)
    for count in range(4):
        one = steps(get_peft_model(copy.deepcopy(base), ours), count)
        two = steps(get_peft_model(copy.deepcopy(base), theirs), count)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5)
    with torch.no_grad():
        assert (one - base(IDS).logits).norm() > 0.05 * one.norm()  # the steps have moved something


def test_milora_takes_the_last_triplets(llama):
    base = llama()
    model = get_peft_model(copy.deepcopy(base), METHODS["milora"].build_config(r=4, alpha=8, target_modules=TARGETS))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    weight = base.model.layers[0].self_attn.v_proj.weight
    A, B = layer.factors("default")
    wanted = singular_triplets(weight, 4, "last").product()
    torch.testing.assert_close((2 * B @ A).double(), wanted, rtol=1e-5, atol=1e-8)
    U, S, Vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    torch.testing.assert_close(wanted, (U[:, -4:] * S[-4:]) @ Vt[-4:])
    assert torch.equal(layer.base_layer.weight, weight)


def test_the_factors_of_olora_are_those_of_qr(llama):
    model = get_peft_model(llama(), METHODS["olora"].build_config(r=4, alpha=8, target_modules=["q_proj"]))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    A, B = (t.double() for t in layer.factors("default"))
    A0, B0 = (t.double() for t in layer.removed("default"))
    torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(A0, 2 * A) and torch.equal(B0, B)
    torch.testing.assert_close(B @ A[:, :4], layer.base_layer.weight[:, :4].double(), rtol=1e-5, atol=1e-7)


def test_the_adapter_alone_restores_the_model_and_peft_s_form_does_not(llama, tmp_path):
    """What the caveat of pissa_rewritten_base says."""
    base, kept = llama(), {}
    for method in ("pissa", "pissa_rewritten_base"):
        config = METHODS[method].build_config(r=4, alpha=4, target_modules=TARGETS)
        model = get_peft_model(copy.deepcopy(base), config)
        kept[method] = steps(model, 2)
        model.save_pretrained(tmp_path / method)
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "pissa")
    assert torch.equal(ours(IDS).logits, kept["pissa"])
    config = LoraConfig.from_pretrained(tmp_path / "pissa_rewritten_base")
    config.init_lora_weights = True  # the original base, as a server would have it
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "pissa_rewritten_base", config=config)
    assert (theirs(IDS).logits - kept["pissa_rewritten_base"]).norm() > 0.1 * kept["pissa_rewritten_base"].norm()


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_a_weight_that_is_not_finite_is_named(llama, method):
    base = llama()
    base.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"layers.1.self_attn.v_proj.*has no factors to start from.*NaN or infinite"):
        get_peft_model(base, METHODS[method].build_config(r=4, target_modules=TARGETS))


def test_moslora_folds_into_lora(llama):
    """B M beside A is a LoRA: the same numbers."""
    base = llama()
    model = get_peft_model(copy.deepcopy(base), METHODS["moslora"].build_config(r=4, alpha=8, dropout=0.0))
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    wanted = steps(model, 3)
    for name, layer in model.named_modules():
        if hasattr(layer, "moslora_M"):
            twin, (A, B) = plain.get_submodule(name), layer.factors("default")
            twin.lora_A["default"].weight.data = A.data
            twin.lora_B["default"].weight.data = (B @ layer.moslora_M["default"]).data
    torch.testing.assert_close(plain(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
