"""What an adapter adds to each layer's weight, for every method: dW (d_out, d_in), in thin factors where it has them.

    LoRA                         s B A
    weight space (LoRAN)         s f(BA)                  dense
    bottleneck, m linear         B m(A) - B0 A0           factors of rank up to 2 r
    bottleneck, m nonlinear      B L A - B0 A0            L: the best linear map for given inputs
    full fine-tuning             W - W_initial            dense

A nonlinear bottleneck has no dW. Its best linear map is the least-squares fit of m(z) by L z + c over the z = A x of real
inputs x; L stands for m in the update, and what L leaves unexplained is reported beside it. c adds the constant B c to every
output, which no weight can, so it is reported and left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from curvelora.errors import UserError
from curvelora.layers.adapter_layer import AdapterLayer
from curvelora.layers.base_weight import is_transposed, refuse_reordered_4bit
from curvelora.layers.bottleneck import BottleneckLayer
from curvelora.layers.dense_delta import DenseDeltaLayer
from curvelora.merging import Merge
from curvelora.precision import at_least_fp32, exact_products

PEFT_PREFIX = "base_model.model."
TRAINED_IN_FULL = {
    "modules_to_save",
    "original_module",
}  # PEFT's wrappers of heads that train in full, and of their copies
Factors = tuple[Tensor, Tensor]


def adapted_layers(model: nn.Module, adapter: str = "default") -> dict[str, nn.Module]:
    """Layer name, as in the base model -> layer, of every linear layer with `adapter` or under full fine-tuning.

    A layer under full fine-tuning has `weight` (trained) and `initial_weight` (frozen). `modules_to_save` are left out.
    """
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if not TRAINED_IN_FULL & set(name.split(".")) and (_is_full(module) or _carries(module, adapter))
    }


def _carries(layer: nn.Module, adapter: str) -> bool:
    if isinstance(layer, AdapterLayer):
        return adapter in layer.configs
    return isinstance(layer, LoraLayer) and adapter in layer.lora_A


def _is_full(layer: nn.Module) -> bool:
    # PEFT's wrapper of a module that trains in full passes on the attributes of what it wraps
    own = not isinstance(layer, ModulesToSaveWrapper)
    return own and isinstance(getattr(layer, "initial_weight", None), Tensor) and hasattr(layer, "weight")


def factors(layer: nn.Module, adapter: str = "default") -> Factors | None:
    """(A, B) of `adapter`, shapes (r, d_in) and (d_out, r), as stored and detached; None for a layer that has none."""
    if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
        return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    if isinstance(layer, DenseDeltaLayer | BottleneckLayer) and adapter in layer.configs:
        A, B = layer.factors(adapter)
        return A.detach(), B.detach()
    return None


def scale(layer: nn.Module, adapter: str = "default") -> float:
    """s of `adapter`: by which s B A would be the LoRA with these factors."""
    return float(layer.scaling[adapter] if isinstance(layer, LoraLayer) else layer.configs[adapter].scale)


def is_nonlinear(layer: nn.Module, adapter: str = "default") -> bool:
    """Whether `adapter` is nonlinear in the layer's input, so that only a best linear map stands for it."""
    return isinstance(layer, BottleneckLayer) and layer.configs[adapter].merge is not Merge.EXACT


