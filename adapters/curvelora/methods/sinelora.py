"""SineLoRA: dW = sin(w BA) / g, the sine of the low-rank product, entry by entry.

    h = W0 x + (s / g) sin(w BA) drop(x)        A: (r, d_in)   B: (d_out, r)   s = 1

Paper: arXiv 2403.19243. Unlike Sinter's, this nonlinearity does not vanish: at small BA it is LoRA with the factor w / g, and it
raises the rank as soon as w |BA| is not small.

Choices that are not checked against the paper: g = sqrt(d_out), the reading of the paper's n in a public port, so the gain
follows each layer's shape; w = 200. The definition has no alpha / r, so s is 1 here unless `alpha` is given as a number.

Init: A Kaiming-uniform, B = 0, so the model starts as the base. Trains A and B, as many as LoRA. Merges exactly. Cost as LoRAN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from curvelora.activations import Activation
from curvelora.errors import UserError
from curvelora.layers.dense_delta import DeltaMap, DenseDeltaLayer
from curvelora.method import Method
from curvelora.peft_registration import extend_peft_type
from curvelora.tuner import AdapterModel, LowRankConfig, is_number


@dataclass
class SineloraConfig(LowRankConfig):
    """Config of SineLoRA.

    Args:
        alpha: "r", the definition's, for s = 1 at every rank; a number multiplies the update by s = alpha / r.
        frequency: w, in radians per unit of BA, positive.
        gain: g, a positive number, or "sqrt" for sqrt(d_out) of each layer.
        init_B_std: standard deviation of B at the start; 0 starts as the base model.

    Raises:
        UserError: a value out of its range.
    """

    alpha: float | str = field(default="r", metadata={"help": "scale s = alpha / r; r, for s = 1, or a number"})
    frequency: float = field(default=200.0, metadata={"help": "frequency w of the sine"})
    gain: float | str = field(default="sqrt", metadata={"help": "g: a number, or sqrt for sqrt(d_out)"})
    init_B_std: float = field(default=0.0, metadata={"help": "standard deviation of B at the start"})

    alpha_rule: ClassVar[str] = "r"
    dropout_form: ClassVar[str] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("sinelora")
        if not is_number(self.frequency) or self.frequency <= 0:
            raise UserError(f"frequency must be a positive number, not {self.frequency!r}")
        if self.gain != "sqrt" and (not is_number(self.gain) or self.gain <= 0):
            raise UserError(f"gain must be a positive number or sqrt, for sqrt(d_out), not {self.gain!r}")
        if not is_number(self.init_B_std) or self.init_B_std < 0:
            raise UserError(f"init_B_std must be a non-negative number, not {self.init_B_std!r}")

    @property
    def scale(self) -> float:
        """s = 1, or alpha / r where alpha is a number."""
        return 1.0 if self.alpha == "r" else self.alpha / self.r

    def delta_map(self, d_out: int) -> DeltaMap:
        """The entrywise map u -> dW of a layer with d_out outputs."""
        gain = math.sqrt(d_out) if self.gain == "sqrt" else float(self.gain)
        return DeltaMap(Activation("sine", 1.0, float(self.frequency)), self.scale / gain)


class SineloraLayer(DenseDeltaLayer):
    """A linear layer with SineLoRA adapters."""

    adapter_layer_names = ("sinelora_A", "sinelora_B")

    def delta_map(self, adapter: str) -> DeltaMap:
        """The map of this layer, whose gain depends on d_out."""
        return self.configs[adapter].delta_map(self.out_features)


class SineloraModel(AdapterModel):
    """SineLoRA as a PEFT tuner."""

    prefix = "sinelora_"
    tuner_layer_cls = SineloraLayer


METHOD = Method(
    name="sinelora",
    title="SineLoRA: the sine of the low-rank product as weight update",
    formula="h = W0 x + (s / g) sin(w BA) x,  s = 1,  g = sqrt(d_out)",
    paper="SineLoRA (arXiv 2403.19243)",
    provided_by="curvelora",
    config_class=SineloraConfig,
    model_class=SineloraModel,
    defaults={},
    family=lambda config: "weight space",
    merge=lambda config: config.merge,
    identity_at_init=lambda config: config.init_B_std == 0,
    trainable_parameters=lambda config, d_out, d_in: config.r * (d_in + d_out),
    cost="forms d_out x d_in in every pass; backward has one more product of that size than LoRA",
    caveats=(
        "Gain sqrt(d_out) and frequency 200 are choices, not checked against the paper: near zero the update is LoRA's with "
        "s = w / g, 3.1 at d_out = 4096.",
        "No entry of the update exceeds s / g in size, and its gradient changes sign where w |BA| passes pi / 2.",
    ),
)
