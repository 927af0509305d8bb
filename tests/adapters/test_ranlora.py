"""RanLoRA: what the init removes, where the scale enters, and what is stored."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from curvelora import RanloraConfig, UserError
from curvelora.methods.ranlora import RanloraLayer

D_OUT, D_IN = 53, 37
X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def build(seed: int = 0, base: nn.Module | None = None, **options) -> RanloraLayer:
    """One layer over a random frozen nn.Linear, in evaluation mode."""
    torch.manual_seed(seed)
    layer = RanloraLayer((base or nn.Linear(D_IN, D_OUT)).requires_grad_(False), "layer")
    layer.add_adapter("default", RanloraConfig(**({"r": 3, "alpha": 6} | options)))
    return layer.eval()


def full_svd_part(weight: torch.Tensor, r: int, init: str) -> torch.Tensor:
    """W_R of the paper's equations, by a full SVD in fp64."""
    U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    chosen = slice(-r, None) if init == "R" else slice(r)
    return (U[:, chosen] * S[chosen]) @ Vt[chosen]


PHI = {
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
    "relu": lambda z: z.clamp(min=0),
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


@pytest.mark.parametrize("factor_scaling", ["sqrt", "divided"])
@pytest.mark.parametrize("scale_position", ["outside", "inside", "none"])
@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("init", ["R", "P"])
def test_the_start_is_the_paper_s_equation(init, activation, scale_position, factor_scaling):
    """h = W_P x + s B(v * phi(A x)), W_P = W0 - U_R S_R V_R^T, from the weight alone: the layer's tensors are not looked at."""
    options = dict(activation=activation, scale_position=scale_position, factor_scaling=factor_scaling)
    layer = build(init=init, **options).double()
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    removed = full_svd_part(weight.float(), 3, init)
    U, S, Vt = torch.linalg.svd(removed)
    s = 1.0 if scale_position == "none" else 2.0
    inside, outside = (s, 1.0) if scale_position == "inside" else (1.0, s)
    root = (S[:3] / (s if factor_scaling == "divided" else 1.0)).sqrt()
    z = X @ (root[:, None] * Vt[:3]).T
    # the sign of a pair (u, v) is free, and phi is not odd: take the layer's
    signs = torch.sign((layer.ranlora_A["default"] * Vt[:3]).sum(1))
    adapted = (outside * PHI[activation](inside * z * signs) * signs) @ (U[:, :3] * root).T
    expected = X @ (weight - removed).T + bias + adapted
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-6)  # the factors are stored in fp32


@pytest.mark.parametrize("init", ["R", "P"])
def test_what_is_removed_is_what_the_factors_carry(init):
    layer = build(init=init)
    A0, B0 = layer.removed("default")
    A, B = layer.factors("default")
    assert torch.equal(A, A0) and torch.equal(B, B0) and A.dtype == A0.dtype == torch.float32
    assert torch.equal(layer.ranlora_v["default"], torch.ones(3))
    removed = full_svd_part(layer.base_layer.weight, 3, init)
    assert (B0.double() @ A0.double() - removed).norm() / removed.norm() < 1e-6


def test_the_last_triplets_are_the_smallest():
    """A slice that is off by one takes others: the norms tell."""
    values = torch.linalg.svdvals(build().base_layer.weight.double())
    for init, expected in (("R", values[-3:]), ("P", values[:3])):
        A0, B0 = build(init=init).removed("default")
        assert (A0.square().sum(1) - expected).abs().max() < 1e-6
        assert (B0.square().sum(0) - expected).abs().max() < 1e-6


def test_init_k_removes_nothing_and_is_lora_s():
    layer = build(init="K")
    assert layer.removed("default") is None and not any("A0" in name for name in layer.state_dict())
    A, B = layer.factors("default")
    assert (B == 0).all() and A.abs().max() <= D_IN**-0.5 and A.abs().max() > 0.9 * D_IN**-0.5
    assert torch.equal(layer(X.float()), layer.base_layer(X.float()))


