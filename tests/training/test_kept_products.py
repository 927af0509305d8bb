"""Layers that keep their large products: the same numbers as plain checkpointing, and no large product made twice."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import LlamaConfig

from curvelora_training import kept_products
from curvelora_training.bench.random_base import random_model
from curvelora_training.kept_products import LARGE, keep_products
from curvelora_training.prepare import RecipeError, load_and_prepare

LAYERS = 3


class Large(TorchDispatchMode):
    """Counts products with weights of at least `LARGE` terms, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        if name == "bitsandbytes::gemm_4bit" or (name == "aten::mm" and args[0].shape[-1] >= LARGE):
            self.seen["products"] += 1
        elif "scaled_dot_product" in name and "backward" not in name:
            self.seen["attention"] += 1
        return func(*args, **(kwargs or {}))


def gradients(base: str, kept: int | None) -> tuple[torch.Tensor, list[torch.Tensor], Counter]:
    """-> loss, gradients of the adapter, what was multiplied in both passes together. Without checkpointing: kept = None."""
    sizes = {"hidden_size": LARGE, "intermediate_size": LARGE, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(num_hidden_layers=LAYERS, vocab_size=96, **sizes)
    model = random_model(config, base, torch.device("cpu"))
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    inner = model.get_base_model()
    if kept is not None:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        assert keep_products(inner, kept) == min(kept, LAYERS)
    inner.enable_input_require_grads()
    model.train()
    tokens = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(1))
    with Large() as large:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad], large.seen


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_nothing_large_is_made_twice_and_the_numbers_stay(base: str) -> None:
    loss, wanted, plain = gradients(base, 0)
    _, _, whole = gradients(base, None)
    again = plain - whole  # what checkpointing adds
    assert again["attention"] == LAYERS and again["products"] >= 7 * LAYERS
    for kept in (1, LAYERS + 1):
        found, given, seen = gradients(base, kept)
        assert found.equal(loss) and all(a.equal(b) for a, b in zip(given, wanted, strict=True))
        left = LAYERS - min(kept, LAYERS)
        assert seen - whole == Counter({key: count * left // LAYERS for key, count in again.items() if left})


def test_a_run_that_keeps_products_is_the_same_run(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose masks have to come back."""
    monkeypatch.setattr(kept_products, "LARGE", 16)
    kept = []
    original = kept_products._policy
    monkeypatch.setattr(kept_products, "_policy", lambda *args, **kw: kept.append(original(*args, **kw)) or kept[-1])
    path = write(recipe, **{"training.gradient_checkpointing": True, "training.max_steps": 3})
    plain = finetune(path)
    assert not kept
    folder = finetune(path, "training.keep_products=1", f"output={plain.parent / 'kept'}")
    assert kept.count(CheckpointPolicy.MUST_SAVE) > 3 * 6
    file = "adapter/adapter_model.safetensors"
    assert (folder / file).read_bytes() == (plain / file).read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "set training.gradient_checkpointing=true too"),
        ({"training.gradient_checkpointing": True, "training.deepspeed": "zero3.json"}, "module by module"),
    ],
)
def test_where_nothing_can_be_kept_it_is_refused(
    recipe: dict[str, Any], write: Callable[..., Path], root: Path, changes: dict[str, Any], said: str
) -> None:
    if "training.deepspeed" in changes:
        changes = changes | {"training.deepspeed": str(root / "ds_configs/zero3.json")}
    with pytest.raises(RecipeError, match=said):
        load_and_prepare(write(recipe, **changes, **{"training.keep_products": 2}), [])
