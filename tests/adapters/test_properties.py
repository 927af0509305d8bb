"""Entries of the registry that the matrix does not reach: variants of PEFT's LoRA, linear probing, descriptions."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from curvelora import METHODS

ADAPTED = 2 * [(128, 128), (64, 128)]  # (d_out, d_in) of q and v in both layers of the tiny Llama
HEAD = 3 * 32 + 3  # the tiny BERT's classifier


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_variants_of_lora_train_as_many_entries_as_declared(llama, options):
    """PEFT's DoRA trains a magnitude for each output, its lora_bias a bias on B."""
    config = METHODS["lora"].build_config(r=4, target_modules=["q_proj", "v_proj"], **options)
    count, _ = get_peft_model(llama(), config).get_nb_trainable_parameters()
    assert count == sum(METHODS["lora"].trainable_parameters(config, *shape) for shape in ADAPTED)


@pytest.mark.parametrize("init", [True, False, "gaussian", "olora", "orthogonal", "pissa", "pissa_niter_4"])
def test_starts_of_lora_are_as_declared(llama, token_ids, init):
    config = METHODS["lora"].build_config(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    with torch.no_grad():
        base = llama()(token_ids).logits
        shift = (get_peft_model(llama(), config).eval()(token_ids).logits - base).norm() / base.norm()
    assert shift < 1e-5 if METHODS["lora"].identity_at_init(config) else shift > 0.1


def test_linear_probing_trains_the_head_alone_and_starts_as_the_base(bert, token_ids):
    method = METHODS["linear_probing"]
    config = method.build_config(modules_to_save=["classifier"])
    model = get_peft_model(bert(), config).eval()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == HEAD and all("classifier" in name for name in trainable)
    assert method.identity_at_init(config) and method.trainable_parameters(config, 128, 64) == 0
    with torch.no_grad():
        before = model(token_ids).logits
        assert torch.equal(before, bert()(token_ids).logits)
        for parameter in trainable.values():
            parameter.add_(0.1)
        after = model(token_ids).logits
        assert not torch.allclose(after, before)
        torch.testing.assert_close(model.merge_and_unload()(token_ids).logits, after)


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_describes_itself(name):
    described = METHODS[name].describe()
    assert described["name"] == name and described["provided_by"] in ("curvelora", "peft")
    assert all(described[key] for key in ("title", "family", "formula", "paper", "cost", "caveats"))
    with pytest.raises(ValueError, match=f"method '{name}' has no option 'no_such_option'"):
        METHODS[name].build_config(no_such_option=1)
