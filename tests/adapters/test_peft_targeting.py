"""Which modules get an adapter, and of which rank: every way in which PEFT lets a user say so; what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from curvelora import LoranConfig, UserError
from curvelora.methods.loran import LoranLayer


def adapted(model) -> dict[str, LoranLayer]:
    """Module name, as in the base model -> adapter layer."""
    return {
        name.removeprefix("base_model.model.model."): m
        for name, m in model.named_modules()
        if isinstance(m, LoranLayer)
    }


def config(**options) -> LoranConfig:
    return LoranConfig(**(dict(r=4, alpha=8) | options))


Q = [f"layers.{i}.self_attn.q_proj" for i in range(2)]
V = [f"layers.{i}.self_attn.v_proj" for i in range(2)]
ATTENTION = [f"layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"]
MLP = [f"layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Q + V),  # PEFT's default for Llama
        ({"target_modules": ["q_proj", "v_proj"]}, Q + V),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, Q[1:]),
        ({"target_modules": r".*\.1\.self_attn\.(q|v)_proj"}, [Q[1], V[1]]),
        ({"target_modules": "all-linear"}, ATTENTION + MLP),  # not the output head
        ({"target_modules": "all-linear", "exclude_modules": ["gate_proj", "up_proj", "down_proj"]}, ATTENTION),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"}, [Q[1], V[1]]),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, [Q[1], V[1]]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, Q[:1]),
    ],
)
def test_chosen_modules(llama, options, expected):
    assert sorted(adapted(get_peft_model(llama(), config(**options)))) == sorted(expected)


def test_rank_and_alpha_patterns(llama):
    model = get_peft_model(
        llama(),
        config(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={"v_proj": 32},
        ),
    )
    ranks = {name: layer.factors("default")[0].shape[0] for name, layer in adapted(model).items()}
    scales = {name: layer.configs["default"].delta_map().scale for name, layer in adapted(model).items()}
    assert ranks == {Q[0]: 2, Q[1]: 4, V[0]: 4, V[1]: 4}
    assert scales == {Q[0]: 8 / 2, Q[1]: 8 / 4, V[0]: 32 / 4, V[1]: 32 / 4}


def test_patterns_survive_saving(llama, token_ids, randomise, tmp_path):
    from peft import PeftModel

    model = get_peft_model(llama(), config(target_modules=["q_proj"], rank_pattern={r"layers\.1\..*": 2}))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, model.eval()(token_ids).logits)


def test_gpt2_conv1d_is_stored_transposed_and_works_alike(token_ids, randomise):
    """Conv1D keeps (d_in, d_out): forward, gradients and merge against nn.Linear with the same weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()
    model = get_peft_model(base, config(target_modules=["c_attn"], dropout=0.0)).eval()
    randomise(model)
    (layer,) = [m for m in model.modules() if isinstance(m, LoranLayer)]
    assert (layer.in_features, layer.out_features) == (32, 96) and layer.delta_weight("default").shape == (96, 32)
    x = torch.randn(3, 32)
    expected = nn.functional.linear(x, layer.base_layer.weight.T + layer.delta_weight("default"), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        before = model(token_ids).logits
        model.merge_adapter()
        torch.testing.assert_close(model(token_ids).logits, before, rtol=1e-5, atol=1e-5)


def test_a_new_head_is_trained_and_saved_with_the_adapter(bert, token_ids, randomise, tmp_path):
    from peft import PeftModel

    model = get_peft_model(bert(), config(target_modules=["query", "value"], modules_to_save=["classifier"]))
    randomise(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("classifier" in name for name in trainable) == 2 and sum("loran_" in name for name in trainable) == 8
    model.base_model.model.classifier.modules_to_save["default"].weight.data.mul_(3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(token_ids).logits, model.eval()(token_ids).logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"r": 65, "target_modules": ["v_proj"]},
            r"r=65 is above min\(d_in, d_out\)=64 of module .*v_proj.*write r <= 64",
        ),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens' is a Embedding.*leave it out of target_modules"),
        ({"target_modules": ["input_layernorm"]}, r"input_layernorm' is a LlamaRMSNorm.*linear layers only"),
    ],
)
def test_a_module_that_cannot_be_adapted(llama, options, said):
    with pytest.raises(UserError, match=said):
        get_peft_model(llama(), config(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "at least 1, not 0"),
        ({"r": 2.5}, "whole number of at least 1, not 2.5"),
        ({"r": True}, "not True"),
        ({"rank_pattern": {"q": -1}}, "not -1"),
        ({"alpha": 0}, "positive number, not 0"),
        ({"alpha": "16"}, "not '16'"),
        ({"alpha": float("nan")}, "not nan"),
        ({"alpha": float("inf")}, "not inf"),
        ({"alpha_pattern": {"q": -2}}, "not -2"),
        ({"dropout": 1.0}, "below 1, not 1.0"),
        ({"dropout": -0.1}, "not -0.1"),
        ({"amplitude": -1e-5}, "amplitude must be a non-negative number, not -1e-05"),
        ({"amplitude": float("nan")}, "not nan"),
        ({"frequency": 0}, "frequency must be a positive number, not 0"),
        ({"frequency": True}, "not True"),
        ({"init_B_std": "small"}, "init_B_std must be a non-negative number, not 'small'"),
        ({"activation": "sinner"}, "unknown activation 'sinner'; did you mean 'sinter'"),
        ({"scale_position": "outsid"}, "did you mean 'outside'"),
        ({"layers_pattern": "layers"}, "give layers_to_transform as well"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "needs target_modules as a list"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_the_value(options, said):
    with pytest.raises(UserError, match=said):
        LoranConfig(**options)
