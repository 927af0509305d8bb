"""Codes and the linear part of the gradients from two readings of g and x."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_world import Always, needs_fp8, normal, relative, sinter
from torch import Tensor

from curvelora.kernels import factor_gradients as module
from curvelora.kernels import fp8_readings as readings
from curvelora.kernels.factor_gradients import factor_gradients, gradients_of_factors, low_rank_gradients
from curvelora.kernels.fp8_product import Codes
from curvelora.kernels.fp8_readings import codes_reference, first_readings, second_readings

# tokens, d_out, d_in, rank: less than a tile, no multiples of one, several tiles, splits and spans
SHAPES = [(1, 16, 32, 1), (37, 48, 80, 5), (600, 77, 272, 64), (300, 200, 16, 17), (130, 96, 144, 128)]
TILES = [(None, None), ((32, 64, 4, 4, 2), (32, 64, 4, 4, 2)), ((128, 32, 30, 4, 1), (128, 32, 60, 4, 1))]


def of(device: torch.device, tokens: int, d_out: int, d_in: int, rank: int) -> tuple[Tensor, ...]:
    """g, x, A and B, all in bf16: columns of g of all sizes, rows of B that make up for them, so that none counts for more."""
    g, x = normal(device, tokens, d_out), normal(device, tokens, d_in, seed=2)
    sizes = 2.0 ** torch.linspace(-20, 10, d_out).round().bfloat16().to(device)
    return g * sizes, x, normal(device, rank, d_in, seed=3), normal(device, d_out, rank, seed=4) / sizes[:, None]


def same(found: Codes, x: Tensor) -> bool:
    """Whether these are the codes of x, and zeros behind them."""
    (codes, scales), (wanted, wanted_scales) = found, codes_reference(x)
    of_x, behind = codes[:, : len(x)].contiguous(), codes[:, len(x) :]
    equal = torch.equal(of_x.view(torch.uint8), wanted.contiguous().view(torch.uint8))
    return equal and torch.equal(scales, wanted_scales) and not behind.float().any()


@needs_fp8
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiles", TILES)
def test_both_readings(device: torch.device, shape: tuple[int, ...], tiles: tuple) -> None:
    """Largest entries and codes bit for bit, products to what one rounding of theirs costs, sums to fp32's."""
    g, x, A, B = of(device, *shape)
    back, down, largest = first_readings(g, x, A, B, tile=tiles[0])
    assert torch.equal(largest.view(torch.float32), torch.cat([g, x], 1).float().abs().amax(0))
    wanted = g.double() @ B.double(), x.double() @ A.double().T
    for thin, exactly in zip((back, down), wanted, strict=True):
        assert thin.dtype == torch.bfloat16 and thin.shape == exactly.shape
        assert relative(thin, exactly) < 2**-8
    codes_g, codes_x, parts_A, parts_B = second_readings(g, x, back, down, largest, tile=tiles[1])
    assert same(codes_g, g) and same(codes_x, x)
    assert relative(parts_A.sum(0), back.double().T @ x.double()) < 1e-5
    each, exactly = parts_B.sum(0).double(), g.double().T @ down.double()
    assert ((each - exactly).norm(dim=1) < 1e-5 * exactly.norm(dim=1)).all()


@needs_fp8
def test_more_than_one_part(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the sums above would be of one part each; and no more of a first reading than there are tiles of columns."""
    launch, seen = readings.launch, []
    monkeypatch.setattr(readings, "launch", lambda *args, **options: (seen.append(args), launch(*args, **options)))
    g, x, A, B = of(device, 600, 77, 272, 64)
    *_, parts_A, parts_B = second_readings(g, x, *first_readings(g, x, A, B))
    assert len(parts_A) == len(parts_B) > 1
    assert [len(parts) for parts in seen[0][2:4]] == [2, 5]


@needs_fp8
def test_what_is_not_finite(device: torch.device) -> None:
    """NaN stays NaN in codes and sums, and infinity takes the largest code."""
    g, x, A, B = of(device, 32, 16, 16, 4)
    g[3, 0], x[3, 1], x[4, 1] = float("nan"), float("inf"), -float("inf")
    back, down, largest = first_readings(g, x, A, B)
    (codes_g, _), (codes_x, scales), parts_A, parts_B = second_readings(g, x, back, down, largest)
    assert (
        codes_x.float()[1, 3:5].tolist() == [448, -448] and not codes_x.float()[1, 5:].any() and scales.isfinite().all()
    )
    assert codes_g.float()[0, 3].isnan() and codes_g.float().isnan().sum() == 1
    assert parts_B.sum(0)[0].isnan().all() and parts_A.sum(0).isnan().all() and back[3].isnan().all()


@needs_fp8
def test_the_linear_part_is_lora_s(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """From factors in fp32, with a scale: what thin products make, within bf16's rounding of them."""
    g, x, A, B = (t.float() if i > 1 else t for i, t in enumerate(of(device, 256, 96, 144, 8)))
    seen = []
    made = factor_gradients
    monkeypatch.setattr(module, "factor_gradients", lambda *a, **o: (seen.append(o), made(*a, **o))[1])
    gradients_of_factors(g, x, A, B, sinter(5e-5), Always())
    wanted = low_rank_gradients(g, x, A, B, sinter(5e-5).slope_at_zero)
    assert seen[0]["linear"] is False
    for parts, exactly in zip(seen[0]["more"], wanted, strict=True):
        assert ((parts.sum(0) - exactly).norm(dim=1) < 6e-3 * exactly.norm(dim=1)).all()


@needs_fp8
@pytest.mark.parametrize("view", [lambda t: t[::2], lambda t: t[:, 16:], lambda t: t.T.contiguous().T])
def test_matrices_with_strides_are_read_as_they_are_meant(
    device: torch.device, view: Callable[[Tensor], Tensor]
) -> None:
    g, x = view(normal(device, 256, 96)), view(normal(device, 256, 144, seed=2))
    A, B = normal(device, 8, x.shape[1], seed=3).float(), normal(device, g.shape[1], 8, seed=4).float() * 1e-3
    found = gradients_of_factors(g, x, A, B, sinter(5e-5), Always())
    whole = (t.clone(memory_format=torch.contiguous_format) for t in (g, x))
    for one, wanted in zip(found, gradients_of_factors(*whole, A, B, sinter(5e-5), Always()), strict=True):
        assert torch.equal(one, wanted) and one.abs().sum() > 0


def test_parts_are_added_band_by_band(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `factor_gradients` adds is added once, also where a large layer is done in bands of rows."""
    G, A, B = normal(device, 200, 144), normal(device, 8, 144).float(), normal(device, 200, 8).float() * 1e-2
    more = tuple(torch.randn(3, *t.shape, device=device) for t in (A, B))
    alone = factor_gradients(G, A, B, sinter(5e-5), linear=False)
    for parts in (module.PARTS, 2 * 8 * 64):
        monkeypatch.setattr(module, "PARTS", parts)
        found = factor_gradients(G, A, B, sinter(5e-5), linear=False, more=more)
        for one, without, parts_of in zip(found, alone, more, strict=True):
            assert relative(one - without, parts_of.sum(0)) < 1e-5


def test_no_tokens(device: torch.device) -> None:
    """An empty batch has gradients of zero, and takes no FP8."""

    class Never:
        def granted(self) -> None:
            raise AssertionError("asked without need")

    g, x, A, B = of(device, 0, 48, 80, 4)
    for found in gradients_of_factors(g, x, A.float(), B.float(), sinter(5e-5), Never()):
        assert found.shape in (A.shape, B.shape) and not found.any()
