"""Each kernel against fp64: odd shapes, ranks that are no power of two, strides, every f, every form of a 4-bit weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from kernel_world import factors, normal, relative, sinter, stored_weight
from torch import Tensor, nn

from curvelora.activations import Activation
from curvelora.kernels import curves
from curvelora.kernels import merged_weight as merged
from curvelora.kernels.factor_gradients import factor_gradients, low_rank_gradients
from curvelora.kernels.merged_weight import merged_weight
from curvelora.kernels.nf4 import codes_of, decoded, why_unreadable
from curvelora.kernels.portable import split, split_product
from curvelora.kernels.rounded_factors import rounded_factors
from curvelora.layers.dense_delta import DeltaMap

# Rounding once to bf16 is off by 2^-9 at most and 1.7e-3 in the norm; two factors of bf16 in a sum by about the same.
ONCE = 2.5e-3


def empty(d_out: int, d_in: int, device: torch.device) -> Tensor:
    """Filled with what no kernel may leave."""
    return torch.full((d_out, d_in), float("nan"), dtype=torch.bfloat16, device=device)


# --- f and u before anything is rounded -------------------------------------------------------------------------------


@triton.jit
def _curve(out, slopes, u, amplitude, frequency, NAME: tl.constexpr, SLOPE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(u + at)
    tl.store(out + at, curves.value(x, NAME, amplitude, frequency))
    if SLOPE:
        tl.store(slopes + at, curves.slope_beyond_zero(x, NAME, amplitude, frequency))


@triton.jit
def _product(out, A, B, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    square = at[:, None] * SIZE + at[None, :]
    a_high, a_low = split(tl.load(A + square))
    b_high, b_low = split(tl.load(B + square))
    tl.store(out + square, split_product(b_high, b_low, a_high, a_low, tl.zeros((SIZE, SIZE), tl.float32)))


@pytest.mark.parametrize("name", curves.NAMES)
def test_every_f_and_its_slope_in_fp32(device: torch.device, name: str) -> None:
    """Near zero, where slopes are small beside f'(0), and far away: to 2e-6 of the largest value in each range."""
    f = Activation(name, 2e-2, 1e4 if name == "sinter" else 3.0)
    for span in (1e-3, 1e-2, 0.2, 0.5, 4.0):
        u = torch.linspace(-span, span, 1024).to(device)
        value, slope = torch.empty_like(u), torch.zeros_like(u)
        _curve[(1,)](value, slope, u, f.amplitude, f.frequency, name, name != "identity", 1024)
        wanted = f.value(u.double())
        # the phase of an fp32 u: w u 2^-24, 2e-3 rad at w u = 4e4
        phase = f.frequency * span * 2**-22 if name in ("sinter", "cos") else 0
        slack = f.amplitude if name == "sinter" else 1.0
        assert (value - wanted).abs().max() <= 2e-6 * wanted.abs().max() + phase * span * slack, span
        if name != "identity":
            at_zero = 0.0 if name == "relu" else f.slope_at_zero
            beyond = f.slope(u.double()) - at_zero
            steep = slack * (1 + f.frequency * span) if phase else 0
            # what is small beside f'(0) must not be lost in it; a GPU's cosine is off by 2^-20
            floor = {"sinter": 0, "tanh": 0, "relu": 0, "cos": 2e-6}.get(name, 5e-7)
            assert (slope - beyond).abs().max() <= 2e-6 * beyond.abs().max() + phase * steep + floor, span


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu"])
def test_one_large_entry_changes_no_small_one(device: torch.device, name: str) -> None:
    """A tile near zero as a whole takes a series, another one not: each entry by itself, small ones to 4e-7 of their size."""
    f = Activation(name, 1.0, 1.0)
    for large in (1e-3, 0.26, 0.45, 0.55, 1.1, 4.0, -4.0):
        u = torch.linspace(-1e-3, 1e-3, 1024).to(device)
        u[7] = large
        value = torch.empty_like(u)
        _curve[(1,)](value, value, u, 1.0, 1.0, name, False, 1024)
        wanted = f.value(u.double())
        off = (value - wanted).abs() / wanted.abs()
        assert off[7] <= 2e-6 and (off[:7] <= 4e-7).all() and (off[8:] <= 4e-7).all(), large


