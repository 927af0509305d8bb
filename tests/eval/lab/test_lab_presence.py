"""Presence: against the published table of Sinter's numbers, hand-computed cases and explicit least squares."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from curvelora import AuroraConfig, LoranConfig, RanloraConfig, UserError
from curvelora.activations import Activation
from curvelora.grid_monitor import GridMonitor
from curvelora.layers.dense_delta import DeltaMap
from curvelora.methods.aurora import AuroraLayer
from curvelora.methods.ranlora import RanloraLayer
from curvelora_eval.lab.presence import (
    activation_space_presence,
    capture_inputs,
    measure_presence,
    summarise_presence,
    weight_space_presence,
)

torch.set_num_threads(1)

BF16 = torch.bfloat16
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
QUANTILES = ("p05", "p25", "p50", "p75", "p95", "max")


def sinter(amplitude: float = 5e-5, scale: float = 0.25, inside: bool = False) -> DeltaMap:
    return DeltaMap(Activation("sinter", amplitude), scale, inside)


def draw(std_u: float, d_out: int = 256, d_in: int = 512, r: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """A, B with entries of BA of that standard deviation, and inputs x."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
    return A, B * std_u / math.sqrt(r), torch.randn(64, d_in, generator=generator)


# --- weight space ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decade", "rms", "at_rest", "correlation"),
    # amplitude 5e-5, frequency 1e4, log-uniform |x| of both signs, first rounded to bf16: computed beforehand, elsewhere
    [(-5, 3.9e-5, 1.0, None), (-4, 1.7e-4, 1.0, None), (-3, 1.6e-3, 0.88, 0.68), (-2, 1.6e-2, 0.152, 0.55)],
)
def test_the_table_of_sinter_s_derivative(decade, rms, at_rest, correlation):
    """A = 1 and B = x make u = x, so the naive path is the elementwise kernel of the table."""
    generator = torch.Generator().manual_seed(0)
    x = 10 ** (decade + torch.rand(200_000, generator=generator, dtype=torch.float64))
    x = (x * torch.randn(x.shape, generator=generator).sign()).to(BF16).float()
    found = weight_space_presence(torch.ones(1, 1), x[:, None], sinter(scale=1.0), BF16)
    assert found["entries"] == 200_000 and found["forward"] == 0  # f(x) = x in every entry, as the table says
    assert found["slope_rms"] == pytest.approx(rms, rel=0.03)
    assert found["slope_at_rest"]["naive_bf16"] == pytest.approx(at_rest, abs=3e-3)
    assert found["slope_correlation"]["naive_bf16"] == pytest.approx(correlation, abs=0.01)
    assert found["slope_correlation"]["fp32"] > 0.999999 and found["slope_at_rest"]["fp32"] < 1e-3


@pytest.mark.parametrize("std_u", [1e-3, 3e-3, 1e-2])
def test_the_published_sinter_on_factors(std_u):
    A, B, x = draw(std_u)
    found = weight_space_presence(A, B, sinter(), BF16, x)
    assert found["std_u"] == pytest.approx(std_u, rel=0.02)
    assert 0 < found["forward"] < 0.01
    assert found["derivative"] > 0.999
    assert found["output_ratio"]["exact"] == pytest.approx(3.5e-5, rel=0.04)  # a times the rms of sin
    correlation = found["slope_correlation"]
    assert correlation["fp32"] > 0.9999
    assert 0 < correlation["naive_bf16"] < 0.85
    assert correlation["naive_bf16"] < correlation["rounded_bf16"] < 0.95
    # |f' - 1| <= a w |u| leaves the half-spacing of bf16 below 1, 2^-9, only for |u| > 3.8e-3
    beyond = ((B @ A).abs() > 3.8e-3).double().mean().item()
    assert 1 - beyond <= found["slope_at_rest"]["rounded_bf16"] < 1


