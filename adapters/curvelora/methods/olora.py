"""OLoRA: LoRA that starts from the weight's QR decomposition, whose first r terms are taken out of the weight.

    h = W0 x - C x + s B A drop(x)        A: (r, d_in)   B: (d_out, r)   W0 = Q R   C = B0 A0 = s Q[:, :r] R[:r]

Paper: arXiv 2406.01775; the scale as PEFT has it (R is not divided by s, so s times the first r terms are removed). Init: B the
first r columns of Q, A the first r rows of R; the model starts as the base. Trains A and B, as many as LoRA. Merges exactly. The
base is untouched (`layers.decomposed`). Cost: four thin products a layer, one QR decomposition a layer at the start.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvelora.layers.decomposed import DecomposedConfig, DecomposedLayer
from curvelora.method import Method
from curvelora.methods.pissa import FILE_IS_DOUBLE
from curvelora.peft_registration import extend_peft_type
from curvelora.tuner import AdapterModel


@dataclass
class OloraConfig(DecomposedConfig):
    """Config of OLoRA; the paper varies rank and alpha, so these are the project's (r 32, alpha 16, one of its settings)."""

    r: int = field(default=32, metadata={"help": "rank"})
    alpha: float = field(default=16, metadata={"help": "scale s = alpha / r"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("olora")


class OloraLayer(DecomposedLayer):
    """A linear layer with OLoRA adapters."""

    adapter_layer_names = ("olora_A", "olora_B")
    removed_names = ("olora_A0", "olora_B0")

    def divisors(self, config: OloraConfig) -> tuple[float, float]:
        """Q stays orthonormal: s is taken out of A alone."""
        return config.scale, 1.0

    def decompose(self, config: OloraConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(s R[:r], Q[:, :r]) in fp64."""
        if not torch.isfinite(weight).all():
            raise ValueError("the weight has NaN or infinite entries")
        Q, R = torch.linalg.qr(weight.double())
        return config.scale * R[: config.r], Q[:, : config.r]


class OloraModel(AdapterModel):
    """OLoRA as a PEFT tuner."""

    prefix = "olora_"
    tuner_layer_cls = OloraLayer


METHOD = Method(
    name="olora",
    title="OLoRA: LoRA from the weight's QR decomposition",
    formula="h = W0 x - C x + s B A x,  s = alpha / r,  C = B0 A0 = s times the first r terms of W0 = Q R",
    paper="OLoRA (arXiv 2406.01775)",
    provided_by="curvelora",
    config_class=OloraConfig,
    model_class=OloraModel,
    defaults={},
    internal_options=("factors_stored",),
    family=lambda config: "activation space, linear",
    merge=lambda config: config.merge,
    identity_at_init=lambda config: True,
    trainable_parameters=lambda config, d_out, d_in: config.r * (d_in + d_out),
    cost="four thin products per layer, one QR decomposition a layer at the start",
    caveats=(
        "Q[:, :r] spans the first r columns of the weight, whichever inputs those are: the order of the input features matters.",
        FILE_IS_DOUBLE,
        "On a quantised base the factors come from the unquantised checkpoint.",
    ),
)
