"""PEFT's LoRA layers on NF4 and in bf16: fused after `use_kernels`, PEFT's own after "off" and where LoRA is more."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from kernel_world import FusedProducts, Small, agree, normal, relative, step
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit
from torch import nn

from curvelora.kernels import use_kernels
from curvelora.kernels.dropout import mask_reference, new_seed
from curvelora.kernels.peft_lora import is_lora_layer

# eager and fused differ in where bf16 rounds; measured: 6e-3 at most
BOUND = 1.2e-2


def lora(device: torch.device, base: str = "nf4", **options: object) -> nn.Module:
    """`Small` with PEFT's LoRA on both layers, whose B are as after training."""
    torch.manual_seed(4)
    config = LoraConfig(**({"r": 8, "lora_alpha": 16, "target_modules": ["up", "down"]} | options))
    model = get_peft_model(Small(device, base, bias=True), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    """Its LoRA layers."""
    return [module for module in model.modules() if is_lora_layer(module)]


def fused(model: nn.Module, x: torch.Tensor, **call: object) -> int:
    """How many fused products a pass makes."""
    with torch.autocast(x.device.type, torch.bfloat16), FusedProducts() as products, torch.no_grad():
        model(x.clone().requires_grad_(), **call)
    return products.count


@pytest.mark.parametrize("base", ["nf4", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fused_and_peft_s_own_are_one_function(
    device: torch.device, base: str, dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same mask of dropout, which is otherwise the kernels' own."""

    def draw(x: torch.Tensor, p: float, training: bool, inplace: bool) -> torch.Tensor:
        return (x * mask_reference(x.shape, new_seed(x.device), p)).to(x.dtype) if training else x

    model, x = lora(device, base, lora_dropout=p), normal(device, 3, 16, 64).to(dtype)
    assert fused(model, x) == 0, "untouched until it is asked for"
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.functional.dropout", draw)
        wanted = step(model, x, seed=5)
    assert use_kernels(model) == (2, {})
    assert fused(model, x) == 2
    found = step(model, x, seed=5)
    agree(found, wanted, BOUND)
    if p:
        assert relative(step(model, x, seed=6)["y"], found["y"]) > 3 * BOUND, "and another seed drops others"


def test_the_class_and_back(device: torch.device, kernels_mode: Callable[[str], None]) -> None:
    model, x = lora(device), normal(device, 16, 64)
    wanted, names = step(model, x), list(model.state_dict())
    use_kernels(model)
    assert {type(layer).__name__ for layer in layers(model)} == {"FusedLinear4bit"}
    assert list(model.state_dict()) == names
    assert use_kernels(model, "off") == (0, {"kernels: off": 2})
    assert {type(layer) for layer in layers(model)} == {Linear4bit}
    assert all(torch.equal(value, wanted[name]) for name, value in step(model, x).items())
    use_kernels(model)
    kernels_mode("off")
    assert fused(model, x) == 0
    assert all(torch.equal(value, wanted[name]) for name, value in step(model, x).items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "a variant of LoRA"),
        ({"lora_bias": True}, "LoRA with a bias"),
    ],
)
def test_what_is_more_than_lora_is_peft_s_own(device: torch.device, options: dict[str, object], reason: str) -> None:
    model, x = lora(device, **options), normal(device, 16, 64)
    wanted = step(model, x, seed=6)
    assert use_kernels(model) == (0, {reason: 2})
    assert fused(model, x) == 0
    assert all(torch.equal(value, wanted[name]) for name, value in step(model, x, seed=6).items())


def test_dropout_is_on_where_its_module_trains(device: torch.device) -> None:
    """Also by itself, as for Monte Carlo dropout."""
    model, x = lora(device, lora_dropout=0.5), normal(device, 16, 64)
    use_kernels(model)
    wanted, training = step(lora(device), x), step(model, x)
    assert relative(step(model.eval(), x)["y"], wanted["y"]) < BOUND < relative(training["y"], wanted["y"])
    for layer in layers(model):
        layer.lora_dropout.train()
    agree(step(model, x), training, 1e-6)
    for layer in layers(model):
        layer.lora_dropout.default = nn.AlphaDropout(0.5)
    assert use_kernels(model) == (0, {"another dropout than PyTorch's": 2})


def test_hooks_on_factors_are_called(device: torch.device) -> None:
    model, x, seen = lora(device), normal(device, 16, 64), []
    use_kernels(model)
    handle = layers(model)[0].lora_A.default.register_forward_hook(lambda *args: seen.append(1))
    assert fused(model, x) == 1 and seen == [1]
    handle.remove()
    assert fused(model, x) == 2
    part = layers(model)[0].lora_B.default
    part.forward = part.forward  # as accelerate's hooks do
    assert fused(model, x) == 1


def test_scales_are_read_at_each_pass(device: torch.device) -> None:
    """rsLoRA's, and one that is changed after the kernels were chosen."""
    model, x = lora(device, use_rslora=True), normal(device, 16, 64)
    wanted = step(model, x)
    use_kernels(model)
    agree(step(model, x), wanted, BOUND)
    for layer in layers(model):
        layer.set_scale("default", 0.25)
    changed = step(model, x)
    assert (changed["y"] - wanted["y"]).norm() > 0.1 * wanted["y"].norm()
    use_kernels(model, "off")
    agree(changed, step(model, x), BOUND)


def test_several_disabled_and_mixed_adapters(device: torch.device) -> None:
    model, x = lora(device), normal(device, 2, 8, 64)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
    use_kernels(model)
    names = {"adapter_names": ["default", "other"]}
    plain = copy.deepcopy(model)
    use_kernels(plain, "off")

    def same() -> None:
        assert fused(model, x) == 0
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(model(x.requires_grad_()), plain(x))

    for active in (["default", "other"], []):
        for own in (model, plain):
            own.base_model.set_adapter(active)
        same()
    for own in (model, plain):
        own.base_model.set_adapter("other")
    assert fused(model, x) == 2
    with model.disable_adapter(), plain.disable_adapter():
        same()
    model.eval(), plain.eval()
    assert fused(model, x, **names) == 0
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        assert torch.equal(model(x, **names), plain(x, **names))


def test_merged_and_unmerged(device: torch.device) -> None:
    model, x = lora(device), normal(device, 16, 64)
    use_kernels(model)
    before = step(model, x)
    model.merge_adapter()
    assert fused(model, x) == 0
    model.unmerge_adapter()  # PEFT quantises again, so the base is not the same bits
    assert fused(model, x) == 2
    agree({"y": step(model, x)["y"]}, {"y": before["y"]}, 0.3)


def test_copies_and_saved_adapters(device: torch.device, tmp_path) -> None:
    model, x = lora(device), normal(device, 16, 64)
    use_kernels(model)
    wanted = step(model, x)
    copied = copy.deepcopy(model)
    assert {type(layer).__name__ for layer in layers(copied)} == {"FusedLinear4bit"}
    agree(step(copied, x), wanted, 1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Small(device, bias=True), tmp_path, is_trainable=True)
    assert use_kernels(loaded) == (2, {})
    agree(step(loaded, x), wanted, 1e-6)


def test_other_layers_are_counted_with_their_reason(device: torch.device) -> None:
    model = get_peft_model(Small(device, "bf16").float(), LoraConfig(r=4, target_modules=["up", "down"]))
    assert use_kernels(model) == (0, {"a base in float32": 2})
