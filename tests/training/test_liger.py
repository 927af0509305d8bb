"""liger-kernel on one model: all of its parts, nothing of it anywhere else, and a sentence where it cannot be."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
)
from transformers.models.llama import modeling_llama

from curvelora.errors import UserError
from curvelora_training import kept_products
from curvelora_training.kept_products import keep_products
from curvelora_training.liger import check_liger, use_liger
from liger_stub import has_gpu, install

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(vocab_size=128, num_hidden_layers=2, pad_token_id=0, **SIZES)
TOKENS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None


def llama(kind: Any = AutoModelForCausalLM, device: str = "cpu", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.update(changes)
    return kind.from_config(config).to(device)


def adapted(model: PreTrainedModel, *targets: str) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=list(targets or ("q_proj", "down_proj")), init_lora_weights=False)
    return get_peft_model(model, config).train()


def step(model: PeftModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """-> loss, gradients of the adapter."""
    model.zero_grad()
    tokens = TOKENS.to(model.device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """What of the stand-in has run."""
    install(tmp_path, monkeypatch)
    from liger_kernel.transformers.monkey_patch import calls

    return calls


def test_one_model_has_it_and_its_neighbour_not(calls: Counter) -> None:
    before = dict(vars(modeling_llama))
    plain, patched = adapted(llama()), adapted(llama())
    wanted, gradients = step(plain)
    use_liger(patched.get_base_model())
    assert all(vars(modeling_llama)[name] is value for name, value in before.items())
    loss, found = step(patched)
    assert calls == {"rope": 2, "norm": 3, "mlp": 2, "loss": 1}
    assert loss.equal(wanted) and all(a.equal(b) for a, b in zip(found, gradients, strict=True))
    step(plain)
    step(adapted(llama()))  # made afterwards
    assert calls["rope"] == 2 and calls["norm"] == 3


def test_products_that_are_kept_are_not_rotated_in_place(calls: Counter) -> None:
    model = llama()
    use_liger(model, keeps_products=True)
    model(input_ids=TOKENS)
    assert calls == {"norm": 3, "mlp": 2, "loss": 1}


def test_only_what_means_the_same_is_taken(calls: Counter) -> None:
    gelu = llama(hidden_act="gelu")
    use_liger(gelu)
    gelu(input_ids=TOKENS)
    assert calls == {"rope": 2, "norm": 3, "loss": 1}
    classifier = llama(AutoModelForSequenceClassification)
    use_liger(classifier)
    classifier(input_ids=TOKENS)
    assert calls == {"rope": 4, "norm": 6, "mlp": 2, "loss": 1}


def test_where_it_would_compute_something_else_it_is_refused(calls: Counter) -> None:
    with pytest.raises(UserError, match="nothing for models of type opt"):
        check_liger(AutoModelForCausalLM.from_config(OPTConfig(hidden_size=24, ffn_dim=16, num_hidden_layers=1)))
    model = adapted(llama(), "q_proj", "lm_head").get_base_model()
    with pytest.raises(UserError, match="takes the output layer's weight alone"):
        use_liger(model)
    assert not calls and not [m for m in model.modules() if "forward" in vars(m)]


def test_without_a_gpu_or_the_package_it_is_refused(
    calls: Counter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "liger_kernel/transformers/monkey_patch.py").write_text("raise ImportError('too old')")
    monkeypatch.delitem(sys.modules, "liger_kernel.transformers.monkey_patch")
    monkeypatch.delattr("liger_kernel.transformers.monkey_patch")
    with pytest.raises(UserError, match=r"cannot be imported \(too old\)"):
        check_liger(llama())
    has_gpu(monkeypatch, False)
    with pytest.raises(UserError, match="needs a GPU"):
        check_liger(llama())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install liger-kernel"):
        check_liger(llama())


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and HAS_LIGER), reason="needs a CUDA GPU and liger-kernel")
@pytest.mark.parametrize("kept", [None, 0, 1])
def test_liger_s_own_kernels_give_the_same_step(kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checkpointing (None), with it, and with a layer that keeps all of its products."""
    monkeypatch.setattr(kept_products, "LARGE", 16)
    before = dict(vars(modeling_llama))
    exact = step(adapted(llama(device="cuda").double()))
    plain, patched = adapted(llama(device="cuda")), adapted(llama(device="cuda"))
    use_liger(inner := patched.get_base_model(), bool(kept))
    if kept is not None:
        inner.enable_input_require_grads()
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        assert keep_products(inner, kept) == kept
    found, wanted = step(patched), step(plain)
    assert all(vars(modeling_llama)[name] is value for name, value in before.items())
    assert patched(input_ids=TOKENS.cuda(), labels=TOKENS.cuda()).logits is None
    for result in (found, wanted):
        assert result[0].double().item() == pytest.approx(exact[0].item(), rel=1e-5)
        for a, b in zip(result[1], exact[1], strict=True):
            assert (a.double() - b).norm() <= 1e-4 * b.norm()