def test_the_base_weight_is_never_written():
    base = nn.Linear(D_IN, D_OUT)
    weight = base.weight.detach().clone()
    layer = build(base=base, init="P").train()
    layer(X.float()).sum().backward()
    assert torch.equal(base.weight, weight) and base.weight.grad is None


def test_the_removed_part_trains_not_and_sees_no_dropout():
    layer = build(dropout=0.9)
    for name in ("ranlora_A", "ranlora_B"):
        getattr(layer, name)["default"].data.zero_()
    A0, B0 = layer.removed("default")
    x = X.float()
    expected = layer.base_layer(x) - x @ A0.T @ B0.T
    torch.testing.assert_close(layer.train()(x), expected)  # the adapter itself is zero: dropout has nothing left to do
    assert {name.partition(".")[0] for name, p in layer.named_parameters() if p.requires_grad} == {
        "ranlora_A",
        "ranlora_B",
        "ranlora_v",
    }


def test_without_v_the_start_is_the_same():
    with_v, without = build(), build(use_v=False)
    assert "default" not in without.ranlora_v and torch.equal(with_v(X.float()), without(X.float()))


def test_v_of_zeros_starts_at_the_weight_without_the_removed_part():
    layer = build(v_init="zeros").double()
    A0, B0 = layer.removed("default")
    torch.testing.assert_close(layer(X), layer.base_layer(X) - X @ A0.T @ B0.T)


def test_conv1d_is_read_transposed():
    torch.manual_seed(0)
    conv = Conv1D(D_OUT, D_IN)
    nn.init.normal_(conv.weight)
    linear = nn.Linear(D_IN, D_OUT)
    linear.weight.data, linear.bias.data = conv.weight.data.T.clone(), conv.bias.data.clone()
    torch.testing.assert_close(build(base=conv)(X.float()), build(base=linear)(X.float()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), False),
        (dict(init="K"), True),
        (dict(activation="identity"), False),  # s = 2 gives twice what was removed
        (dict(activation="identity", factor_scaling="divided"), True),
        (dict(activation="identity", scale_position="none"), True),
        (dict(activation="identity", alpha=3), True),
        (dict(activation="identity", alpha=3, v_init="zeros"), False),
        (dict(activation="tanh", factor_scaling="divided"), False),
    ],
)
def test_is_the_base_at_the_start_as_declared(options, expected):
    layer = build(**options).double()
    base = layer.base_layer(X)
    shift = ((layer(X) - base).norm() / base.norm()).item()
    assert layer.configs["default"].is_base_at_start is expected
    assert shift < 1e-6 if expected else shift > 1e-4


@pytest.mark.parametrize(
    ("init", "activation", "expected"),
    [("R", "gelu", 0.0067), ("R", "relu", 0.024), ("R", "tanh", 0.022), ("P", "gelu", 0.39), ("P", "tanh", 0.195)],
)
def test_how_far_the_start_is_from_the_base(init, activation, expected):
    """d = 512, random orthogonal bases, singular values i^-1/2, x ~ N(0, 1), r = 2, s = 2: the figures of docs/methods.md.

    The first by hand: 2 gelu(z) - z = 0.8 z^2 for small z, and z has the standard deviation s_n^1/2.
    """
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(512, 512, generator=generator))[0] for _ in range(2))
    base = nn.Linear(512, 512, bias=False)
    base.weight.data = (U * torch.arange(1, 513) ** -0.5) @ V.T
    layer, x = (
        build(base=base, init=init, activation=activation, r=2, alpha=4),
        torch.randn(2000, 512, generator=generator),
    )
    plain = base(x)
    assert ((layer(x) - plain).norm() / plain.norm()).item() == pytest.approx(expected, rel=0.06)