def test_products_of_split_factors_have_16_bits(device: torch.device) -> None:
    A, B = (torch.randn(32, 32, generator=torch.Generator().manual_seed(s)).to(device) for s in (1, 2))
    out = torch.empty_like(A)
    _product[(1,)](out, A, B, 32)
    error = (out - B.double() @ A.double()).abs() / (B.abs().double() @ A.abs().double())
    assert error.max() < 2**-16
    careless = (B.bfloat16().double() @ A.bfloat16().double() - B.double() @ A.double()).abs()
    assert careless.mean() > 50 * (out - B.double() @ A.double()).abs().mean()


# --- NF4 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_decoded_weights_are_bitsandbytes_own(
    nf4: Callable[..., nn.Module], device: torch.device, quant_type: str, nested: bool, storage: torch.dtype
) -> None:
    layer = nf4(37, 320, nested=nested, storage=storage, quant_type=quant_type)
    assert why_unreadable(layer) is None
    assert torch.equal(decoded(codes_of(layer), empty(37, 320, device)), stored_weight(layer).float().bfloat16())


def test_codes_are_not_copied(nf4: Callable[..., nn.Module]) -> None:
    layer = nf4(37, 320)
    assert codes_of(layer)[0].data_ptr() == layer.weight.data_ptr()


# --- W = W0 + dW ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", curves.NAMES)
def test_dw_for_every_f(device: torch.device, name: str, inside: bool) -> None:
    A, B = factors(device, 33, 150, 8, 1e-2)
    delta_map = DeltaMap(Activation(name, 2e-2, 1e4 if name == "sinter" else 30.0), 0.25, inside)
    found = merged_weight(A, B, delta_map, [], empty(33, 150, device))
    wanted = delta_map.value(B.double() @ A.double())
    # LoRA's factors are in bf16, as its own products have them
    assert relative(found, wanted) < (2 * ONCE if name == "identity" else ONCE)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(1, 64, 1), (130, 192, 17), (129, 320, 64), (70, 128, 128)])
@pytest.mark.parametrize("nested", [True, False])
def test_the_merged_weight_is_the_sum_rounded_once(
    nf4: Callable[..., nn.Module], device: torch.device, d_out: int, d_in: int, rank: int, nested: bool
) -> None:
    """Entry by entry the fp64 sum rounded to bf16, but where that lies within an fp32 error of half a unit."""
    layer = nf4(d_out, d_in, nested=nested)
    A, B = factors(device, d_out, d_in, rank, 1e-2)
    found = merged_weight(A, B, sinter(2e-2), codes_of(layer), empty(d_out, d_in, device))
    wanted = stored_weight(layer) + sinter(2e-2).value(B.double() @ A.double())
    assert (found == wanted.float().bfloat16()).float().mean() > 0.995
    assert relative(found, wanted) < ONCE


@pytest.mark.parametrize("tile", [(128, 128, 1, 8, 1), (32, 64, 3, 4, 2), (16, 128, 2, 4, 1)])
def test_tiles_do_not_change_the_numbers(
    nf4: Callable[..., nn.Module], device: torch.device, tile: merged.Tile
) -> None:
    layer, (A, B) = nf4(90, 448), factors(device, 90, 448, 9, 1e-2)
    found = [merged_weight(A, B, sinter(2e-2), codes_of(layer), empty(90, 448, device), t) for t in (tile, merged.TILE)]
    assert relative(*found) < 1e-4


