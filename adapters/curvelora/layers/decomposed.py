"""Adapters that start from factors of the weight itself: h = W0 x - C x + B m(A drop(x)), C = B0 A0 what the init took out.

PiSSA (arXiv 2404.02948), MiLoRA (arXiv 2406.09044), OLoRA (arXiv 2406.01775) and RanLoRA (ACL Findings 2026.852) rewrite the base
weight as W0 - C. Here W0 stays, and C is stored with the adapter by its two factors (see `bottleneck`). In full precision that is
the same function. On a quantised base it is not: quantising W0 - C instead of W0 leaves a smaller error where C holds the large
singular values (QPiSSA), which this form gives up.
"""

from __future__ import annotations

import contextlib
import copy
import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvelora.errors import UserError
from curvelora.factor_cache import cached_triplets
from curvelora.layers.base_weight import device_of_weight, is_partitioned, whole_weight
from curvelora.layers.bottleneck import BottleneckLayer
from curvelora.layers.initial import SOURCES, initial_weight
from curvelora.tuner import LowRankConfig, check_choice, check_switch


@dataclass
class DecomposedConfig(LowRankConfig):
    """What every method has that takes factors of the weight.

    Args:
        svd_source: "unquantised" takes the factors from the layer's own weight or, on a quantised base, from the checkpoint
            that it was loaded from; "dequantised" allows those of the dequantised weight, whose last singular vectors have
            little to do with the weight's own (docs/methods.md has a figure).
        factors_stored: written by saving: the tensors come from the file beside the config, and nothing is computed.

    Raises:
        UserError: an unknown choice or a value out of its range.
    """

    svd_source: str = field(default="unquantised", metadata={"help": "unquantised, or dequantised to allow that"})
    factors_stored: bool = field(default=False, metadata={"help": "set by saving: the factors are in the file"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switch("factors_stored", self.factors_stored)
        check_choice("svd_source", self.svd_source, SOURCES)

    @property
    def needs_unquantised_weight(self) -> bool:
        return self.svd_source == "unquantised" and not self.factors_stored

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does it; the file says that the factors lie beside it, so loading decomposes nothing."""
        stored = copy.copy(self)
        stored.factors_stored = True
        super(DecomposedConfig, stored).save_pretrained(save_directory, **kwargs)


class DecomposedLayer(BottleneckLayer):
    """A linear layer with such adapters. A subclass names its tensors as for `BottleneckLayer`, and says how it decomposes."""

    @abstractmethod
    def decompose(self, config: DecomposedConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(A0, B0), of shapes (r, d_in) and (d_out, r), of `weight` (d_out, d_in): what is removed is B0 A0. Any floating dtype.

        Raises:
            ValueError: it cannot be done.
        """

    def divisors(self, config: DecomposedConfig) -> tuple[float, float]:
        """(a, b) of the start A = A0 / a, B = B0 / b; a b = s makes s BA what was removed."""
        return math.sqrt(config.scale), math.sqrt(config.scale)

    def create_parameters(self, adapter: str, config: DecomposedConfig, model: nn.Module | None) -> None:
        """A (r, d_in), B (d_out, r), and frozen A0, B0 of the same shapes."""
        (A0, B0), (a, b) = self.removed_factors(config, model), self.divisors(config)
        tensors = dict(zip(self.adapter_layer_names[:2], (A0 / a, B0 / b), strict=True))
        self.set_tensors(adapter, tensors, dict(zip(self.removed_names, (A0, B0), strict=True)))

    def bottleneck(self, adapter: str, z: Tensor) -> Tensor:
        """s z: linear."""
        return self.configs[adapter].scale * z

    @torch.no_grad()
    def removed_factors(self, config: DecomposedConfig, model: nn.Module | None) -> tuple[Tensor, Tensor]:
        """(A0, B0) in fp32, rounded once, on the layer's device.

        Raises:
            UserError: there is no weight to start from, or it cannot be decomposed.
        """
        shapes = (config.r, self.in_features), (self.out_features, config.r)
        device = device_of_weight(self.get_base_layer())
        if device.type == "meta":
            return tuple(torch.empty(shape, device=device) for shape in shapes)
        if config.factors_stored:  # NaN, so that a tensor that no file fills cannot go unseen
            return tuple(torch.full(shape, math.nan, device=device) for shape in shapes)
        return _rounded_factors(self, config, initial_weight(self, config.svd_source, model, config.revision))


def _rounded_factors(layer: DecomposedLayer, config: DecomposedConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(A0, B0) of `weight` in fp32. Raises `UserError` where it cannot be decomposed."""
    try:
        A0, B0 = layer.decompose(config, weight)
    except ValueError as error:
        raise UserError(f"module {layer.name!r} has no factors to start from: {error}") from error
    return A0.float(), B0.float()


@torch.no_grad()
def share_factors(model: nn.Module, base_model: nn.Module | None = None) -> None:
    """Decompose every layer on one process each, in rounds of as many layers as processes, and give all of them the factors.

    To be called on all processes of the default group, on a model whose adapters wait for their factors: attached with
    `factors_stored`. It is unset here.

    Args:
        base_model: knows its checkpoint, for factors of a quantised layer.

    Raises:
        UserError: on every process, where one of them cannot decompose a layer.
    """
    here, processes = dist.get_rank(), dist.get_world_size()
    waiting = [
        (layer, adapter, config)
        for layer in model.modules()
        if isinstance(layer, DecomposedLayer)
        for adapter, config in layer.configs.items()
        if config.factors_stored and layer.removed(adapter) is not None
    ]
    waiting.sort(key=lambda item: (item[0].out_features, item[0].in_features))  # neighbours cost the same
    found, problem = {}, None
    for first in range(0, len(waiting), processes):
        mine = None
        # weights first, for all processes of this round: under ZeRO-3 each has to give its share of every one
        for number, (layer, adapter, config) in enumerate(waiting[first : first + processes]):
            own = layer.configs[adapter] = copy.copy(config)
            own.factors_stored = False
            base_layer = layer.get_base_layer()
            in_shares = (weight := getattr(base_layer, "weight", None)) is not None and is_partitioned(weight)
            with whole_weight(base_layer) if in_shares else contextlib.nullcontext():
                if number == here:
                    try:
                        start = initial_weight(layer, own.svd_source, base_model, own.revision)
                        mine = layer, own, start.clone() if in_shares else start
                    except UserError as error:
                        problem = problem or str(error)
        if mine is not None:
            try:
                found[first + here] = _rounded_factors(*mine)
            except UserError as error:
                problem = problem or str(error)
    problems: list[str | None] = [None] * processes
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise UserError(next(filter(None, problems)))
    for number, (layer, adapter, _) in enumerate(waiting):
        A0, B0 = (found[number] if number in found else map(torch.empty_like, layer.removed(adapter)))
        A0, B0 = A0.contiguous(), B0.contiguous()
        for factor in (A0, B0):
            dist.broadcast(factor, number % processes)
        a, b = layer.divisors(layer.configs[adapter])
        names = (*layer.adapter_layer_names[:2], *layer.removed_names)
        for name, value in zip(names, (A0 / a, B0 / b, A0, B0), strict=True):
            getattr(layer, name)[adapter].data.copy_(value)


def balanced_factors(weight: Tensor, r: int, end: str) -> tuple[Tensor, Tensor]:
    """(S^1/2 V^T, U S^1/2) of the first or last r singular triplets of `weight`, in fp64; from the cache if it has them.

    Args:
        end: "first" or "last".

    Raises:
        ValueError: as `curvelora.svd.singular_triplets`.
    """
    found = cached_triplets(weight, r, end)
    root = found.S.sqrt()
    return root[:, None] * found.V.T, found.U * root
