"""Resolvability: the share of entries on which f changes the rounded tensor that enters a product."""

from __future__ import annotations

import math

import pytest
import torch

import curvelora
from curvelora.activations import NAMES, Activation
from curvelora.layers import dense_delta
from curvelora.layers.dense_delta import DeltaMap
from curvelora.resolvability import Resolvability, measure_resolvability, model_resolvability, summarise

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def draw_factors(std_u: float, d_out: int = 192, d_in: int = 256, r: int = 16):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(r, d_in, generator=generator)
    return A, torch.randn(d_out, r, generator=generator) * std_u / math.sqrt(r)


def sinter(amplitude: float = 5e-5, scale: float = 0.25, inside: bool = False) -> DeltaMap:
    return DeltaMap(Activation("sinter", amplitude=amplitude), scale, inside)


def rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float64).to(torch.float32).to(dtype).item()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_against_a_count_entry_by_entry(with_base, inside):
    """fp64 factors, Python floats, one entry at a time; an amplitude at which some entries change and some do not."""
    A, B = (t.double() for t in draw_factors(1e-2, d_out=9, d_in=11, r=2))
    a, s = 3e-3, 0.5
    W0 = torch.randn(9, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-2
    forward = slope = 0
    for i in range(9):
        for j in range(11):
            u = sum(B[i, k].item() * A[k, j].item() for k in range(2))
            v = s * u if inside else u
            curved = a * v * math.sin(1e4 * v) + v
            dW = curved if inside else s * curved
            w = W0[i, j].item() if with_base else 0.0
            forward += rounded(w + dW, BF16) != rounded(w + s * u, BF16)
            slope += rounded(s * (1 + a * math.sin(1e4 * v) + a * 1e4 * v * math.cos(1e4 * v)), BF16) != rounded(
                s, BF16
            )
    measured = measure_resolvability(
        A, B, sinter(a, s, inside), BF16, derivative_dtype=BF16, base_weight=W0 if with_base else None
    )
    assert 0 < forward < 99 and 0 < slope < 99
    assert (measured.forward, measured.derivative) == (forward / 99, slope / 99)
    assert measured.entries == 99
    assert measured.std_u == pytest.approx((B @ A).std(correction=0).item(), rel=1e-6)
    assert (measured.dtype, measured.derivative_dtype) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("std_u", [1e-3, 1e-2])
@pytest.mark.parametrize(("dtype", "low", "high"), [(BF16, 0, 0.02), (FP16, 0, 0.15), (FP32, 0.99, 1)])
def test_the_published_setting_is_hardly_there_in_half_precision(std_u, dtype, low, high):
    """|f(u) - u| <= 5e-5 |u| crosses a boundary of bf16 (spacing 4e-3 to 8e-3 of u) in under 2 % of the entries."""
    measured = measure_resolvability(*draw_factors(std_u), sinter(), dtype)
    assert low <= measured.forward <= high
    assert measured.derivative > 0.99  # f' multiplies g^T x in fp32
    assert measured.std_u == pytest.approx(std_u, rel=0.25)


def test_adding_to_a_bf16_base_first_swallows_f():
    """W0 is ten to a hundred times dW, so its spacing is that much coarser."""
    W0 = torch.randn(192, 256, generator=torch.Generator().manual_seed(2)) * 0.05
    alone = measure_resolvability(*draw_factors(1e-3), sinter(), BF16)
    added = measure_resolvability(*draw_factors(1e-3), sinter(), BF16, base_weight=W0)
    assert added.forward < 1e-3 and added.forward < alone.forward


def test_a_louder_sinter_is_there_in_bf16():
    assert measure_resolvability(*draw_factors(1e-2), sinter(amplitude=2e-2), BF16).forward > 0.5


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_identity_has_none(dtype):
    measured = measure_resolvability(
        *draw_factors(1e-2), DeltaMap(Activation("identity"), 0.25), dtype, derivative_dtype=dtype
    )
    assert measured.forward == 0 and measured.derivative == 0


@pytest.mark.parametrize("name", [n for n in NAMES if n != "identity"])
def test_every_other_activation_has_some_in_fp32(name):
    measured = measure_resolvability(*draw_factors(0.3), DeltaMap(Activation(name), 0.25), FP32)
    assert measured.forward > 0.4 and measured.derivative > 0.4  # relu: the positive half


def test_the_derivative_in_bf16_is_coarser_than_in_fp32():
    """methods.md 3.4: in bf16 f' leaves 1 only for |u| above 3.8e-3."""
    coarse = measure_resolvability(*draw_factors(1e-3), sinter(), BF16, derivative_dtype=BF16)
    assert coarse.derivative < 0.01
    assert measure_resolvability(*draw_factors(1e-2), sinter(), BF16, derivative_dtype=BF16).derivative > 0.2


def test_sampled_rows_are_close_to_all_rows():
    A, B = draw_factors(1e-2)
    W0 = torch.zeros(192, 256)
    everything = measure_resolvability(A, B, sinter(2e-3), BF16)
    sampled = measure_resolvability(A, B, sinter(2e-3), BF16, max_rows=32, base_weight=W0)
    assert sampled.entries == 32 * 256
    assert sampled.forward == pytest.approx(everything.forward, abs=0.03)
    assert sampled.std_u == pytest.approx(everything.std_u, rel=0.3)
    assert measure_resolvability(A, B, sinter(2e-3), BF16, max_rows=1000) == everything


def test_blocks_do_not_change_the_count(monkeypatch):
    A, B = draw_factors(1e-2)
    whole = measure_resolvability(A, B, sinter(2e-3), BF16)
    monkeypatch.setattr(dense_delta, "BLOCK_ENTRIES", 1000)
    assert measure_resolvability(A, B, sinter(2e-3), BF16).forward == pytest.approx(whole.forward, abs=1e-3)


def test_a_model_is_measured_layer_by_layer(llama, randomise):
    from peft import get_peft_model

    model = get_peft_model(llama(), curvelora.LoranConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    measured = model_resolvability(model, BF16, max_entries_per_layer=128 * 16)
    assert len(measured) == 4 and all(name.endswith(("q_proj", "v_proj")) for name in measured)
    assert {m.entries for m in measured.values()} == {128 * 16}
    assert model_resolvability(model, BF16, adapter="other") == {}
    assert model_resolvability(llama(), BF16) == {}


def test_summary_weighs_layers_by_their_entries():
    """(0.1 * 100 + 0.5 * 300) / 400 = 0.4, and so on."""
    small = Resolvability(0.1, 1.0, 0.02, 100, "bfloat16", "float32")
    large = Resolvability(0.5, 0.6, 0.06, 300, "bfloat16", "float32")
    summary = summarise({"a": small, "b": large})
    assert summary["forward"] == pytest.approx(0.4)
    assert summary["derivative"] == pytest.approx(0.7)
    assert summary["std_u"] == pytest.approx(0.05)
    assert (summary["layers"], summary["dtype"], summary["derivative_dtype"]) == (2, "bfloat16", "float32")
    assert small.as_dict()["entries"] == 100
    with pytest.raises(ValueError, match="no weight-space layer"):
        summarise({})
