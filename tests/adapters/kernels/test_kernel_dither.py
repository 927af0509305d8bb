"""Merged weights of bases on numbers of bf16: rounded by thresholds, so that updates of any size are right in the mean."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_world import FusedProducts, base_layer, factors, nf4_layer, normal, relative, share, sinter, stored_weight
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from curvelora import LoranConfig
from curvelora.kernels import use_kernels
from curvelora.kernels.choice import why_not
from curvelora.kernels.merged_linear import merged_linear
from curvelora.kernels.merged_weight import _thresholds, merged_weight
from curvelora.kernels.nf4 import codes_of
from curvelora.layers.dense_delta import DeltaMap, map_fields

BASES = ("bf16", "fp4", "fp4, double")
DITHERED = 5  # where the operator's arguments say so


def base_of(kind: str, device: torch.device, d_out: int, d_in: int, seed: int = 11) -> tuple[list[Tensor], Tensor]:
    """(what the kernel reads, W0 in fp64)."""
    if kind == "bf16":
        W0 = (0.02 * normal(device, d_out, d_in, seed=seed)).bfloat16()
        return [W0], W0.double()
    layer = nf4_layer(device, d_out, d_in, nested=kind != "fp4", quant_type="fp4", seed=seed)
    return codes_of(layer), stored_weight(layer)


def merged(base: list[Tensor], A: Tensor, B: Tensor, f: DeltaMap, dithered: bool = True) -> Tensor:
    """By the kernel, into memory that no entry may stay of."""
    out = torch.full((B.shape[0], A.shape[1]), float("nan"), dtype=torch.bfloat16, device=A.device)
    return merged_weight(A, B, f, base, out, dithered=dithered)


def thresholds(rows: Tensor, columns: Tensor) -> Tensor:
    """In whole numbers of 64 bits, where nothing overflows: 16 bits of the multiples of 2^32 / p and 2^32 / p^2."""
    down, right = (round(2**32 / 1.32471795724474602596**power) for power in (1, 2))
    return ((rows[:, None] * down + columns[None, :] * right) >> 16) & 0xFFFF


@triton.jit
def _write_thresholds(out, first_row, first_column, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at[:, None] * SIZE + at[None, :], _thresholds(first_row + at, first_column + at))


@pytest.mark.parametrize("corner", [(0, 0), (4096, 11008), (65_000, 31_999)])
def test_thresholds_are_spread_evenly(device: torch.device, corner: tuple[int, int]) -> None:
    """In each window of 32 x 32, four times as evenly as random numbers (0.03), and as the constants' digits say."""
    found = torch.empty(32, 32, dtype=torch.int32, device=device)
    _write_thresholds[(1,)](found, *corner, 32)
    assert torch.equal(found, thresholds(*(first + torch.arange(32, device=device) for first in corner)))
    ordered = found.flatten().sort().values.double().cpu() / 65536
    assert (ordered - (torch.arange(1024) + 0.5) / 1024).abs().max() < 0.0075


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(("d_out", "rank"), [(1, 1), (130, 17), (70, 128)])
def test_the_sum_is_rounded_by_its_threshold(device: torch.device, kind: str, d_out: int, rank: int) -> None:
    """Entry by entry, but where the sum's fp32 error decides; in bf16 for widths of no whole block too."""
    d_in = 150 if kind == "bf16" else 192
    base, W0 = base_of(kind, device, d_out, d_in)
    A, B = factors(device, d_out, d_in, rank, 1e-2)
    wanted = W0 + sinter(2e-2).value(B.double() @ A.double())
    towards_zero = (wanted.float().view(torch.int32) & -65536).view(torch.float32).double()
    unit = 2.0 ** (torch.frexp(towards_zero.abs()).exponent - 8).double()
    above = (wanted.abs() - towards_zero.abs()) / unit >= 1 - thresholds(
        torch.arange(d_out, device=device), torch.arange(d_in, device=device)
    ) / 65536
    rounded = towards_zero + torch.where(above, unit, 0.0) * wanted.sign()
    found = merged(base, A, B, sinter(2e-2))
    assert (found.double() == rounded).double().mean() > 0.99
    assert 1.2 < relative(found, wanted) / relative(wanted.bfloat16(), wanted) < 1.65 or d_out == 1


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("size", [1e-6, 1e-4])
def test_updates_of_every_size_are_right_in_the_mean(device: torch.device, kind: str, size: float) -> None:
    """Beside weights of 0.02, whose half unit is 6e-5. Rounded to the nearest, a bf16 base keeps 3 % of the smallest."""
    base, _ = base_of(kind, device, 512, 512)
    A, B = factors(device, 512, 512, 16, 4 * size)
    wanted = sinter(5e-5).value(B.double() @ A.double())

    def kept(dithered: bool) -> float:
        found = [merged(base, A, factor, sinter(5e-5), dithered).double() for factor in (B, 0 * B)]
        return share(found[0] - found[1], wanted)

    assert kept(True) == pytest.approx(1, abs=0.04)
    if (kind, size) == ("bf16", 1e-6):
        assert kept(False) < 0.06


