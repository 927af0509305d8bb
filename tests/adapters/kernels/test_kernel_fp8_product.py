"""Codes in E4M3 and their product; the norms of factors that bound what it may be used for."""

from __future__ import annotations

import pytest
import torch
from kernel_world import needs_fp8, normal, relative
from torch import Tensor

from curvelora.kernels import fp8_product
from curvelora.kernels.factor_norms import factor_norms, factor_norms_reference
from curvelora.kernels.fp8_product import ROUNDING, SMALL, Codes
from curvelora.kernels.fp8_readings import Tile, codes_reference, first_readings, second_readings


def codes_of_columns(x: Tensor, tile: Tile | None = None) -> Codes:
    """As the gradients' two readings make them; their thin products are of zeros here."""
    A, B = x.new_zeros(1, x.shape[1]), x.new_zeros(x.shape[1], 1)
    return second_readings(x, x, *first_readings(x, x, A, B), tile=tile)[1]


def wide_range(tokens: int, width: int, device: torch.device) -> Tensor:
    """Columns from 1e-6 to 1e3, rows that fall by nine orders of magnitude, one column of zeros."""
    x = normal(torch.device("cpu"), tokens, width).float()
    x *= torch.logspace(-6, 3, width) * torch.logspace(0, -9, tokens)[:, None]
    x[:, width // 2] = 0
    return x.bfloat16().to(device)


@needs_fp8
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (37, 48), (600, 77), (512, 16)])
@pytest.mark.parametrize("tile", [None, (16, 64, 4, 4, 2), (128, 32, 60, 4, 1)])
def test_codes_are_pytorch_s(device: torch.device, tokens: int, width: int, tile: Tile | None) -> None:
    """Bit for bit, the smallest numbers too, transposed, with zeros up to a multiple of 16."""
    x = wide_range(tokens, width, device)
    codes, scales = codes_of_columns(x, tile)
    wanted, wanted_scales = codes_reference(x)
    assert codes.shape == (width, -(-tokens // 16) * 16) and codes.dtype == torch.float8_e4m3fn
    assert torch.equal(scales, wanted_scales) and scales[width // 2] == 1
    assert torch.equal(codes[:, :tokens].view(torch.uint8), wanted.contiguous().view(torch.uint8))
    assert not codes[:, tokens:].float().any()


@needs_fp8
def test_every_number_has_its_code(device: torch.device) -> None:
    """All bf16 numbers up to 448, beside one of 448 that makes the scale 1."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    every = every[every.abs() <= 448][:, None].bfloat16().to(device)
    codes, scales = codes_of_columns(every)
    assert scales.item() == 1
    wanted = every.float().T.to(torch.float8_e4m3fn)
    assert torch.equal(codes[:, : len(every)].view(torch.uint8), wanted.view(torch.uint8))


@needs_fp8
def test_codes_of_what_is_not_finite(device: torch.device) -> None:
    """NaN stays NaN, and what is beside it has a code; infinity is the largest number, beside which others are zeros."""
    x = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    x[3, 0], x[3, 1], x[4, 1] = float("nan"), float("inf"), -float("inf")
    codes, scales = codes_of_columns(x)
    found = codes.float()
    assert found[0, 3].isnan() and found[0].isnan().sum() == 1 and (found[0, 4:] * scales[0] == 1).all()
    assert found[1, 3:5].tolist() == [448, -448] and not found[1, 5:].any() and scales.isfinite().all()


@needs_fp8
@pytest.mark.parametrize(("tokens", "d_out", "d_in"), [(600, 77, 80), (33, 96, 16), (256, 160, 192)])
def test_the_product_is_within_its_bound(device: torch.device, tokens: int, d_out: int, d_in: int) -> None:
    """Entry by entry, and about 3.7 % in the norm."""
    g, x = normal(device, tokens, d_out), normal(device, tokens, d_in, seed=2)
    G = torch.empty(d_out, d_in, dtype=torch.bfloat16, device=device)
    fp8_product.fp8_product(codes_of_columns(g), codes_of_columns(x), G)
    g, x = g.double(), x.double()
    size, wanted = g.abs().T @ x.abs(), g.T @ x
    largest = [t.abs().amax(0) for t in (g, x)]
    small = SMALL * (largest[0][:, None] * x.abs().sum(0) + g.abs().sum(0)[:, None] * largest[1])
    assert ((G.double() - wanted).abs() <= ROUNDING * size + 2**-8 * size + small).all()  # G itself is in bf16
    assert 0.02 < relative(G, wanted) < 0.05


@needs_fp8
def test_the_bound_is_no_idle_one(device: torch.device) -> None:
    """17 lies between the codes of 16 and 18: 17 * 17 becomes 16 * 16, nine tenths of what the bound allows."""
    g, x = (torch.tensor(column, dtype=torch.bfloat16, device=device) for column in ((0.0, 17, 448), (448.0, 17, 0)))
    G = torch.empty(16, 16, dtype=torch.bfloat16, device=device)
    fp8_product.fp8_product(*(codes_of_columns(t[:, None].expand(3, 16).contiguous()) for t in (g, x)), G)
    assert (G == 256).all() and 0.85 * ROUNDING * 289 < 289 - 256 < ROUNDING * 289


@needs_fp8
def test_long_sums_of_one_sign(device: torch.device) -> None:
    """8,192 products of codes without error: what is off is what the sum has lost, far more where it is kept in 14 bits."""
    draw = torch.Generator().manual_seed(3)
    g, x = (torch.randint(8, 16, (8192, 16), generator=draw).bfloat16().to(device) for _ in range(2))
    g[0], x[0] = 448, 448  # the scale is 1, and whole numbers up to 15 have codes of their own
    G = torch.empty(16, 16, dtype=torch.bfloat16, device=device)
    fp8_product.fp8_product(codes_of_columns(g), codes_of_columns(x), G)
    wanted = g.double().T @ x.double()
    assert ((G.double() - wanted).abs() <= (2**-8 + 2**-10) * wanted).all()


@needs_fp8
def test_small_entries_beside_large_ones_add_what_is_said(device: torch.device) -> None:
    """A column of 1 and 255 times 1e-6, which become zeros: G = 0 is off by all of |g|^T |x|, and within what is said."""
    g = torch.full((256, 16), 1e-6, dtype=torch.bfloat16, device=device)
    x = torch.ones(256, 16, dtype=torch.bfloat16, device=device)
    g[0], x[0] = 1, 0
    G = torch.empty(16, 16, dtype=torch.bfloat16, device=device)
    fp8_product.fp8_product(codes_of_columns(g), codes_of_columns(x), G)
    size = g.double().T @ x.double()
    assert not G.any() and (size <= SMALL * (255 + g.double().sum(0))).all()


@pytest.mark.parametrize("layers", [1, 5])
def test_norms_of_all_factors_in_one_launch(device: torch.device, layers: int) -> None:
    """Any widths and ranks side by side, factors that are views, and one that is not a number."""
    shapes = [(8, 48, 160), (5, 129, 16), (64, 128, 300), (17, 1, 1), (8, 64, 64)][:layers]
    pairs = [
        (normal(device, r, d_in, seed=r).float(), normal(device, r, d_out, seed=r + 1).float().T)
        for r, d_in, d_out in shapes
    ]
    found, wanted = factor_norms(pairs), factor_norms_reference(pairs)
    assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=0)
    pairs[-1][1][3, 0] = float("nan")
    found = factor_norms(pairs)
    assert found[-1, 1] == float("inf") and torch.isfinite(found[:-1]).all() and torch.isfinite(found[-1, 0])


@pytest.mark.parametrize(("side", "place"), [(0, 3), (0, 1599), (1, 0), (1, 700), (1, 1599)])
def test_norms_of_factors_that_several_programs_share(device: torch.device, side: int, place: int) -> None:
    """The longest column or row is found wherever it is, beside narrower factors, also of the same layer."""
    widths = [(48, 16), (1600, 16) if side == 0 else (16, 1600), (16, 48)]
    pairs = [(normal(device, 4, a).float(), normal(device, b, 4, seed=1).float()) for a, b in widths]
    (pairs[1][0].T if side == 0 else pairs[1][1])[place] = 50
    found = factor_norms(pairs)
    assert found[1, side].item() == pytest.approx(100, rel=1e-6)
    assert torch.allclose(found.double(), factor_norms_reference(pairs), rtol=1e-6, atol=0)
