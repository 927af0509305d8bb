"""Presence: is an adapter's nonlinearity there at all, in its weights, in its derivative and in what it adds to real inputs?

Weight space, dW = s f(u) with u = BA (or f(s u)). Near zero f is the line f'(0) u, which is LoRA; each record holds f against it:

    forward, derivative, std_u   resolvability, as `curvelora.resolvability` defines it
    phase                        |w u|, the argument of sin and cos in radians; |u| where f has no frequency (s u for f(s u))
    slope_rms                    rms of f'(u) / f'(0) - 1, exact
    slope_correlation            of f' - f'(0) in three precisions with the exact one, over entries
    slope_at_rest                the share of entries at which that precision gives exactly f'(0)
    output_ratio                 ||(s f(u) - s f'(0) u) x|| / ||s f'(0) u x|| over real inputs x

The three precisions: `naive_bf16` multiplies bf16 factors into a bf16 u and rounds every step of f' (what autocast does to a
plain implementation), `rounded_bf16` rounds the exact f' once, `fp32` is this package's own evaluation.

Activation space, B m(z) with z = A x: RanLoRA and AuroRA. Here linear in the input is what counts:

    nonlinear_share    ||m(z) - (L z + c)|| / ||m(z)|| with the best affine map over the inputs, by least squares; times
                       sqrt(n / (n - r - 1)) over n tokens, since the map is fitted to the same tokens
    linear_from_zero   ||m(z) - m(0) - m'(0) z|| / ||m(z)||, what the expansion at zero leaves
    z_abs              |z|

both after B, in the metric of the layer's output, and `..._bottleneck` before it, in R^r.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvelora.activations import PERIODIC
from curvelora.errors import UserError
from curvelora.layers.bottleneck import BottleneckLayer
from curvelora.layers.dense_delta import DeltaMap, DenseDeltaLayer
from curvelora.precision import at_least_fp32, exact_products
from curvelora.reference_path import evaluating
from curvelora.resolvability import measure_resolvability
from curvelora_eval.lab.updates import PEFT_PREFIX, adapted_layers, fit_correction

QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
PRECISIONS = ("naive_bf16", "rounded_bf16", "fp32")

Record = dict[str, Any]


@torch.no_grad()
def capture_inputs(
    model: nn.Module, batch: Mapping[str, Any], tokens: int = 256, layers: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Real inputs of the adapted layers, from one pass in evaluation mode; the model's mode is put back.

    Args:
        model: with adapters of any method, PEFT's LoRA too, or with layers under full fine-tuning.
        batch: keyword arguments of its forward pass, on its device.
        tokens: most rows a layer; evenly spaced over the positions of the batch, hence the same in every call. Positions that
            `attention_mask` marks as padding are left out of layers whose input has the mask's shape.
        layers: names as in the base model; None for all adapted layers.

    Returns:
        Layer name -> x (at most `tokens`, d_in), fp32, on the layer's device; of a layer that is called more than once, the
        first call. Layers that are not called are missing.

    Raises:
        UserError: a name in `layers` that is no adapted layer, or fewer than one token.
    """
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, not {tokens}: presence is measured on inputs")
    adapted = adapted_layers(model)
    unknown = sorted(set(layers or ()) - set(adapted))
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is no adapted layer of this model: take names such as {next(iter(adapted), '')!r}"
        )
    captured: dict[str, Tensor] = {}
    mask = batch.get("attention_mask")

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple) -> None:
            if name not in captured:
                captured[name] = _some_rows(args[0], mask, tokens)

        return see

    chosen = adapted if layers is None else {name: adapted[name] for name in layers}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in chosen.items()]
    try:
        # hooks that come and go would make torch.compile start again
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def measure_presence(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_entries: int = 1 << 18,
    adapter: str = "default",
) -> dict[str, Record]:
    """Measure every nonlinear layer of `model` that carries `adapter`; the model is left as it is.

    Args:
        inputs: layer name -> x (tokens, d_in), as `capture_inputs` gives them. Without a layer's x its weights alone are
            measured; a layer of the activation space has nothing else and is left out.
        dtype: the one in which the model multiplies (autocast's where autocast is on).
        max_entries: of u; rows of a layer are sampled, evenly, down to about this many.

    Returns:
        Layer name, as in the base model -> record of plain numbers with the keys of this module's docstring, "space" ("weight"
        or "activation") and "entries", the numbers looked at; empty for a model without such layers, such as LoRA's. Also
        "dtype" in weight space; in activation space "applied_to" ("tokens", or "columns" of A for AuroRA's static mode, whose
        z those are) and "samples". None stands for what is not defined: a ratio to zero (B = 0 at the start, or f'(0) = 0), a
        correlation with a constant, a fit with no more samples than unknowns, or a number that is not finite.
    """
    measured = {}
    with evaluating(model):
        for name, layer in model.named_modules():
            name, x = base_name(name), inputs.get(base_name(name))
            if isinstance(layer, DenseDeltaLayer) and adapter in layer.configs:
                factors, delta_map = layer.factors(adapter), layer.delta_map(adapter)
                measured[name] = weight_space_presence(*factors, delta_map, dtype, x, max_entries)
            elif (
                isinstance(layer, BottleneckLayer)
                and adapter in layer.configs
                and (x is not None or layer.acts_on_weights(adapter))
            ):
                measured[name] = activation_space_presence(layer, x, adapter)
    return measured


