"""MiLoRA: LoRA that starts from the weight's last singular triplets, which are taken out of the weight.

    h = W0 x - C x + s B A drop(x)        A: (r, d_in)   B: (d_out, r)   C = B0 A0 = the last r of U S V^T

Paper: arXiv 2406.09044, with the authors' script for alpha = r. Init: A = (S / s)^1/2 V^T, B = U (S / s)^1/2 of the last r
triplets of min(d_out, d_in), so that s BA = C and the model starts as the base. Trains A and B, as many as LoRA. Merges exactly.
The script writes W0 - C into a new base; here the base is untouched (`layers.decomposed`), which matters more than for PiSSA: in
bf16 most of the tail lies below half a unit in the last place of W0. Cost: four thin products a layer, one decomposition a layer
at the start.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from curvelora.layers.decomposed import DecomposedConfig, DecomposedLayer, balanced_factors
from curvelora.method import Method
from curvelora.methods.pissa import FILE_IS_DOUBLE
from curvelora.peft_registration import extend_peft_type
from curvelora.tuner import AdapterModel


@dataclass
class MiloraConfig(DecomposedConfig):
    """Config of MiLoRA; rank, alpha = r and dropout are those of the paper's script."""

    r: int = field(default=64, metadata={"help": "rank"})
    alpha: float = field(default=64, metadata={"help": "scale s = alpha / r"})
    dropout: float = field(default=0.05, metadata={"help": "dropout on the adapter's input"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("milora")


class MiloraLayer(DecomposedLayer):
    """A linear layer with MiLoRA adapters."""

    adapter_layer_names = ("milora_A", "milora_B")
    removed_names = ("milora_A0", "milora_B0")

    def decompose(self, config: MiloraConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The last r triplets."""
        return balanced_factors(weight, config.r, "last")


class MiloraModel(AdapterModel):
    """MiLoRA as a PEFT tuner."""

    prefix = "milora_"
    tuner_layer_cls = MiloraLayer


METHOD = Method(
    name="milora",
    title="MiLoRA: LoRA from the weight's last singular triplets",
    formula="h = W0 x - C x + s B A x,  s = alpha / r,  C = B0 A0 the last r singular triplets of W0",
    paper="MiLoRA (arXiv 2406.09044)",
    provided_by="curvelora",
    config_class=MiloraConfig,
    model_class=MiloraModel,
    defaults={},
    internal_options=("factors_stored",),
    family=lambda config: "activation space, linear",
    merge=lambda config: config.merge,
    identity_at_init=lambda config: True,
    trainable_parameters=lambda config, d_out, d_in: config.r * (d_in + d_out),
    cost="four thin products per layer, one SVD a layer at the start",
    caveats=(
        "The last singular vectors of a quantised weight are other ones, so on a quantised base the factors come from the "
        "unquantised checkpoint.",
        FILE_IS_DOUBLE,
        "With dropout the untrained adapter is not the base in training: A sees the dropped input, what was removed does not.",
    ),
)