def test_the_naive_path_rounds_the_factors_too():
    """f' in bf16 from B.bfloat16() @ A.bfloat16(), each step rounded, against fp64, correlated by NumPy."""
    A, B, _ = draw(1e-2)
    u = B.bfloat16() @ A.bfloat16()
    phase = (1e4 * u.float()).to(BF16).float()
    first = (1 + (5e-5 * torch.sin(phase).to(BF16).float()).to(BF16).float()).to(BF16).float()
    second = ((5e-5 * phase).to(BF16).float() * torch.cos(phase).to(BF16).float()).to(BF16).float()
    low = (first + second).to(BF16).double()
    v = 1e4 * (B.double() @ A.double())
    exact = 1 + 5e-5 * torch.sin(v) + 5e-5 * v * torch.cos(v)
    wanted = np.corrcoef(low.flatten().numpy(), exact.flatten().numpy())[0, 1]
    found = weight_space_presence(A, B, sinter(), BF16)
    assert found["slope_correlation"]["naive_bf16"] == pytest.approx(wanted, abs=1e-6)
    assert found["slope_at_rest"]["naive_bf16"] == pytest.approx((low == 1).double().mean().item(), abs=1e-6)


def test_a_louder_sinter_is_there():
    A, B, x = draw(1e-2)
    found = weight_space_presence(A, B, sinter(2e-2), BF16, x)
    assert found["forward"] > 0.9
    assert found["output_ratio"]["exact"] == pytest.approx(2e-2 / math.sqrt(2), rel=0.03)
    # rounding two matrices to bf16 adds 2.4e-3, in quadrature
    assert found["output_ratio"]["rounded"] == pytest.approx(2e-2 / math.sqrt(2), rel=0.04)
    in_fp32 = weight_space_presence(A, B, sinter(2e-2), torch.float32, x)
    assert in_fp32["output_ratio"]["rounded"] == pytest.approx(in_fp32["output_ratio"]["exact"], rel=1e-4)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_identity_has_exactly_none(dtype):
    A, B, x = draw(1e-2)
    found = weight_space_presence(A, B, DeltaMap(Activation("identity"), 0.25), dtype, x)
    assert found["forward"] == found["derivative"] == found["slope_rms"] == 0
    assert found["output_ratio"] == {"exact": 0.0, "rounded": 0.0}
    assert found["slope_correlation"] == {"naive_bf16": None, "rounded_bf16": None, "fp32": None}
    assert found["slope_at_rest"] == {"naive_bf16": 1.0, "rounded_bf16": 1.0, "fp32": 1.0}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["sinter", "cos", "silu", "sigmoid", "gaussian"])
def test_output_ratio_and_slope_entry_by_entry(name, inside):
    """fp64, from the formulas written out; sigmoid's constant f(0) counts as part of what f adds."""
    functions = {
        "sinter": (lambda v: 0.02 * v * math.sin(30 * v) + v, 1.0),
        "cos": (lambda v: v * math.cos(30 * v) + v, 2.0),
        "silu": (lambda v: v / (1 + math.exp(-v)), 0.5),
        "sigmoid": (lambda v: 1 / (1 + math.exp(-v)), 0.25),
        "gaussian": (lambda v: 0.5 * v * math.exp(-v * v), 0.5),
    }
    f, at_zero = functions[name]
    A, B, x = (t.double() for t in draw(0.7, d_out=6, d_in=7, r=2))
    s = 0.5
    found = weight_space_presence(A, B, DeltaMap(Activation(name, 0.02, 30.0), s, inside), torch.float64, x)
    bent, line, slopes, arguments = np.zeros((6, 7)), np.zeros((6, 7)), [], []
    for i in range(6):
        for j in range(7):
            u = sum(B[i, k].item() * A[k, j].item() for k in range(2))
            v = s * u if inside else u
            line[i, j] = s * at_zero * u
            bent[i, j] = (f(v) if inside else s * f(v)) - line[i, j]
            slopes.append((f(v + 1e-5) - f(v - 1e-5)) / 2e-5 / at_zero - 1)
            arguments.append(abs(v) * (30 if name in ("sinter", "cos") else 1))
    outputs = bent @ x.numpy().T, line @ x.numpy().T
    wanted = np.linalg.norm(outputs[0]) / np.linalg.norm(outputs[1])
    assert found["output_ratio"]["exact"] == pytest.approx(wanted, rel=1e-9) and wanted > 1e-3
    assert found["slope_rms"] == pytest.approx(np.sqrt(np.mean(np.square(slopes))), rel=1e-6)
    assert list(found["phase"]) == list(QUANTILES)
    for key, share in zip(QUANTILES, (0.05, 0.25, 0.5, 0.75, 0.95, 1.0), strict=True):
        assert found["phase"][key] == pytest.approx(np.quantile(arguments, share), rel=1e-9)


