"""PiSSA: LoRA that starts from the weight's first singular triplets, which are taken out of the weight.

    h = W0 x - C x + s B A drop(x)        A: (r, d_in)   B: (d_out, r)   C = B0 A0 = U_r S_r V_r^T

Paper: arXiv 2404.02948. Init: A = (S_r / s)^1/2 V_r^T, B = U_r (S_r / s)^1/2 of the first r triplets, so that s BA = C and the
model starts as the base. Trains A and B, as many as LoRA. Merges exactly. The paper writes W0 - C into the base; here the base
is untouched and C is stored with the adapter, which is the same function in full precision (`layers.decomposed`). Cost: four thin
products a layer (two pairs, read as one), one decomposition a layer at the start.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import LoraConfig
from torch import Tensor

from curvelora.layers.decomposed import DecomposedConfig, DecomposedLayer, balanced_factors
from curvelora.method import Method
from curvelora.methods.lora import LORA
from curvelora.peft_registration import extend_peft_type
from curvelora.tuner import AdapterModel


@dataclass
class PissaConfig(DecomposedConfig):
    """Config of PiSSA; alpha = r as in the paper's scripts, so that s = 1."""

    r: int = field(default=16, metadata={"help": "rank"})
    alpha: float = field(default=16, metadata={"help": "scale s = alpha / r"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("pissa")


class PissaLayer(DecomposedLayer):
    """A linear layer with PiSSA adapters."""

    adapter_layer_names = ("pissa_A", "pissa_B")
    removed_names = ("pissa_A0", "pissa_B0")

    def decompose(self, config: PissaConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The first r triplets."""
        return balanced_factors(weight, config.r, "first")


class PissaModel(AdapterModel):
    """PiSSA as a PEFT tuner."""

    prefix = "pissa_"
    tuner_layer_cls = PissaLayer


FILE_IS_DOUBLE = "The adapter file holds the removed factors too, so it is twice as large as its trainable part."

METHOD = Method(
    name="pissa",
    title="PiSSA: LoRA from the weight's first singular triplets",
    formula="h = W0 x - C x + s B A x,  s = alpha / r,  C = B0 A0 the first r singular triplets of W0",
    paper="PiSSA (arXiv 2404.02948)",
    provided_by="curvelora",
    config_class=PissaConfig,
    model_class=PissaModel,
    defaults={},
    internal_options=("factors_stored",),
    family=lambda config: "activation space, linear",
    merge=lambda config: config.merge,
    identity_at_init=lambda config: True,
    trainable_parameters=lambda config, d_out, d_in: config.r * (d_in + d_out),
    cost="four thin products per layer, one SVD a layer at the start",
    caveats=(
        "On a quantised base this is not QPiSSA: that quantises what is left of the weight, with an error of 0.87 (r = 16) and "
        "0.68 (r = 64) times this form's on MiniLM in NF4; here W0 is quantised, and the factors come from the unquantised "
        "weight. PEFT's own form is pissa_rewritten_base.",
        FILE_IS_DOUBLE,
        "Weight decay pulls A and B to zero and not to their start, which takes what was removed with them.",
    ),
)

REWRITTEN_BASE = Method(
    name="pissa_rewritten_base",
    title="PiSSA in PEFT's form: the base weight is rewritten",
    formula="h = (W0 - C) x + s B A x,  W0 - C stored in the base's dtype",
    paper="PiSSA (arXiv 2404.02948)",
    provided_by="peft",
    config_class=LoraConfig,
    model_class=None,
    defaults={"r": 16, "lora_alpha": 16, "init_lora_weights": "pissa"},
    aliases=LORA.aliases,
    bases=("none",),
    family=LORA.family,
    merge=LORA.merge,
    identity_at_init=lambda config: True,
    trainable_parameters=LORA.trainable_parameters,
    cost="as LoRA, one full SVD a layer at the start",
    caveats=(
        "The base is changed in memory, so the saved adapter is wrong on the original base: loading it needs the same "
        "rewriting again, or PEFT's conversion to a LoRA of twice the rank. Method pissa has neither problem.",
        "A bf16 base rounds W0 - C. PEFT refuses a quantised base: quantise the rewritten one yourself (QPiSSA).",
    ),
    check=LORA.check,
)
