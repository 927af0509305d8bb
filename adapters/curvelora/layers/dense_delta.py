"""Weight-space family ("dense delta"): h = W0 x + dW drop(x) with dW = s f(BA), f elementwise.

    x: (..., d_in)   A: (r, d_in)   B: (d_out, r)   u = BA: (d_out, d_in)   s = alpha / r

LoRAN, arXiv 2509.21870. Two readings of the scale: `outside` dW = s f(u), the authors' code; `inside` dW = f(s u), the paper's
text. dW has full rank in general, so it has to be formed; everything else here keeps that affordable:

* u and f are evaluated in fp32 from fp32 factors with autocast and TF32 off, then dW is rounded once to the dtype in which
  the layer multiplies.
* Autograd is given x, A and B only. The backward pass forms u again, so no d_out x d_in tensor outlives either pass.
* Rows are handled in blocks, so fp32 temporaries take tens of megabytes, whatever the size of the layer.

Gradients, with g = dL/dh of shape (tokens, d_out), and c = s f'(u) (`outside` and `inside` differ only in where f' is taken):

    dL/dx = g dW      M = (g^T x) * c      dL/dB = M A^T      dL/dA = B^T M

Where the amplitudes and the frequency of f are tensors (`curvelora.series`), they get theirs in the same blocks: the sums of
t g^T x df/da and t g^T x df/dw over the entries, or over those of each row, with t = s (`outside`) or 1 (`inside`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvelora.activations import Activation
from curvelora.kernels.choice import takes_kernels, why_no_curve, why_not
from curvelora.layers.adapter_layer import AdapterLayer
from curvelora.layers.initial import kaiming_A, zero_B
from curvelora.precision import at_least_fp32, compute_dtype, exact_products
from curvelora.series import Series

# Entries of an fp32 temporary: 2^22 are 16 MiB, small enough to stay near the caches, large enough to hide launches.
BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class DeltaMap:
    """The map u -> dW, entry by entry.

    Args:
        activation: f.
        scale: s, dimensionless.
        scale_inside: False for s f(u), True for f(s u).
    """

    activation: Activation | Series
    scale: float
    scale_inside: bool = False

    def value(self, u: Tensor) -> Tensor:
        """dW, in the dtype of u."""
        return self.activation.value(self.scale * u) if self.scale_inside else self.scale * self.activation.value(u)

    def slope(self, u: Tensor) -> Tensor:
        """d dW / d u, in the dtype of u."""
        return self.scale * self.activation.slope(self.scale * u if self.scale_inside else u)

    def rows(self, chosen: Any) -> DeltaMap:
        """The map of the rows of u that the slice or index `chosen` takes; they differ where f has tensors of its own."""
        f = self.activation
        return replace(self, activation=f.rows(chosen)) if isinstance(f, Series) else self

    def parameter_gradients(self, grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Of f's amplitudes and frequency, given dL/d dW: see `Series.parameter_gradients`."""
        if self.scale_inside:
            return self.activation.parameter_gradients(grad, self.scale * u)
        return self.activation.parameter_gradients(self.scale * grad, u)

    @property
    def slope_at_zero(self) -> float:
        """The linear part: dW ~ slope_at_zero * u for small u, the LoRA that this map would be without its curvature."""
        return self.scale * self.activation.slope_at_zero


def map_fields(delta_map: DeltaMap) -> tuple[str, float, float, float, bool]:
    """A map whose f is an `Activation`, as the plain values that an operator's arguments can be; see `delta_map_of`."""
    f = delta_map.activation
    return f.name, f.amplitude, f.frequency, delta_map.scale, delta_map.scale_inside


@cache
def delta_map_of(name: str, amplitude: float, frequency: float, scale: float, inside: bool) -> DeltaMap:
    """The map of these `map_fields`."""
    return DeltaMap(Activation(name, amplitude, frequency), scale, inside)