@pytest.mark.parametrize(("inside", "v"), [(False, 2.0), (True, 1.0)])
def test_tanh_of_one_number(inside, v):
    """u = 2 everywhere and s = 1/2: s tanh 2 - s 2, or tanh 1 - 1; f' / f'(0) - 1 = -tanh^2."""
    found = weight_space_presence(
        torch.ones(1, 3), torch.full((4, 1), 2.0), DeltaMap(Activation("tanh"), 0.5, inside), BF16, torch.ones(2, 3)
    )
    assert found["output_ratio"]["exact"] == pytest.approx((v - math.tanh(v)) / v, rel=1e-12)
    assert found["slope_rms"] == pytest.approx(math.tanh(v) ** 2, rel=1e-12)
    assert set(found["phase"].values()) == {v}
    assert found["forward"] == found["derivative"] == 1 and found["std_u"] == 0
    assert set(found["slope_correlation"].values()) == {None}  # constant over entries


def test_what_is_not_defined_is_none():
    A, B, x = draw(1.0, d_out=8, d_in=16)
    relu = weight_space_presence(A, B, DeltaMap(Activation("relu"), 1.0), BF16, x)
    assert relu["slope_rms"] is None and relu["output_ratio"] == {"exact": None, "rounded": None}  # f'(0) = 0
    assert relu["slope_correlation"]["fp32"] == pytest.approx(1.0)
    start = weight_space_presence(A, torch.zeros_like(B), sinter(), BF16, x)
    assert start["output_ratio"] == {"exact": None, "rounded": None} and start["slope_rms"] == 0
    assert start["forward"] == start["derivative"] == 0 and start["phase"]["max"] == 0
    assert weight_space_presence(A, B, sinter(), BF16)["output_ratio"] == {"exact": None, "rounded": None}
    broken = weight_space_presence(A, B * math.nan, sinter(), BF16, x)
    json.dumps(broken, allow_nan=False)
    assert broken["slope_rms"] is None and broken["phase"]["p50"] is None


def test_rows_are_sampled():
    A, B, x = draw(1e-2)
    found = weight_space_presence(A, B, sinter(2e-2), BF16, x, max_entries=32 * 512)
    assert found["entries"] == 32 * 512
    chosen = [round(i * 255 / 31) for i in range(32)]
    explicit = weight_space_presence(A, B[chosen], sinter(2e-2), BF16, x)
    assert found == explicit and found != weight_space_presence(A, B, sinter(2e-2), BF16, x)


# --- activation space --------------------------------------------------------------------------------------------------


def ranlora(d_in: int = 12, d_out: int = 9, **options) -> RanloraLayer:
    torch.manual_seed(0)
    layer = RanloraLayer(nn.Linear(d_in, d_out), "layer")
    layer.add_adapter("default", RanloraConfig(**({"r": 3, "init": "K", "target_modules": ["layer"]} | options)))
    _, B = layer.factors("default")
    B.data.normal_()
    if options.get("use_v", True):
        layer.ranlora_v["default"].data = torch.linspace(0.5, 1.5, B.shape[1])
    return layer.eval()


