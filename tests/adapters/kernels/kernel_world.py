"""Layers, factors and references for the tests of kernels."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from curvelora.activations import Activation
from curvelora.layers.dense_delta import DeltaMap

Gradients = dict[str, Tensor]


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
) -> nn.Module:
    """A frozen bitsandbytes layer with weights N(0, std^2)."""
    draw = torch.Generator().manual_seed(11)
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


def exact(W0: Tensor, bias: Tensor | None, delta_map: DeltaMap, grad: Tensor, **inputs: Tensor) -> Gradients:
    """The same by autograd in fp64 of x W0^T + z (s f(BA))^T + bias; z is x where it is not given."""

    def plain(x: Tensor, A: Tensor, B: Tensor, z: Tensor | None = None) -> Tensor:
        y = x @ W0.double().T + (x if z is None else z) @ delta_map.value(B @ A).T
        return y if bias is None else y + bias.double()

    return gradients(plain, grad.double(), **{name: value.double() for name, value in inputs.items()})
