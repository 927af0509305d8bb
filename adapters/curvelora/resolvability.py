"""Resolvability: is the nonlinearity there at all, in the numbers that the hardware multiplies?

A weight-space method computes dW = s f(u) with u = BA and then hands a *rounded* tensor to a matrix product. Its
resolvability is the share of entries on which f changes that tensor, compared with the linear map that f is for small u:

    forward      share of entries where  round(W + s f(u)) != round(W + s f'(0) u)
    derivative   share of entries where  round(s f'(u))    != round(s f'(0))

`round` is every cast on the way into the product. W is 0 where the update has a product of its own, as in this package's
layers, and the base weight where a path (or a merge) adds the two first. For Sinter f'(0) = 1, so the comparison is with LoRA.
The derivative enters the backward pass as a factor on g^T x, which this package multiplies in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from curvelora.layers.dense_delta import DeltaMap, DenseDeltaLayer, row_blocks
from curvelora.precision import at_least_fp32, exact_products


@dataclass(frozen=True)
class Resolvability:
    """Shares are fractions of the entries looked at; `std_u` is the standard deviation of u = BA over them (dimensionless).

    `dtype` is the one in which the forward product is made, `derivative_dtype` the one in which f' multiplies g^T x.
    """

    forward: float
    derivative: float
    std_u: float
    entries: int
    dtype: str
    derivative_dtype: str

    def as_dict(self) -> dict[str, float | int | str]:
        """Plain data, for logs and JSON."""
        return asdict(self)


@torch.no_grad()
def measure_resolvability(
    A: Tensor,
    B: Tensor,
    delta_map: DeltaMap,
    dtype: torch.dtype,
    derivative_dtype: torch.dtype = torch.float32,
    base_weight: Tensor | None = None,
    max_rows: int | None = None,
) -> Resolvability:
    """Measure one layer.

    Args:
        A, B: factors, (r, d_in) and (d_out, r).
        delta_map: u -> dW.
        dtype: dtype of the tensor that enters the forward product.
        derivative_dtype: dtype in which f' is multiplied with g^T x.
        base_weight: W0 (d_out, d_in), where the update is added to it before the product; None where it is not.
        max_rows: look at this many rows, evenly spaced over d_out; None for all.
    """
    work = at_least_fp32(A.dtype)
    d_out = B.shape[0]
    if max_rows is not None and max_rows < d_out:
        chosen = torch.linspace(0, d_out - 1, max_rows, device=B.device).round().long()
        B, base_weight = B[chosen], None if base_weight is None else base_weight[chosen]
        delta_map = delta_map.rows(chosen)
    A, B = A.to(work), B.to(work)
    changed = changed_slope = 0
    total = total_squares = 0.0
    linear = torch.tensor(delta_map.slope_at_zero, dtype=work, device=A.device)
    with exact_products(A.device):
        for rows in row_blocks(B.shape[0], A.shape[1]):
            u, own = B[rows] @ A, delta_map.rows(rows)
            with_f, without_f = own.value(u), linear * u
            if base_weight is not None:
                w = base_weight[rows].to(work)
                with_f, without_f = w + with_f, w + without_f
            changed += (with_f.to(dtype) != without_f.to(dtype)).sum().item()
            changed_slope += (own.slope(u).to(derivative_dtype) != linear.to(derivative_dtype)).sum().item()
            total += u.sum(dtype=torch.float64).item()
            total_squares += u.double().square().sum().item()
    entries = B.shape[0] * A.shape[1]
    variance = total_squares / entries - (total / entries) ** 2
    return Resolvability(
        forward=changed / entries,
        derivative=changed_slope / entries,
        std_u=max(variance, 0.0) ** 0.5,
        entries=entries,
        dtype=str(dtype).removeprefix("torch."),
        derivative_dtype=str(derivative_dtype).removeprefix("torch."),
    )


def weight_space_layers(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, DenseDeltaLayer]]:
    """The (name, layer) pairs of `model` that carry `adapter` as a weight-space method."""
    for name, module in model.named_modules():
        if isinstance(module, DenseDeltaLayer) and adapter in module.configs:
            yield name, module


def model_resolvability(
    model: nn.Module, dtype: torch.dtype, adapter: str = "default", max_entries_per_layer: int | None = 1 << 20
) -> dict[str, Resolvability]:
    """Measure every weight-space layer of `model`: layer name -> `Resolvability`; empty where there is none.

    Args:
        dtype: the dtype in which the model multiplies (autocast's where autocast is on).
        max_entries_per_layer: rows are sampled to about this many entries; None for all.
    """
    measured = {}
    for name, layer in weight_space_layers(model, adapter):
        max_rows = None if max_entries_per_layer is None else max(1, max_entries_per_layer // layer.in_features)
        measured[name] = measure_resolvability(
            *layer.factors(adapter), layer.delta_map(adapter), dtype, max_rows=max_rows
        )
    return measured


def summarise(measured: dict[str, Resolvability]) -> dict[str, float | int | str]:
    """One record for a model: means over its layers, weighted by the entries looked at, and the number of layers.

    Raises:
        ValueError: `measured` is empty.
    """
    if not measured:
        raise ValueError("no weight-space layer was measured")
    layers = list(measured.values())
    entries = sum(m.entries for m in layers)

    def mean(name: str) -> float:
        return sum(getattr(m, name) * m.entries for m in layers) / entries

    return {
        "forward": mean("forward"),
        "derivative": mean("derivative"),
        "std_u": mean("std_u"),
        "layers": len(layers),
        "dtype": layers[0].dtype,
        "derivative_dtype": layers[0].derivative_dtype,
    }
