"""The frozen base in shares, in one process of a group of one: what is loaded, gathered, left empty, and refused.

What several processes make of it is in test_zero.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import curvelora_training.loading as loading
from curvelora.layers.base_weight import is_partitioned, whole_weight
from curvelora_eval.models import load_base
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import Task, make_task
from curvelora_training.frozen_shares import OUTSIDE, FrozenShares, units_of
from curvelora_training.loading import load_into_shares

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def task() -> Task:
    return make_task(TaskSpec(kind="causal_lm", columns={"text": "text"}))


def whole(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter of a model in shares, as it is when it is gathered."""
    found = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "whole"):
            with parameter.whole():
                found[name] = parameter.detach().clone()
        else:
            found[name] = parameter.detach().clone()
    return found


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "nf4")])
def test_loading_block_by_block_is_loading(
    tiny_models: dict[str, Path], task: Task, monkeypatch: pytest.MonkeyPatch, dtype: str, quantization: str
) -> None:
    """The same weights, codes and scales, settings and outputs as transformers' way, and never the whole model."""
    spec = ModelSpec(path=str(tiny_models["llama"]), dtype=dtype, quantization=quantization)
    wanted = load_base(spec, task, CPU)
    monkeypatch.setattr(loading, "load_base", None)  # the way for other models, which loads all of it
    model = load_into_shares(spec, task, CPU, set())
    given, weights = whole(model), dict(wanted.named_parameters())
    assert given.keys() == weights.keys()
    for name, weight in weights.items():
        assert given[name].dtype == weight.dtype and torch.equal(given[name], weight), name
    for (name, buffer), (_, other) in zip(model.named_buffers(), wanted.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    for key in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        assert getattr(model, key, None) == getattr(wanted, key, None)
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert model.training is wanted.training and not any(p.requires_grad for p in model.parameters())
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, wanted(tokens).logits)


def test_what_is_not_gathered_is_empty_and_has_its_shape(tiny_models: dict[str, Path], task: Task) -> None:
    """At most two blocks have memory at any time, and what is read by mistake is NaN."""
    spec = ModelSpec(path=str(tiny_models["llama"]), dtype="float32")
    model = load_into_shares(spec, task, CPU, set())
    blocks = list(model.model.layers)
    shapes = [tuple(p.shape) for p in load_base(spec, task, CPU).parameters()]
    assert [tuple(p.shape) for p in model.parameters()] == shapes

    def live() -> list[int]:
        return [n for n, b in enumerate(blocks) if not b.mlp.up_proj.weight.isnan().any()]

    assert live() == []
    seen = []
    for block in blocks:
        block.mlp.register_forward_hook(lambda *_: seen.append(live()))
    with torch.no_grad():
        model(torch.arange(6)[None])
    assert len(seen) == len(blocks) and all(n in now and len(now) <= 2 for n, now in enumerate(seen))
    layer = blocks[0].mlp.up_proj
    assert is_partitioned(layer.weight)
    with whole_weight(layer) as weight:
        assert not weight.isnan().any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_whole_model(tiny_models: dict[str, Path], checkpointing: bool) -> None:
    """With more blocks than buffers, with two passes before their backward passes, tied embeddings, and odd sizes."""
    config = AutoConfig.from_pretrained(tiny_models["llama"])
    config.num_hidden_layers, config.tie_word_embeddings, config.intermediate_size = 5, True, 37
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    tokens = [torch.arange(8)[None] + n for n in range(2)]

    def gradients() -> list[torch.Tensor]:
        starts = [model.get_input_embeddings()(t).detach().requires_grad_() for t in tokens]
        losses = [model(inputs_embeds=s, labels=t).loss for s, t in zip(starts, tokens, strict=True)]
        for loss in losses:
            loss.backward()
        return [s.grad for s in starts]

    wanted = gradients()
    shares = FrozenShares(units_of(model, set()), CPU)
    for unit in shares.units:
        shares.take(unit)
    shares.start()
    tied = [unit for unit in shares.units if unit.slot == OUTSIDE]
    assert len(tied) == 1 and len(tied[0].modules) == 2
    assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted, strict=True))


def test_units_leave_out_what_trains_and_models_without_blocks(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    everything = {p for unit in units_of(model, set()) for p in unit.tensors}
    assert model.lm_head.weight in everything
    left = {p for unit in units_of(model, {"lm_head"}) for p in unit.tensors}
    assert everything - left == {model.lm_head.weight}
    monkeypatch.setattr(type(model), "_no_split_modules", None)
    monkeypatch.setattr(model, "_no_split_modules", None, raising=False)
    assert units_of(model, set()) == []