def row_blocks(d_out: int, d_in: int) -> Iterator[slice]:
    """Slices of rows with at most `BLOCK_ENTRIES` entries each (at least one row)."""
    step = max(1, BLOCK_ENTRIES // d_in)
    for start in range(0, d_out, step):
        yield slice(start, min(start + step, d_out))


def dense_delta(A: Tensor, B: Tensor, delta_map: DeltaMap, dtype: torch.dtype) -> Tensor:
    """Form dW: (d_out, d_in), evaluated in fp32 (fp64 for fp64 factors) and rounded once to `dtype`."""
    work = at_least_fp32(A.dtype)
    A, B = A.to(work), B.to(work)
    weight = torch.empty(B.shape[0], A.shape[1], dtype=dtype, device=A.device)
    with exact_products(A.device):
        for rows in row_blocks(*weight.shape):
            weight[rows] = delta_map.rows(rows).value(B[rows] @ A)
    return weight


# The forward and the backward pass are operators of their own: torch.compile takes them as they are, where tracing into them
# would stop at the switches of `exact_products` and unroll the blocks.
@torch.library.custom_op("curvelora::dense_delta_product", mutates_args=())
def _product(
    x: Tensor, A: Tensor, B: Tensor, name: str, amplitude: float, frequency: float, scale: float, inside: bool
) -> Tensor:
    delta_map = delta_map_of(name, amplitude, frequency, scale, inside)
    return F.linear(x, dense_delta(A, B, delta_map, x.dtype))


@_product.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, *map_fields: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


@torch.library.custom_op("curvelora::dense_delta_gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    needs_x: bool,
    needs_factors: bool,
    name: str,
    amplitude: float,
    frequency: float,
    scale: float,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dx, dL/dA, dL/dB); what is not needed is empty."""
    delta_map = delta_map_of(name, amplitude, frequency, scale, inside)
    return _blockwise_gradients(grad, x, A, B, delta_map, needs_x, needs_factors)


def _blockwise_gradients(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    delta_map: DeltaMap,
    needs_x: bool,
    needs_factors: bool,
    curve: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_gradients`; those of f's amplitudes and frequency are added to `curve`, zeros of their shapes, where it is given."""
    work = at_least_fp32(A.dtype)
    A_, B_ = A.to(work), B.to(work)
    grad = grad.to(x.dtype)
    g, x_ = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    weight = x.new_empty((B.shape[0], A.shape[1]) if needs_x else 0)
    grad_A = torch.zeros_like(A_) if needs_factors else A_.new_empty(0)
    grad_B = torch.empty_like(B_) if needs_factors else B_.new_empty(0)
    # A backward pass that is called under autocast multiplies as the forward pass did.
    with torch.autocast(x.device.type, enabled=False):
        for rows in row_blocks(B.shape[0], A.shape[1]):
            # The token product runs in the layer's own dtype, as it would for any linear layer ...
            G = (g[:, rows].T @ x_) if needs_factors or curve else None
            # ... and what follows in fp32, because f' - 1 is smaller than the spacing of bf16.
            with exact_products(x.device):
                u, own = B_[rows] @ A_, delta_map.rows(rows)
                if needs_x:
                    weight[rows] = own.value(u)
                if needs_factors:
                    M = G.to(work) * own.slope(u)
                    grad_B[rows] = M @ A_.T
                    grad_A += B_[rows].T @ M
                if curve:
                    for total, part in zip(curve, own.parameter_gradients(G.to(work), u), strict=True):
                        total[rows if len(total) > 1 else slice(None)] += part
        grad_x = (g @ weight).reshape(x.shape) if needs_x else weight
    if needs_factors and A.dtype != work:
        grad_A, grad_B = grad_A.to(A.dtype), grad_B.to(B.dtype)
    return grad_x, grad_A, grad_B


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, A: Tensor, B: Tensor, needs_x: bool, needs_factors: bool, *map_fields: Any) -> Any:
    return (
        x.new_empty(x.shape if needs_x else 0),
        A.new_empty(A.shape if needs_factors else 0),
        B.new_empty(B.shape if needs_factors else 0),
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, A, B, *ctx.map_fields = inputs
    ctx.save_for_backward(x, A, B)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, *needs = ctx.needs_input_grad[:3]
    grad_x, grad_A, grad_B = _gradients(grad, *ctx.saved_tensors, needs_x, any(needs), *ctx.map_fields)
    factors = (grad_A, grad_B) if any(needs) else (None, None)
    return grad_x if needs_x else None, *factors, *(None for _ in ctx.map_fields)


_product.register_autograd(_backward, setup_context=_save)


# The same pair for an f whose amplitudes (rows, K) and frequency (rows, 1) are tensors.
@torch.library.custom_op("curvelora::dense_series_product", mutates_args=())
def _series_product(
    x: Tensor, A: Tensor, B: Tensor, amplitude: Tensor, frequency: Tensor, name: str, scale: float, inside: bool
) -> Tensor:
    return F.linear(x, dense_delta(A, B, DeltaMap(Series(name, amplitude, frequency), scale, inside), x.dtype))


@_series_product.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


@torch.library.custom_op("curvelora::dense_series_gradients", mutates_args=())
def _series_gradients(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    amplitude: Tensor,
    frequency: Tensor,
    needs_x: bool,
    needs_factors: bool,
    needs_curve: bool,
    name: str,
    scale: float,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dL/dx, dL/dA, dL/dB, dL/da, dL/dw); what is not needed is empty, or zero for the last two."""
    delta_map = DeltaMap(Series(name, amplitude, frequency), scale, inside)
    work = at_least_fp32(A.dtype)
    of_curve = tuple(torch.zeros_like(t, dtype=work) for t in (amplitude, frequency))
    found = _blockwise_gradients(grad, x, A, B, delta_map, needs_x, needs_factors, of_curve if needs_curve else None)
    of_a, of_w = (total.to(t.dtype) for total, t in zip(of_curve, (amplitude, frequency), strict=True))
    return *found, of_a, of_w


@_series_gradients.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    amplitude: Tensor,
    frequency: Tensor,
    needs_x: bool,
    needs_factors: bool,
    *rest: Any,
) -> Any:
    return (
        x.new_empty(x.shape if needs_x else 0),
        A.new_empty(A.shape if needs_factors else 0),
        B.new_empty(B.shape if needs_factors else 0),
        torch.empty_like(amplitude),
        torch.empty_like(frequency),
    )


def _save_series(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.name, ctx.scale, ctx.inside = inputs
    ctx.save_for_backward(*tensors)


def _series_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:5]
    wanted = needs[0], any(needs[1:3]), any(needs[3:])
    found = _series_gradients(grad, *ctx.saved_tensors, *wanted, ctx.name, ctx.scale, ctx.inside)
    return *(value if need else None for value, need in zip(found, needs, strict=True)), None, None, None


_series_product.register_autograd(_series_backward, setup_context=_save_series)


def dense_delta_product(x: Tensor, A: Tensor, B: Tensor, delta_map: DeltaMap) -> Tensor:
    """x dW^T: (..., d_out), in the dtype of x, in which the product is made; autograd keeps x, A, B and f's own tensors only.

    Args:
        x: (..., d_in).
        A, B: factors, (r, d_in) and (d_out, r), best in fp32.
    """
    f = delta_map.activation
    if isinstance(f, Series):
        return _series_product(x, A, B, f.amplitude, f.frequency, f.name, delta_map.scale, delta_map.scale_inside)
    return _product(x, A, B, *map_fields(delta_map))


class DenseDeltaLayer(AdapterLayer):
    """h = W0 x + dW drop(x). A subclass names its parameters, the two factors first, for example ("loran_A", "loran_B").

    The config of an adapter has r, dropout, dropout_form, init_B_std and `delta_map() -> DeltaMap`.
    """

    kernels = "auto"  # or "off", "fp8": see `curvelora.kernels.use_kernels`

    def delta_map(self, adapter: str) -> DeltaMap:
        """The map u -> dW of `adapter` in this layer as it is now; the config's, unless a method says more."""
        return self.configs[adapter].delta_map()

    def set_schedule_position(self, fraction: float, total_steps: int | None = None) -> bool:
        """See `curvelora.schedules.set_schedule_position`; whether an active adapter has a schedule. Here none has."""
        return False

    def create_parameters(self, adapter: str, config: Any, model: nn.Module | None) -> None:
        """A (r, d_in) Kaiming-uniform, U(-1/sqrt(d_in), 1/sqrt(d_in)), as nn.Linear; B (d_out, r) zero or N(0, init_B_std^2)."""
        A, B = kaiming_A(config.r, self.in_features), zero_B(self.out_features, config.r)
        if config.init_B_std:
            nn.init.normal_(B, std=config.init_B_std)
        for name, value in zip(self.adapter_layer_names[:2], (A, B), strict=True):
            getattr(self, name)[adapter] = nn.Parameter(value)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(A, B) of `adapter`, shapes (r, d_in) and (d_out, r)."""
        A, B = (getattr(self, name)[adapter] for name in self.adapter_layer_names[:2])
        return A, B

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., d_in) -> (..., d_out), by the fused kernels where `curvelora.kernels.choice` finds that they apply."""
        if not (args or kwargs or self.disable_adapters or self.merged):
            adapter = self._only_adapter()
            if self._why_no_kernels(adapter) is None and takes_kernels(self.base_layer, x, *self.factors(adapter)):
                return self._fused_output(adapter, x)
        return super().forward(x, *args, **kwargs)

    def _only_adapter(self) -> str | None:
        active = [adapter for adapter in self.active_adapters if adapter in self.configs]
        return active[0] if len(active) == 1 else None

    def why_no_kernels(self) -> str | None:
        """Why a pass takes no fused kernel as the layer is now; None where it does if it multiplies in bf16."""
        return self._why_no_kernels(self._only_adapter())

    def _why_no_kernels(self, adapter: str | None) -> str | None:
        if self.kernels == "off":
            return "kernels: off"
        if adapter is None:
            return "not one active adapter"
        if self.base_layer is not self.get_base_layer():
            return "an adapter around another one"
        reason = why_not(self.base_layer, self.configs[adapter].r)
        return reason or why_no_curve(self.delta_map(adapter).activation)

    def _fused_output(self, adapter: str, x: Tensor) -> Tensor:
        # Triton is there where this is reached
        from curvelora.kernels.fp8_gate import asked
        from curvelora.kernels.fused_output import fused_output

        config, (A, B) = self.configs[adapter], self.factors(adapter)
        p = config.dropout if self.training else 0.0
        if p and config.dropout_form == "features":
            A, p = self._dropped_features(A, p), 0.0
        return fused_output(self.base_layer, x, A, B, self.delta_map(adapter), p, asked(self, adapter))

    @staticmethod
    def _dropped_features(A: Tensor, p: float) -> Tensor:
        """A with the columns of dropped inputs at zero and the others divided by 1 - p."""
        return A * F.dropout(A.new_ones(A.shape[1]), p)

    def adapter_output(self, adapter: str, x: Tensor) -> Tensor:
        """dW drop(x), computed in the dtype in which a linear layer would multiply x. x: (..., d_in) -> (..., d_out)."""
        config, (A, B) = self.configs[adapter], self.factors(adapter)
        x = x.to(compute_dtype(x))
        if config.dropout and self.training:
            if config.dropout_form == "features":
                A = self._dropped_features(A, config.dropout)
            else:
                x = F.dropout(x, config.dropout)
        return dense_delta_product(x, A, B, self.delta_map(adapter))

    def delta_weight(self, adapter: str) -> Tensor:
        """dW: (d_out, d_in), fp32 (fp64 for fp64 factors)."""
        A, B = self.factors(adapter)
        return dense_delta(A, B, self.delta_map(adapter), at_least_fp32(A.dtype))