def test_alpha_follows_the_rank_unless_it_is_given():
    assert RanloraConfig().scale == RanloraConfig(r=8).scale == 2 and RanloraConfig(r=8, alpha=4).scale == 0.5
    patterned = RanloraConfig(r=2, rank_pattern={"q_proj": 16}, alpha_pattern={"v_proj": 6})
    own = {name: patterned.for_module(f"layers.0.{name}") for name in ("q_proj", "k_proj", "v_proj")}
    assert {name: (c.r, c.scale) for name, c in own.items()} == {"q_proj": (16, 2), "k_proj": (2, 2), "v_proj": (2, 3)}
    assert dataclasses.replace(RanloraConfig(r=2), r=8).scale == 2


def test_a_pattern_may_move_the_start():
    """A linear adapter with s = 1 carries what was removed exactly; where a pattern gives another s, it does not."""
    linear = dict(activation="identity", r=2, alpha=2)
    assert RanloraConfig(**linear).is_base_at_start
    assert not RanloraConfig(**linear, rank_pattern={"q_proj": 4}).is_base_at_start
    assert RanloraConfig(**linear, rank_pattern={"q_proj": 4}, factor_scaling="divided").is_base_at_start


def test_a_weight_that_is_not_finite_is_named():
    base = nn.Linear(D_IN, D_OUT)
    base.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"module 'layer' has no factors to start from.*NaN"):
        build(base=base)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "geluu"}, "unknown activation 'geluu'; did you mean 'gelu'"),
        ({"activation": "sinter"}, "known: gelu, relu, tanh, identity"),
        ({"init": "S"}, "init must be one of R, P, K, not 'S'"),
        ({"scale_position": "outsid"}, "did you mean 'outside'"),
        ({"factor_scaling": "root"}, "factor_scaling must be one of sqrt, divided"),
        ({"v_init": "one"}, "did you mean 'ones'"),
        ({"svd_source": "dequantized"}, "did you mean 'dequantised'"),
        ({"init": "K", "v_init": "zeros"}, "nothing would ever train"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": "3r"}, "alpha must be a positive number, not '3r'"),
        ({"alpha": None}, "alpha must be a positive number, not None"),
        ({"use_v": "no"}, "use_v must be true or false, not 'no'"),
        ({"r": "two"}, "rank must be a whole number"),
    ],
)
def test_a_wrong_value_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        RanloraConfig(**options)


def adapted(llama, **options):
    return get_peft_model(llama(), RanloraConfig(**({"target_modules": ["q_proj", "v_proj"]} | options))).eval()


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def test_the_file_restores_the_model_without_any_svd(llama, token_ids, tmp_path, monkeypatch):
    """Signs and near-degenerate tails differ between machines, so what was removed is read and not computed again."""
    model = adapted(llama)
    expected = logits(model, token_ids)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted({name.rpartition(".")[2] for name in stored}) == [
        "ranlora_A",
        "ranlora_A0",
        "ranlora_B",
        "ranlora_B0",
        "ranlora_v",
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["factors_stored"] is True
    assert model.peft_config["default"].factors_stored is False
    monkeypatch.setattr("curvelora.layers.decomposed.cached_triplets", lambda *_: pytest.fail("no SVD is needed"))
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path, **options), token_ids), expected)


def test_a_config_from_a_file_without_the_factors_is_seen_at_once(llama, token_ids, tmp_path):
    adapted(llama).save_pretrained(tmp_path)
    config = RanloraConfig.from_pretrained(tmp_path)
    assert torch.isnan(logits(get_peft_model(llama(), config), token_ids)).all()


def test_stored_factors_of_other_shapes_are_named(llama, tmp_path):
    from safetensors.torch import save_file

    from curvelora.loading import load_adapter

    adapted(llama).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.ranlora_A0"))
    save_file(tensors | {name: torch.zeros(2, 64)}, path)
    with pytest.raises(UserError, match="ranlora_A0 is 2 x 64 in the file and 2 x 128 in the model"):
        load_adapter(llama(), tmp_path)