def aurora(d_in: int = 12, d_out: int = 9, **options) -> AuroraLayer:
    torch.manual_seed(0)
    layer = AuroraLayer(nn.Linear(d_in, d_out), "layer")
    layer.add_adapter("default", AuroraConfig(**({"r": 3, "alpha": 6, "target_modules": ["layer"]} | options)))
    layer.factors("default")[1].data.normal_()
    return layer.eval()


def inputs(d_in: int = 12, tokens: int = 200, size: float = 2.0) -> Tensor:
    return torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(5)) * size


def ranlora_map(layer: RanloraLayer):
    v = layer.ranlora_v["default"].double()
    return lambda z: 2 * v * (0.5 * z * (1 + torch.erf(z / math.sqrt(2))))


def aurora_map(layer: AuroraLayer):
    H, w = layer.aurora_H["default"].double(), layer.aurora_spline["default"].double()
    grid = layer.configs["default"].grid()
    return lambda z: 2 * (torch.tanh(torch.tanh(z) @ H.T) + grid.basis(z).sum(-2) @ w.T)


@pytest.mark.parametrize(
    ("build", "formula"), [(ranlora, ranlora_map), (aurora, aurora_map)], ids=["ranlora", "aurora"]
)
def test_shares_against_least_squares(build, formula):
    layer, x = build(), inputs()
    A, B = (t.detach().double().numpy() for t in layer.factors("default"))
    z = x.double().numpy() @ A.T
    with torch.no_grad():
        m = formula(layer)(torch.from_numpy(z)).numpy()
    design = np.hstack([z, np.ones((200, 1))])
    residual = m - design @ np.linalg.lstsq(design, m, rcond=None)[0]
    zero = torch.zeros(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(formula(layer), zero).detach().numpy()
    beyond = m - formula(layer)(zero).detach().numpy() - z @ jacobian.T
    norm = np.linalg.norm
    found = activation_space_presence(layer, x)
    wanted = {
        "nonlinear_share": math.sqrt(200 / 196) * norm(residual @ B.T) / norm(m @ B.T),
        "nonlinear_share_bottleneck": math.sqrt(200 / 196) * norm(residual) / norm(m),
        "linear_from_zero": norm(beyond @ B.T) / norm(m @ B.T),
        "linear_from_zero_bottleneck": norm(beyond) / norm(m),
    }
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-8) and value > 0.05, key
    assert found["z_abs"]["p75"] == pytest.approx(np.quantile(np.abs(z), 0.75), rel=1e-9)
    assert found["z_abs"]["max"] == pytest.approx(np.abs(z).max(), rel=1e-9)
    assert (found["samples"], found["entries"], found["applied_to"]) == (200, 600, "tokens")


def test_a_linear_bottleneck_has_none():
    for scale_position in ("outside", "inside"):
        found = activation_space_presence(ranlora(activation="identity", scale_position=scale_position), inputs())
        for key in ("nonlinear_share", "linear_from_zero"):
            assert found[key] < 1e-12 and found[f"{key}_bottleneck"] < 1e-12


def test_a_saturated_tanh_by_hand():
    """z = -10, 10, 30 give m = s (-1, 1, 1): the best line leaves (-1, 2, -1) s / 3, which is sqrt(2) / 3 of m.

    Three samples and two unknowns make that sqrt(3) times as much.
    """
    layer = ranlora(d_in=1, d_out=1, r=1, activation="tanh", use_v=False)
    A, _ = layer.factors("default")
    A.data.fill_(10.0)
    found = activation_space_presence(layer, torch.tensor([[-1.0], [1.0], [3.0]]))
    assert found["nonlinear_share"] == pytest.approx(math.sqrt(3) * math.sqrt(2) / 3, rel=1e-7)
    # what is left of s (-1, 1, 1) without s z: s (9, -9, -29)
    assert found["linear_from_zero"] == pytest.approx(math.sqrt(81 + 81 + 841) / math.sqrt(3), rel=1e-7)
    assert found["z_abs"]["p50"] == 10 and found["z_abs"]["max"] == 30


