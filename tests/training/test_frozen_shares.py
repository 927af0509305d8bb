"""The frozen base in shares, in one process of a group of one: what is loaded, gathered, left empty, and refused.

What several processes make of it is in test_zero.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTJConfig,
    OPTConfig,
    PreTrainedModel,
)

import curvelora_training.frozen_shares as frozen_shares
import curvelora_training.loading as loading
from curvelora.layers.base_weight import is_partitioned, whole_weight
from curvelora_eval.models import load_base
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import Task, make_task
from curvelora_training.config import parse_recipe
from curvelora_training.frozen_shares import OUTSIDE, FrozenShares, units_of
from curvelora_training.loading import load_into_shares
from curvelora_training.zero3 import by_blocks

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


def inputs(name: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch for one of the tiny models."""
    if name == "vit":
        size = model.config.image_size
        return {"pixel_values": torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)}
    tokens = torch.arange(2, 12).reshape(2, 5)
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if name == "t5" else {})


@pytest.mark.parametrize("small", [1, 1 << 12])
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("llama", None),
        ("bert", None),
        ("t5", None),
        ("vit", None),
        ("gpt2", GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=64)),
        ("gptj", GPTJConfig(n_embd=32, n_layer=3, n_head=2, rotary_dim=4, vocab_size=64)),
        ("opt", OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)),
    ],
)
def test_every_architecture_computes_the_same(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, made: Any, small: int
) -> None:
    """Also where everything outside of blocks counts as large, as it does in large models: norms, biases, positions."""
    monkeypatch.setattr(frozen_shares, "SMALL", small)
    kind = {
        "t5": AutoModelForSeq2SeqLM,
        "vit": AutoModelForImageClassification,
        "bert": AutoModelForSequenceClassification,
    }
    auto = kind.get(name, AutoModelForCausalLM)
    torch.manual_seed(0)
    model = (auto.from_config(made) if made else auto.from_pretrained(tiny_models[name])).eval()
    batch = inputs(name, model)
    with torch.no_grad():
        wanted = model(**batch).logits
        shares = FrozenShares(units_of(model, set()), CPU)
        for unit in shares.units:
            shares.take(unit)
        shares.start()
        assert shares.blocks and not wanted.isnan().any()
        for _ in range(2):
            assert torch.equal(model(**batch).logits, wanted)


def test_what_trains_is_left_alone_under_every_name(tiny_models: dict[str, Path]) -> None:
    """A dotted name, as PEFT takes them, and a weight that is tied to one that trains."""
    config = AutoConfig.from_pretrained(tiny_models["llama"])
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    for name in ("lm_head", "model.embed_tokens", "embed_tokens"):
        assert model.lm_head.weight not in {p for unit in units_of(model, {name}) for p in unit.tensors}
    norm = model.model.layers[0].input_layernorm.weight
    assert norm in {p for unit in units_of(model, {"layernorm"}) for p in unit.tensors}
    assert norm not in {p for unit in units_of(model, {"layers.0.input_layernorm"}) for p in unit.tensors}


def test_what_is_more_than_reading_is_loaded_whole_first(
    tiny_models: dict[str, Path], task: Task, tmp_path: Path
) -> None:
    """A tied weight that the checkpoint has twice, with other values: transformers leaves the two apart."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    model.save_pretrained(tmp_path)
    for file in tiny_models["llama"].glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    settings["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    spec, tokens = ModelSpec(path=str(tmp_path), dtype="float32"), torch.arange(6)[None]
    with torch.no_grad():
        wanted = load_base(spec, task, CPU)(tokens).logits
        assert torch.equal(load_into_shares(spec, task, CPU, set())(tokens).logits, wanted)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_a_lora_that_reads_weights_is_gathered_by_modules(
    tiny_models: dict[str, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    raw = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_models["llama"]), "dtype": "float32"},
        "task": {"kind": "causal_lm", "columns": {"text": "text"}},
        "data": {"train": "rows.jsonl"},
        "adapter": {"method": "lora", "r": 4},
    }
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    settings = {"zero_optimization": {"stage": 3}}
    assert by_blocks(parse_recipe(raw, "it"), settings, 2, base)
    assert not by_blocks(parse_recipe(raw | {"adapter": raw["adapter"] | options}, "it"), settings, 2, base)
    assert not by_blocks(parse_recipe(raw, "it"), settings, 1, base)
    assert not by_blocks(parse_recipe(raw, "it"), {"zero_optimization": {"stage": 2}}, 2, base)


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
