"""LoRAN through PEFT's own API: create, save, load in another process, disable, several adapters at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open

from curvelora import LoranConfig
from curvelora.methods.loran import LoranLayer

TARGETS = ["q_proj", "v_proj"]


def config(**options) -> LoranConfig:
    return LoranConfig(**(dict(r=4, alpha=8, dropout=0.1, target_modules=TARGETS) | options))


def layers(model) -> list[LoranLayer]:
    return [m for m in model.modules() if isinstance(m, LoranLayer)]


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def test_the_start_is_the_base_model_bit_for_bit(llama, token_ids):
    base = llama()
    before = logits(base, token_ids)
    model = get_peft_model(base, config())
    assert len(layers(model)) == 4  # two layers, q and v; v is narrower (grouped-query attention)
    assert {(m.out_features, m.in_features) for m in layers(model)} == {(128, 128), (64, 128)}
    assert torch.equal(logits(model, token_ids), before)


def test_only_the_factors_train(llama):
    model = get_peft_model(llama(), config())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 8 and all("loran_A" in name or "loran_B" in name for name in trainable)
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * ((128 + 128) + (128 + 64))


# What a user's script does; `import curvelora` is all that it needs from this project.
LOAD_ELSEWHERE = """
import sys, torch, curvelora
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    ids = torch.load(out + "/ids.pt", weights_only=True)
    torch.save(model(ids).logits, out + "/logits.pt")
"""


def test_a_fresh_process_loads_it_and_computes_the_same_bits(llama, token_ids, randomise, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config())
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, token_ids)
    torch.save(token_ids, tmp_path / "ids.pt")
    arguments = [str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, *arguments], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_the_saved_file_holds_the_factors_and_nothing_else(llama, randomise, tmp_path):
    model = get_peft_model(llama(), config())
    randomise(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    with safe_open(str(tmp_path / "adapter_model.safetensors"), "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert len(stored) == 8 and all(name.endswith(("loran_A", "loran_B")) for name in stored)
    assert all(tensor.dtype == torch.float32 and tensor.numel() > 0 for tensor in stored.values())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORAN"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_into_this_process(llama, token_ids, randomise, tmp_path, low_cpu_mem_usage):
    model = get_peft_model(llama(), config(scale_position="inside", activation="tanh"))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, torch_device="cpu")
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(p.is_meta for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert sum(p.requires_grad for p in trainable.parameters()) == 8


def test_disable_adapter_is_the_base_model_bit_for_bit(llama, token_ids, randomise):
    base = llama()
    before = logits(base, token_ids)
    model = get_peft_model(base, config())
    randomise(model)
    adapted = logits(model, token_ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), before)
    assert torch.equal(logits(model, token_ids), adapted) and not torch.equal(adapted, before)
    assert sum(p.requires_grad for p in model.parameters()) == 8  # and training goes on


@pytest.fixture
def two_adapters(llama, randomise):
    model = get_peft_model(llama(), config(), adapter_name="one")
    model.add_adapter("two", config(r=2, activation="tanh", target_modules=["q_proj", "k_proj"]))
    randomise(model, "one", seed=1)
    randomise(model, "two", seed=2)
    return model.eval()


def test_an_added_adapter_waits_until_it_is_set(two_adapters, llama, token_ids):
    """Also on k_proj, which only the second one adapts."""
    first = logits(two_adapters, token_ids)
    assert two_adapters.active_adapters == ["one"]
    assert {name.rsplit(".", 1)[-1] for name, p in two_adapters.named_parameters() if p.requires_grad} == {"one"}
    two_adapters.delete_adapter("two")
    assert torch.equal(logits(two_adapters, token_ids), first)


def test_switching_there_and_back(two_adapters, token_ids):
    first = logits(two_adapters, token_ids)
    two_adapters.set_adapter("two")
    second = logits(two_adapters, token_ids)
    two_adapters.set_adapter("one")
    assert torch.equal(logits(two_adapters, token_ids), first) and not torch.equal(first, second)


def test_two_at_once_add_up_in_a_layer(two_adapters):
    layer = two_adapters.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 128)
    layer.set_adapter(["one", "two"])
    base = layer.base_layer(x)
    expected = base + layer.adapter_output("one", x) + layer.adapter_output("two", x)
    torch.testing.assert_close(layer(x), expected)


def test_an_inactive_adapter_gets_no_gradient(two_adapters, token_ids):
    two_adapters.set_adapter("two")
    two_adapters(token_ids, labels=token_ids).loss.backward()
    for name, parameter in two_adapters.named_parameters():
        if ".one" in name or "base_layer" in name:
            assert parameter.grad is None, name
        elif ".two" in name:
            assert parameter.grad.abs().max() > 0, name


def test_deleting_the_active_adapter_leaves_the_other(two_adapters, token_ids):
    two_adapters.set_adapter("two")
    two_adapters.delete_adapter("two")
    assert list(two_adapters.peft_config) == ["one"]
    assert not any(".two" in name for name in two_adapters.state_dict())
    two_adapters.set_adapter("one")
    assert torch.isfinite(logits(two_adapters, token_ids)).all()


def test_unload_gives_the_base_model_back(llama, token_ids, two_adapters):
    base = two_adapters.unload()
    assert not layers(base)
    assert torch.equal(logits(base, token_ids), logits(llama(), token_ids))