@torch.no_grad()
def weight_space_presence(
    A: Tensor, B: Tensor, delta_map: DeltaMap, dtype: torch.dtype, x: Tensor | None = None, max_entries: int = 1 << 18
) -> Record:
    """The record of one weight-space layer.

    Args:
        A, B: factors, (r, d_in) and (d_out, r).
        delta_map: u -> dW.
        dtype: of the tensor that enters the forward product.
        x: real inputs, (tokens, d_in), or None.
        max_entries: of u; rows of B are sampled down to about this many.
    """
    rows = max(1, max_entries // A.shape[1])
    if rows < B.shape[0]:
        chosen = torch.linspace(0, B.shape[0] - 1, rows, device=B.device).round().long()
        B, delta_map = B[chosen], delta_map.rows(chosen)
    resolvability = measure_resolvability(A, B, delta_map, dtype)
    f = delta_map.activation
    exact = B.double() @ A.double()
    work = at_least_fp32(A.dtype)
    with exact_products(A.device):
        own = B.to(work) @ A.to(work)
        naive = B.bfloat16() @ A.bfloat16()

    def argument(u: Tensor) -> Tensor:
        return delta_map.scale * u if delta_map.scale_inside else u

    at_zero = f.slope_at_zero
    slope = f.slope(argument(exact))
    slopes = dict(zip(PRECISIONS, (f.slope(argument(naive)), slope.bfloat16(), f.slope(argument(own))), strict=True))
    frequency = f.frequency if f.name in PERIODIC else 1.0
    return {
        "space": "weight",
        "forward": resolvability.forward,
        "derivative": resolvability.derivative,
        "std_u": _number(resolvability.std_u),
        "phase": _quantiles(frequency * argument(exact)),
        "slope_rms": _number((slope / at_zero - 1).square().mean().sqrt().item()) if at_zero else None,
        "slope_correlation": {
            key: _correlation(low.double() - at_zero, slope - at_zero) for key, low in slopes.items()
        },
        "slope_at_rest": {key: (low == at_zero).double().mean().item() for key, low in slopes.items()},
        "output_ratio": _output_ratio(exact, own, delta_map, dtype, x),
        "entries": resolvability.entries,
        "dtype": resolvability.dtype,
    }


def _output_ratio(exact: Tensor, own: Tensor, delta_map: DeltaMap, dtype: torch.dtype, x: Tensor | None) -> Record:
    """`exact` from u in fp64; `rounded` as a layer multiplies it, from its own u and with both matrices rounded to `dtype`."""
    if x is None:
        return {"exact": None, "rounded": None}
    x = x.to(exact.device, torch.float64)
    linear = delta_map.slope_at_zero
    bent = delta_map.value(exact) - linear * exact
    rounded = delta_map.value(own).to(dtype).double() - (linear * own).to(dtype).double()
    whole = linear * exact
    return {"exact": _ratio(bent @ x.T, whole @ x.T), "rounded": _ratio(rounded @ x.T, whole @ x.T)}


@torch.no_grad()
def activation_space_presence(layer: BottleneckLayer, x: Tensor | None, adapter: str = "default") -> Record:
    """The record of one activation-space layer, in fp64.

    Args:
        x: real inputs, (tokens, d_in); not looked at, and None will do, where m is applied to the columns of A.

    A layer that removes B0 A0 x is measured without that: it is linear. The share of few tokens (barely more than r + 1) is
    noisy, and can exceed 1. The columns of A are all there are and no sample, so that their share is exact as it is.
    """
    A, B = (factor.double() for factor in layer.factors(adapter))
    on_weights = layer.acts_on_weights(adapter)
    z = A.T if on_weights else x.to(A.device, torch.float64) @ A.T
    samples, r = z.shape
    m = layer.mapped(adapter, z)
    # the fit goes through the means, so it is enough to fit what is left without them
    z_left, m_left = z - z.mean(0), m - m.mean(0)
    unexplained = None
    if samples > r + 1 and _finite(z, m):
        unexplained = m_left - z_left @ (torch.linalg.pinv(z_left) @ m_left)
        unexplained *= 1.0 if on_weights else fit_correction(samples, r)
    zero, jacobian = _expansion_at_zero(layer, adapter, r, z)
    beyond_linear = m - zero - z @ jacobian.T
    return {
        "space": "activation",
        "applied_to": "columns" if on_weights else "tokens",
        "nonlinear_share": None if unexplained is None else _ratio(unexplained @ B.T, m @ B.T),
        "nonlinear_share_bottleneck": None if unexplained is None else _ratio(unexplained, m),
        "linear_from_zero": _ratio(beyond_linear @ B.T, m @ B.T),
        "linear_from_zero_bottleneck": _ratio(beyond_linear, m),
        "z_abs": _quantiles(z),
        "samples": samples,
        "entries": z.numel(),
    }


def _expansion_at_zero(layer: BottleneckLayer, adapter: str, r: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """m(0) (r,) and the Jacobian of m there (r, r), by one backward pass: copy i of the zero asks for output i."""
    with torch.enable_grad():
        zeros = like.new_zeros(r, r).requires_grad_()
        values = layer.mapped(adapter, zeros)
        (jacobian,) = torch.autograd.grad(values, zeros, torch.eye(r, dtype=values.dtype, device=values.device))
    return values[0].detach(), jacobian


def summarise_presence(layers: Mapping[str, Record]) -> Record | None:
    """One record for a model: `measure_presence`'s keys, each the mean over layers, weighted by the entries looked at.

    None is passed over, and stays where no layer has a number. Words are those of the first layer.

    Returns:
        The means, and "layers" (how many), "entries" (of all), "median" (the same keys, over layers without weights) and
        "types": module type, such as "q_proj" -> means of its layers, with their "layers" and "entries". None without a layer.
    """
    if not layers:
        return None
    records = list(layers.values())
    types: dict[str, list[Record]] = {}
    for name, record in layers.items():
        types.setdefault(name.rsplit(".", 1)[-1], []).append(record)
    return _means(records) | {
        "median": _combined(records, lambda values, weights: float(np.median(values))),
        "types": {kind: _means(own) for kind, own in types.items()},
    }


def base_name(name: str) -> str:
    """A module's name in a PEFT model as it is in the base model."""
    return name.removeprefix(PEFT_PREFIX)


def _means(records: Sequence[Record]) -> Record:
    words = {key: value for key, value in records[0].items() if isinstance(value, str)}
    counts = {"layers": len(records), "entries": sum(record["entries"] for record in records)}
    return words | _combined(records, lambda values, weights: float(np.average(values, weights=weights))) | counts


def _combined(records: Sequence[Record], statistic: Any) -> Record:
    """`statistic(values, weights)` of every number in the records, nested ones too."""
    combined: Record = {}
    for key in dict.fromkeys(key for record in records for key in record if key not in ("entries", "samples")):
        # a layer without inputs may have None where others have a record
        own = [(record.get(key), record["entries"]) for record in records]
        if any(isinstance(value, dict) for value, _ in own):
            nested = [value | {"entries": entries} for value, entries in own if isinstance(value, dict)]
            combined[key] = _combined(nested, statistic)
        elif not any(isinstance(value, str) for value, _ in own):
            numbers = [(value, entries) for value, entries in own if value is not None]
            combined[key] = statistic(*zip(*numbers, strict=True)) if numbers else None
    return combined


def _some_rows(x: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    """(..., d_in) -> (at most `tokens`, d_in), fp32."""
    rows = x.detach().flatten(0, -2)
    if mask is not None and x.shape[:-1] == mask.shape:
        rows = rows[mask.to(rows.device).bool().flatten()]
    if len(rows) > tokens:
        rows = rows[torch.linspace(0, len(rows) - 1, tokens, device=rows.device).round().long()]
    return rows.float()


def _quantiles(values: Tensor) -> dict[str, float | None]:
    """Of the absolute values."""
    found = np.quantile(values.abs().flatten().cpu().numpy(), list(QUANTILES.values()))
    return {key: _number(value) for key, value in zip(QUANTILES, found, strict=True)}


def _correlation(found: Tensor, exact: Tensor) -> float | None:
    """Pearson's; None where one of the two is constant."""
    found, exact = found.flatten(), exact.flatten()
    if (found == found[0]).all() or (exact == exact[0]).all():
        return None
    found, exact = found - found.mean(), exact - exact.mean()
    return _number((found @ exact / (found.norm() * exact.norm())).item())


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    """||part|| / ||whole||; None where the whole is zero."""
    norm = whole.norm().item()
    return _number(part.norm().item() / norm) if norm else None


def _finite(*tensors: Tensor) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in tensors)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