def test_small_inputs_are_nearly_linear():
    """gelu is z/2 + z^2 / sqrt(2 pi) near zero: the share falls with the inputs."""
    shares = [activation_space_presence(ranlora(), inputs(size=size))["linear_from_zero"] for size in (1e-3, 1e-2)]
    assert shares[1] == pytest.approx(10 * shares[0], rel=1e-2) and shares[0] < 2e-3


def test_relu_has_no_slope_at_zero():
    found = activation_space_presence(ranlora(activation="relu"), inputs())
    assert found["linear_from_zero"] == 1 and 0.1 < found["nonlinear_share"] < 1


def test_static_aurora_bends_the_columns_of_A():
    layer = aurora(mode="static")
    found = activation_space_presence(layer, None)
    columns = layer.factors("default")[0].detach().T
    assert found["applied_to"] == "columns" and found["samples"] == 12
    dynamic = aurora()
    dynamic.factors("default")[0].data = torch.eye(3)
    on_columns = activation_space_presence(dynamic, columns)  # z = x
    # the columns are no sample: twelve tokens are, and fit four unknowns
    exact = math.sqrt(8 / 12) * on_columns["nonlinear_share_bottleneck"]
    assert found["nonlinear_share_bottleneck"] == pytest.approx(exact, rel=1e-9)


def test_undefined_shares():
    few = activation_space_presence(ranlora(), inputs(tokens=4))  # four samples, four unknowns an output
    assert few["nonlinear_share"] is None and few["linear_from_zero"] > 0
    layer = ranlora()
    layer.factors("default")[1].data.zero_()
    start = activation_space_presence(layer, inputs())
    assert start["nonlinear_share"] is None and start["nonlinear_share_bottleneck"] > 0
    broken = activation_space_presence(ranlora(), inputs() * math.nan)
    json.dumps(broken, allow_nan=False)
    assert broken["nonlinear_share"] is None and broken["linear_from_zero"] is None


# --- models ------------------------------------------------------------------------------------------------------------

METHODS = {
    "lora": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, **TARGETS),
    "loran": LoranConfig(r=4, alpha=8, dropout=0.5, **TARGETS),
    "ranlora": RanloraConfig(r=4, dropout=0.5, **TARGETS),
    "aurora": AuroraConfig(r=4, alpha=8, dropout=0.5, **TARGETS),
}
NAMES = [f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv"]


def llama(method: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), copy.deepcopy(METHODS[method]))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    return model


def padded() -> dict[str, Tensor]:
    """Two rows of 9 positions, of which 9 and 4 are no padding."""
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 4:] = mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_the_layers_own(method):
    model, batch = llama(method).train(), padded()
    captured = capture_inputs(model, batch)
    assert list(captured) == NAMES and model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    inner = model.get_base_model().model
    hidden = inner.layers[0].input_layernorm(inner.embed_tokens(batch["input_ids"]))
    wanted = torch.cat([hidden[0], hidden[1, :4]]).detach()
    torch.testing.assert_close(captured[NAMES[0]], wanted, rtol=1e-6, atol=1e-6)
    assert captured[NAMES[0]].dtype == torch.float32 and not captured[NAMES[0]].requires_grad
    assert captured[NAMES[2]].shape == (13, 32)
    again = capture_inputs(model, batch)  # no dropout, so the deeper layer sees the same
    assert torch.equal(again[NAMES[2]], captured[NAMES[2]])
    few = capture_inputs(model, batch, tokens=3, layers=[NAMES[1]])
    assert list(few) == [NAMES[1]] and torch.equal(few[NAMES[1]], captured[NAMES[1]][[0, 6, 12]])


