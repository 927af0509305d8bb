"""Layers, factors and references for the tests of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from inside_operators import InsideOperators
from peft import get_peft_model
from torch import Tensor, nn

from curvelora import LoranConfig
from curvelora.activations import Activation
from curvelora.kernels import fp8_gate, use_kernels
from curvelora.layers.dense_delta import DeltaMap

Gradients = dict[str, Tensor]
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < fp8_gate.NEEDED, reason="needs a GPU with FP8"
)


def nf4_layer(
    device: torch.device,
    d_out: int,
    d_in: int,
    *,
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
    bias: bool = False,
    quant_type: str = "nf4",
    std: float = 0.02,
    seed: int = 11,
) -> nn.Module:
    """A frozen bitsandbytes layer with weights N(0, std^2)."""
    draw = torch.Generator().manual_seed(seed)
    options = dict(compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
    layer = bnb.nn.Linear4bit(d_in, d_out, bias=bias, compute_dtype=torch.bfloat16, **options)
    W0 = (torch.randn(d_out, d_in, generator=draw) * std).bfloat16()
    layer.weight = bnb.nn.Params4bit(W0, requires_grad=False, module=layer, **options)
    if bias:
        layer.bias = nn.Parameter(torch.randn(d_out, generator=draw).bfloat16(), requires_grad=False)
    return layer.to(device)


def stored_weight(layer: nn.Module) -> Tensor:
    """W0 (d_out, d_in) in fp64, as bitsandbytes decodes it to fp32: codes, scales and scales' codes not rounded to bf16."""
    state = layer.weight.quant_state
    before, state.dtype = state.dtype, torch.float32
    try:
        return bnb.functional.dequantize_4bit(layer.weight.data, state).double()
    finally:
        state.dtype = before


def factors(device: torch.device, d_out: int, d_in: int, rank: int, std_u: float) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r), fp32, with std(BA) = std_u; A as Kaiming's."""
    draw = torch.Generator().manual_seed(rank)
    A = (torch.rand(rank, d_in, generator=draw) * 2 - 1) * d_in**-0.5
    B = torch.randn(d_out, rank, generator=draw) * std_u * (3 * d_in / rank) ** 0.5
    return A.to(device), B.to(device)


def normal(device: torch.device, *shape: int, seed: int = 1) -> Tensor:
    """N(0, 1) in bf16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def sinter(amplitude: float, scale: float = 0.25, inside: bool = False) -> DeltaMap:
    """Sinter at the published frequency and scale."""
    return DeltaMap(Activation("sinter", amplitude, 1e4), scale, inside)


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def share(found: Tensor, wanted: Tensor) -> float:
    """How much of `wanted` is in `found`: <found, wanted> / <wanted, wanted>, 1 where it is all there, 0 where nothing is."""
    return ((found.double() * wanted).sum() / wanted.square().sum()).item()


def gradients(function: Callable[..., Tensor], grad: Tensor, **inputs: Tensor) -> Gradients:
    """{"y": function(**inputs), name: dL/d input} of all inputs, L = <y, grad>; grad in the dtype of y."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y = function(**leaves)
    y.backward(grad.to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def exact(
    W0: Tensor, bias: Tensor | None, delta_map: DeltaMap, grad: Tensor, mask: Tensor | None = None, **inputs: Tensor
) -> Gradients:
    """The same by autograd in fp64 of x W0^T + drop(x) (s f(BA))^T + bias; drop(x) is x times `mask`."""

    def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = x @ W0.double().T + (x if mask is None else x * mask.double()) @ delta_map.value(B @ A).T
        return y if bias is None else y + bias.double()

    return gradients(plain, grad.double(), **{name: value.double() for name, value in inputs.items()})


class FusedProducts(InsideOperators):
    """The fused forward operators that run in its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: list[tuple] = []

    @property
    def count(self) -> int:
        """How many have run."""
        return len(self.names)

    def see(self, func: Any, args: tuple, result: Any) -> None:
        """One operation."""
        if str(func) in ("curvelora.merged_linear.default", "curvelora.separate_linear.default"):
            self.names.append(str(func))
            self.arguments.append(args)


class Small(nn.Module):
    """Two layers with tanh between them: "up" (96, 64) and "down" (64, 128), on NF4 or in bf16."""

    def __init__(self, device: torch.device, base: str = "nf4", bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = (base_layer(device, base, *shape, bias=bias) for shape in ((96, 64), (64, 128)))
        self.is_loaded_in_4bit = base == "nf4"  # PEFT chooses its layer by this

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., 64) -> (..., 64)."""
        return self.down(torch.cat([torch.tanh(self.up(x)), x[..., :32]], -1))


def base_layer(device: torch.device, base: str, d_out: int, d_in: int, bias: bool = False) -> nn.Module:
    """A frozen layer; base is "nf4" or "bf16"."""
    if base == "nf4":
        return nf4_layer(device, d_out, d_in, bias=bias)
    torch.manual_seed(3)
    return nn.Linear(d_in, d_out, bias=bias, device=device, dtype=torch.bfloat16).requires_grad_(False)


def step(model: nn.Module, x: Tensor, seed: int = 0) -> Gradients:
    """{"y", "x", parameter: gradient} of sum y^2 under bf16 autocast, with dropout drawn from `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def agree(found: Gradients, wanted: Gradients, bound: float) -> None:
    """The same names, dtypes and shapes, and numbers within `bound` in the norm."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert relative(found[name], value) < bound, (name, relative(found[name], value))


class Always:
    """Allows FP8 whatever the factors are."""

    def granted(self) -> fp8_gate.Taken:
        return fp8_gate.Taken()


def fp8_model(device: torch.device, **options: object) -> nn.Module:
    """Two layers with Sinter at its published setting, told to take FP8."""
    settings = {"r": 8, "alpha": 16, "dropout": 0.0, "init_B_std": 0.02} | options
    torch.manual_seed(4)
    model = get_peft_model(Small(device), LoranConfig(target_modules=["up", "down"], **settings)).train()
    use_kernels(model, "fp8")
    return model


def set_largest(model: nn.Module, largest: float) -> None:
    """Scale every B so that |B_i| |A_j| is at most `largest`, and is that somewhere."""
    for layer in model.modules():
        if hasattr(layer, "loran_B"):
            A, B = layer.factors("default")
            with torch.no_grad():
                B *= largest / (A.norm(dim=0).max() * B.norm(dim=1).max())