@dataclass(frozen=True)
class LinearMap:
    """The least-squares fit m(z) ~ L z + c over given inputs.

    Args:
        matrix: L (r, r), fp64.
        intercept: c (r,), fp64.
        residual: ||m(Z) - L Z - c||_F / ||m(Z)||_F times `fit_correction`, the share of m that is not linear on inputs such as
            these; of few tokens it is noisy, and can exceed 1. None where m is zero.
        intercept_share: ||c|| sqrt(tokens) / ||m(Z)||_F; None where m is zero.
    """

    matrix: Tensor
    intercept: Tensor
    residual: float | None
    intercept_share: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The two shares, as plain data."""
        return {"residual": self.residual, "intercept_share": self.intercept_share}


def fit_correction(tokens: int, rank: int) -> float:
    """sqrt(n / (n - r - 1)), by which the norm of what a fit of r + 1 unknowns an output leaves on its own n tokens is too small.

    Raises:
        ValueError: no more tokens than unknowns.
    """
    if tokens <= rank + 1:
        raise ValueError(f"{tokens} tokens leave nothing of a fit with {rank + 1} unknowns")
    return (tokens / (tokens - rank - 1)) ** 0.5


def can_be_fitted(layer: nn.Module, inputs: Tensor | None, adapter: str = "default") -> bool:
    """Whether `inputs` (..., d_in) are enough for the best linear map of `layer`, r + 2 tokens; True where it needs none."""
    if not is_nonlinear(layer, adapter):
        return True
    return inputs is not None and inputs.numel() // inputs.shape[-1] >= len(factors(layer, adapter)[0]) + 2


@torch.no_grad()
def best_linear_map(layer: BottleneckLayer, inputs: Tensor, adapter: str = "default") -> LinearMap:
    """Fit the bottleneck of `adapter` on real inputs: z and m(z) in fp32 (fp64 for fp64 factors), the fit in fp64.

    Args:
        inputs: x (..., d_in), at least r + 2 tokens. Where z spans fewer than r dimensions, L is the one of least norm.

    Raises:
        UserError: too few tokens.
    """
    A, _ = factors(layer, adapter)
    x = inputs.reshape(-1, inputs.shape[-1])
    if len(x) < A.shape[0] + 2:
        raise UserError(
            f"the best linear map of a rank-{A.shape[0]} bottleneck needs at least {A.shape[0] + 2} tokens, found {len(x)}: "
            "a smaller sample is fitted exactly by any map; give more inputs"
        )
    work = at_least_fp32(A.dtype)
    was_training, layer.training = layer.training, False  # AuroRA counts its inputs in training passes
    try:
        with exact_products(A.device):
            z = x.to(A.device, work) @ A.to(work).T
            m = layer.mapped(adapter, z)
    finally:
        layer.training = was_training
    z, m = z.double(), m.double()
    z_mean, m_mean = z.mean(0), m.mean(0)
    if not torch.isfinite(z).all():  # a diverged run has no such map, and SVD refuses to look for it
        return LinearMap(z.new_full((A.shape[0],) * 2, torch.nan), z.new_full((A.shape[0],), torch.nan), None, None)
    # the pseudo-inverse of centred inputs by SVD: normal equations would square the condition of factors that differ in size
    matrix = (torch.linalg.pinv(z - z_mean, rtol=10 * torch.finfo(work).eps) @ (m - m_mean)).T
    intercept = m_mean - matrix @ z_mean
    norm = m.norm().item()
    left = (m - z @ matrix.T - intercept).norm().item()
    return LinearMap(
        matrix,
        intercept,
        fit_correction(len(x), A.shape[0]) * left / norm if norm else None,
        intercept.norm().item() * len(x) ** 0.5 / norm if norm else None,
    )


@torch.no_grad()
def update_factors(layer: nn.Module, inputs: Tensor | None = None, adapter: str = "default") -> Factors | None:
    """(A, B) with dW = B A, everything between them and the scale included; None where dW is dense.

    Args:
        inputs: (..., d_in), real inputs of the layer; needed where it is nonlinear in them, else ignored.

    Returns:
        A (q, d_in) and B (d_out, q), fp32 (fp64 for fp64 factors), with q = r, or 2 r where the init removed a part.

    Raises:
        ValueError: a nonlinear bottleneck without inputs.
        UserError: a variant of LoRA whose update is not s B A (DoRA), or too few inputs.
    """
    pair = factors(layer, adapter)
    if pair is None or isinstance(layer, DenseDeltaLayer):
        return None
    A, B = (t.to(at_least_fp32(t.dtype)) for t in pair)
    if isinstance(layer, LoraLayer):
        if adapter in layer.lora_variant:
            raise UserError(
                f"the update of {type(layer.lora_variant[adapter]).__name__} is not s B A, which is what is measured here: "
                "switch the variant off (use_dora: false)"
            )
        return A, scale(layer, adapter) * B
    if not is_nonlinear(layer, adapter):
        A = layer.mapped_A(adapter).detach()
    elif inputs is None:
        raise ValueError(
            f"{type(layer).__name__} is nonlinear in its input, so its update depends on what comes in: "
            "give inputs (tokens, d_in)"
        )
    else:
        A = (best_linear_map(layer, inputs, adapter).matrix @ A.double()).to(A.dtype)
    if (removed := layer.removed(adapter)) is not None:
        A, B = torch.cat([A, removed[0].to(A.dtype)]), torch.cat([B, -removed[1].to(B.dtype)], 1)
    return A, B


@torch.no_grad()
def update_weight(layer: nn.Module, inputs: Tensor | None = None, adapter: str = "default") -> Tensor:
    """dW: (d_out, d_in), fp32 (fp64 for fp64 factors), by exact products; see the module's table.

    Args:
        inputs: as in `update_factors`.

    Raises:
        ValueError: a nonlinear bottleneck without inputs, or a layer that is neither adapted nor under full fine-tuning.
        UserError: as in `update_factors`.
    """
    if _is_full(layer):
        work = at_least_fp32(layer.weight.dtype)
        return layer.weight.detach().to(work) - layer.initial_weight.to(work)
    if isinstance(layer, DenseDeltaLayer):
        return layer.delta_weight(adapter)
    if (pair := update_factors(layer, inputs, adapter)) is None:
        raise ValueError(f"{type(layer).__name__} has no adapter {adapter!r} whose update is known")
    A, B = pair
    with exact_products(A.device):
        return B @ A


@torch.no_grad()
def base_weight(layer: nn.Module) -> Tensor:
    """W0 (d_out, d_in), fp32 or wider, dequantised where it is quantised; under full fine-tuning the initial weight.

    Raises:
        UserError: an adapter is merged into it, or it was reordered by bitsandbytes.
    """
    if _is_full(layer):
        return layer.initial_weight.to(at_least_fp32(layer.initial_weight.dtype))
    if layer.merged:
        raise UserError("the base weight holds a merged adapter: call model.unmerge_adapter() first")
    base_layer = layer.get_base_layer()
    refuse_reordered_4bit(base_layer, "of the base")
    # PEFT's bitsandbytes layers of LoRA have no backend of their own
    backend = layer.quantization_backend or resolve_quantization_backend(base_layer)
    weight = (base_layer.weight if backend is None else backend.get_base_weight(base_layer)).detach()
    weight = weight.T if is_transposed(base_layer) else weight
    return weight.to(at_least_fp32(weight.dtype))