def test_hooks_go_after_a_failure():
    model = llama("loran")
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        capture_inputs(model, {"attention_mask": torch.ones(1, 2)})
    assert not any(module._forward_pre_hooks for module in model.modules()) and model.training
    with pytest.raises(UserError, match=r"'model.layers.7' is no adapted layer"):
        capture_inputs(model, padded(), layers=["model.layers.7"])
    with pytest.raises(UserError, match="at least 1, not 0"):
        capture_inputs(model, padded(), tokens=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_layer_by_layer(method):
    model = llama(method).train()
    monitor = GridMonitor(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = measure_presence(model, capture_inputs(model, padded()), BF16)
    assert model.training and monitor.counts is None
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    if method == "lora":
        assert found == {} and summarise_presence(found) is None
        return
    assert list(found) == NAMES
    json.dumps(found, allow_nan=False)
    layer = model.get_submodule(f"base_model.model.{NAMES[1]}")
    x = capture_inputs(model, padded())[NAMES[1]]
    if method == "loran":
        explicit = weight_space_presence(*layer.factors("default"), layer.configs["default"].delta_map(), BF16, x)
    else:
        explicit = activation_space_presence(layer.eval(), x)
    assert found[NAMES[1]] == explicit
    without = measure_presence(model, {}, BF16)
    assert len(without) == (4 if method == "loran" else 0)
    assert measure_presence(model, {}, BF16, adapter="other") == {}


def test_summary_by_hand():
    layers = {
        "m.0.q_proj": {
            "space": "weight",
            "forward": 0.1,
            "slope_rms": None,
            "output_ratio": {"exact": 1.0, "rounded": None},
        }
        | {"entries": 100, "dtype": "bfloat16"},
        "m.0.v_proj": {
            "space": "weight",
            "forward": 0.5,
            "slope_rms": 2.0,
            "output_ratio": {"exact": 3.0, "rounded": None},
        }
        | {"entries": 300, "dtype": "bfloat16"},
        "m.1.v_proj": {
            "space": "weight",
            "forward": 0.3,
            "slope_rms": 4.0,
            "output_ratio": {"exact": None, "rounded": None},
        }
        | {"entries": 100, "dtype": "bfloat16"},
    }
    found = summarise_presence(layers)
    # (10 + 150 + 30) / 500; (600 + 400) / 400; (100 + 900) / 400
    assert found["forward"] == pytest.approx(0.38)
    assert found["slope_rms"] == pytest.approx(2.5)
    assert found["output_ratio"] == {"exact": pytest.approx(2.5), "rounded": None}
    assert (found["layers"], found["entries"], found["dtype"], found["space"]) == (3, 500, "bfloat16", "weight")
    assert found["median"] == {"forward": 0.3, "slope_rms": 3.0, "output_ratio": {"exact": 2.0, "rounded": None}}
    assert list(found["types"]) == ["q_proj", "v_proj"]
    v = found["types"]["v_proj"]
    assert (v["layers"], v["entries"], v["forward"]) == (2, 400, pytest.approx(0.45))
    assert found["types"]["q_proj"]["slope_rms"] is None


@pytest.mark.parametrize("method", ["loran", "ranlora", "aurora"])
def test_the_summary_of_a_model_has_its_layers_keys(method):
    model = llama(method)
    layers = measure_presence(model, capture_inputs(model, padded()), BF16)
    found = summarise_presence(layers)
    json.dumps(found, allow_nan=False)
    assert set(found) == {*layers[NAMES[0]], "layers", "median", "types"} - {"samples"}
    assert set(found["types"]) == {"q_proj", "v_proj"} and found["types"]["v_proj"]["layers"] == 2
    key = "forward" if method == "loran" else "nonlinear_share"
    low, high = (pick(record[key] for record in layers.values()) for pick in (min, max))
    assert low <= found[key] <= high and low <= found["median"][key] <= high
