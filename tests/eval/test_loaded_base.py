"""One base for many adapters: each leaves it as it was, or it is loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from curvelora.registry import METHODS
from curvelora_eval.evaluation.loaded_base import LoadedBase, checksum
from named_tasks import save_adapter

IDS = torch.arange(3, 35)[None]
# the methods that a recipe can put on a causal model with nothing but a rank and target modules, one of each kind of layer
TRIED = ("lora", "dora", "loran", "ranlora", "aurora", "neat", "pissa", "fourierft", "adalora")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def base(llama_folder: Path) -> LoadedBase:
    return LoadedBase(lambda: AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="eager"))


@pytest.mark.parametrize("name", TRIED)
def test_an_adapter_leaves_no_trace(base: LoadedBase, llama_folder: Path, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    options |= {"adalora": {"total_step": 10}, "fourierft": {"n_frequency": 16}}.get(name, {"r": 4})
    adapter = save_adapter(tmp_path / name, llama_folder, METHODS[name].build_config(**options))
    before, loads = logits(base.bare()), base.loads
    places = list(base.bare().named_modules())
    with_adapter = logits(base.put_on(adapter))
    assert not torch.allclose(before, with_adapter, atol=1e-3)
    assert base.take_off() is None
    assert torch.equal(logits(base.bare()), before) and base.loads == loads
    assert list(base.bare().named_modules()) == places
    assert torch.equal(logits(base.put_on(adapter)), with_adapter)
    assert base.take_off() is None


def test_an_adapter_with_a_head_of_its_own_leaves_the_bases_head(
    base: LoadedBase, llama_folder: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = save_adapter(tmp_path / "a", llama_folder, config)
    before = logits(base.bare())
    base.put_on(adapter)
    assert base.take_off() is None and torch.equal(logits(base.bare()), before)


def test_a_base_that_was_changed_is_loaded_again(base: LoadedBase, llama_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = save_adapter(tmp_path / "a", llama_folder, config)
    before, loads = logits(base.bare()), base.loads
    base.put_on(adapter).merge_and_unload()
    said = base.take_off()
    assert "model.layers.0.self_attn.q_proj.weight" in said and "loaded again" in said
    assert torch.equal(logits(base.bare()), before) and base.loads == loads + 1


def test_a_checksum_sees_one_bit_and_a_swap() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(torch.bfloat16)
    before = checksum(model)
    assert checksum(model) == before and "1.running_mean" in before
    weight = model[0].weight.data
    first = weight[0, 0].item()
    weight[0, 0] = torch.nextafter(torch.tensor(first), torch.tensor(9.0)).bfloat16() + 0.01
    assert checksum(model) != before
    weight[0, 0] = first
    assert checksum(model) == before
    weight[0, :2] = weight[0, :2].flip(0).clone()
    assert checksum(model) != before