def test_without_an_update_the_weight_is_the_base(device: torch.device) -> None:
    """Where the threshold is the largest too."""
    base, W0 = base_of("bf16", device, 512, 450)
    assert thresholds(torch.arange(512), torch.arange(450)).max() == 65535
    A, B = factors(device, 512, 450, 8, 1e-2)
    assert torch.equal(merged(base, A, 0 * B, sinter(2e-2)).double(), W0)
    upright = [base[0].T.contiguous().T]
    assert not upright[0].is_contiguous()
    assert torch.equal(merged(upright, A, B, sinter(2e-2)), merged(base, A, B, sinter(2e-2)))


def test_what_is_not_finite_stays_so(device: torch.device) -> None:
    """A NaN as a GPU's arithmetic makes it has all bits set: one more and it would be a zero."""
    (W0,), _ = base_of("bf16", device, 64, 64)
    W0[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device)
    A, B = factors(device, 64, 64, 8, 1e-2)
    B[5] = torch.full((8,), -1, dtype=torch.int32, device=device).view(torch.float32)
    found = merged([W0], A, B, sinter(2e-2))
    assert found[0, 0].isnan() and found[5].isnan().all()
    assert found[0, 1] == float("inf") and found[0, 2] == -float("inf")
    assert found[1:5].isfinite().all() and found[6:].isfinite().all()


class OneLayer(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, d_in) -> (tokens, d_out)."""
        return self.proj(x)


@pytest.mark.parametrize("kind", ["nf4", *BASES])
@pytest.mark.parametrize(
    ("config", "on_nf4", "elsewhere"),
    [
        (LoranConfig(r=4, dropout=0.0), "merged_linear", "merged_linear"),
        (LoranConfig(r=4, dropout=0.3, dropout_form="features"), "merged_linear", "merged_linear"),
        (LoranConfig(r=4, dropout=0.3, dropout_form="exact"), "separate_linear", "separate_linear"),
        (LoranConfig(r=4, dropout=0.0, activation="identity"), "merged_linear", "separate_linear"),
        (LoraConfig(r=4), "merged_linear", "separate_linear"),
    ],
    ids=["loran", "features", "exact", "identity", "lora"],
)
def test_which_product_a_layer_takes(
    device: torch.device, kind: str, config: LoranConfig | LoraConfig, on_nf4: str, elsewhere: str
) -> None:
    """One with a merged weight, dithered but on NF4; two with dropout, and for LoRA where it would have to be dithered."""
    layer = (
        base_layer(device, "bf16", 96, 128)
        if kind == "bf16"
        else nf4_layer(device, 96, 128, nested=kind != "fp4", quant_type=kind[:3])
    )
    config.target_modules = ["proj"]
    model = get_peft_model(OneLayer(layer), config).train()
    assert use_kernels(model) == (1, {})
    with FusedProducts() as products, torch.no_grad():
        model(normal(device, 3, 128))
    assert products.names == [f"curvelora.{on_nf4 if kind == 'nf4' else elsewhere}.default"]
    if "merged" in products.names[0]:
        assert products.arguments[0][DITHERED] == (kind != "nf4")


@pytest.mark.parametrize("inside", [False, True], ids=["function", "operator"])
def test_both_passes_have_one_weight(device: torch.device, inside: bool) -> None:
    """Bit for bit, by the autograd function and by the operator in its place."""
    base, _ = base_of("bf16", device, 96, 150)
    A, B = factors(device, 96, 150, 8, 1e-2)
    W, f = merged(base, A, B, sinter(2e-2)), sinter(2e-2)
    assert not torch.equal(W, merged(base, A, B, f, dithered=False))
    x, grad = normal(device, 5, 150).requires_grad_(), normal(device, 5, 96, seed=2)
    A.requires_grad_(), B.requires_grad_()
    if inside:
        y = torch.ops.curvelora.merged_linear(x, A, B, None, base, True, *map_fields(f))
    else:
        y = merged_linear(x, A, B, None, base, f, dithered=True)
    y.backward(grad)
    assert torch.equal(y, x @ W.T) and torch.equal(x.grad, grad @ W)


def test_a_weight_of_another_kind_is_multiplied_as_before(device: torch.device) -> None:
    """A subclass of tensors, as torchao's, which says bf16 and keeps its bytes elsewhere."""

    class Other(Tensor):
        pass

    layer = base_layer(device, "bf16", 96, 128)
    assert why_not(layer, 4) is None
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Other), requires_grad=False)
    assert type(layer.weight) is not nn.Parameter
    assert why_not(layer, 4) == "the base's weight is a Other"