def test_factors_with_strides_are_read_as_they_are_meant(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    A, B = factors(device, 40, 128, 8, 1e-2)
    strided = A.T.contiguous().T, torch.cat([B, B], 1)[:, :8]
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    base, G = codes_of(nf4(40, 128)), normal(device, 40, 128)
    found, wanted = (merged_weight(*f, sinter(2e-2), base, empty(40, 128, device)) for f in (strided, (A, B)))
    assert torch.equal(found, wanted)
    pairs = zip(factor_gradients(G, *strided, sinter(2e-2)), factor_gradients(G, A, B, sinter(2e-2)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert all(torch.equal(*pair) for pair in zip(rounded_factors(*strided), rounded_factors(A, B), strict=True))


@pytest.mark.parametrize(("rank", "zeros"), [(1, 5000), (17, 100), (8, 0)])
def test_factors_in_bf16_and_zeros(device: torch.device, rank: int, zeros: int) -> None:
    """Of any sizes, each factor larger than the other in turn; with what is not finite, or not so in bf16."""
    A, B = factors(device, 90, 1600, rank, 1e-2)
    A[0, :3] = torch.tensor([float("nan"), float("inf"), 3.4e38], device=device)
    for pair in ((A, B), (B.T, A.T)):
        filled = torch.full((zeros,), 7, dtype=torch.int32, device=device)
        for found, factor in zip(rounded_factors(*pair, filled if zeros else None), pair, strict=True):
            assert found.is_contiguous() and torch.equal(found.isnan(), factor.isnan())
            assert torch.equal(found[~found.isnan()], factor.bfloat16()[~factor.isnan()])
        assert not filled.any()


# --- dL/dA, dL/dB -----------------------------------------------------------------------------------------------------


def by_autograd(G: Tensor, A: Tensor, B: Tensor, delta_map: DeltaMap) -> list[Tensor]:
    """Of <G, dW> in fp64."""
    leaves = [factor.double().requires_grad_() for factor in (A, B)]
    (G.double() * delta_map.value(leaves[1] @ leaves[0])).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", curves.NAMES[1:])
def test_gradients_for_every_f(device: torch.device, name: str, inside: bool) -> None:
    A, B = factors(device, 33, 150, 8, 1e-2)
    delta_map = DeltaMap(Activation(name, 2e-2, 1e4 if name == "sinter" else 30.0), 0.25, inside)
    G = normal(device, 33, 150)
    for found, wanted in zip(factor_gradients(G, A, B, delta_map), by_autograd(G, A, B, delta_map), strict=True):
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        assert relative(found, wanted) < 2 * ONCE


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(1, 64, 1), (100, 77, 17), (129, 72, 64), (70, 140, 128)])
def test_gradients_of_odd_shapes(device: torch.device, d_out: int, d_in: int, rank: int) -> None:
    A, B = factors(device, d_out, d_in, rank, 1e-2)
    G = normal(device, d_out, d_in)
    found = factor_gradients(G, A, B, sinter(2e-2))
    for got, wanted in zip(found, by_autograd(G, A, B, sinter(2e-2)), strict=True):
        assert relative(got, wanted) < 2 * ONCE


def test_a_split_walk_gives_the_same_sum(device: torch.device) -> None:
    """One program for each block, or several whose parts are summed; twice the same is the same bits."""
    A, B = factors(device, 140, 150, 8, 1e-2)
    G = normal(device, 140, 150)
    whole, parts, again = (factor_gradients(G, A, B, sinter(2e-2), (64, 64, n, 4, 2)) for n in (1, 40, 40))
    for i in range(2):
        assert relative(parts[i], whole[i]) < 1e-5 and torch.equal(parts[i], again[i])


def test_the_slope_at_zero_is_exact_in_bf16() -> None:
    """So f' / f'(0) and s f'(0) are as exact as f' and s."""
    for name in curves.NAMES:
        at_zero = Activation(name).slope_at_zero
        assert at_zero == 0 or torch.tensor(at_zero).frexp().mantissa == 0.5, name


@pytest.mark.parametrize("f", curves.NAMES)
def test_a_factor_that_is_not_a_number_shows(device: torch.device, f: str) -> None:
    """Also one whose bits are all ones, as GPUs write it: neither arithmetic on them nor a maximum may make a number of it.

    The interpreter's maximum keeps a NaN, so relu can fail on a GPU alone.
    """
    delta_map = DeltaMap(Activation(f), 0.25)
    for side in (0, 1):
        for bits in (0x7FFFFFFF, 0x7FC00000):
            pair = [factor.clone() for factor in factors(device, 48, 96, 8, 1e-2)]
            pair[side].view(torch.int32)[2, 1] = bits
            found = merged_weight(*pair, delta_map, [], empty(48, 96, device))
            assert found.isnan().sum() == (48 if side == 0 else 96)


def test_lora_s_gradients_need_no_G(device: torch.device) -> None:
    A, B = factors(device, 48, 96, 8, 1e-2)
    g, x = normal(device, 50, 48), normal(device, 50, 96, seed=2)
    delta_map = replace(sinter(0.0), activation=Activation("identity"))
    wanted = by_autograd(g.double().T @ x.double(), A, B, delta_map)
    for found, exactly in zip(low_rank_gradients(g, x, A, B, 0.25), wanted, strict=True):
        assert found.dtype == torch.float32 and relative(found, exactly) < 3 * ONCE
