"""LoRAN: dW = s f(BA), f elementwise, by default Sinter f(x) = a x sin(w x) + x.

    h = W0 x + (alpha / r) f(BA) drop(x)        A: (r, d_in)   B: (d_out, r)

Paper: arXiv 2509.21870, with the authors' code of the predecessor (Findings of EMNLP 2024 no. 177) where the two differ.
Init: A Kaiming-uniform, B = 0, so the model starts as the base wherever f(0) = 0. Trains A and B, as many as LoRA. Merges
exactly. Generalised from the authors' square layers to any d_out x d_in. Cost: forms a d_out x d_in matrix in each pass and
one product of that size more than LoRA in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from curvelora.activations import NAMES, Activation, canonical_name
from curvelora.errors import UserError
from curvelora.layers.dense_delta import DeltaMap, DenseDeltaLayer
from curvelora.method import Method
from curvelora.peft_registration import extend_peft_type
from curvelora.tuner import AdapterModel, LowRankConfig, check_choice, is_number

SCALE_POSITIONS = ("outside", "inside")


@dataclass
class LoranConfig(LowRankConfig):
    """Config of LoRAN; the defaults are the published ones (r 64, alpha 16, dropout 0.2, Sinter at 5e-5 and 1e4).

    Args:
        activation: f, one of `curvelora.activations.NAMES` or an alias ("sin", "swish-25").
        amplitude: a of Sinter, dimensionless and at least 0.
        frequency: w of Sinter and of cos, in radians per unit of BA, positive.
        scale_position: "outside" for s f(BA), the authors' code; "inside" for f(s BA), the paper's text. At s = 0.25 the
            effective frequencies differ four-fold.
        init_B_std: standard deviation of B at the start; 0 is the published zero. ReLU needs a positive one: its gradient
            at BA = 0 is zero for ever.

    Raises:
        UserError: unknown activation or scale position, or a value out of its range.
    """

    r: int = field(default=64, metadata={"help": "rank"})
    alpha: float = field(default=16, metadata={"help": "scale s = alpha / r"})
    dropout: float = field(default=0.2, metadata={"help": "dropout on the adapter's input"})
    activation: str = field(default="sinter", metadata={"help": "elementwise function f"})
    amplitude: float = field(default=5e-5, metadata={"help": "amplitude a of Sinter"})
    frequency: float = field(default=1e4, metadata={"help": "frequency w of Sinter and cos"})
    scale_position: str = field(default="outside", metadata={"help": "outside: s f(BA); inside: f(s BA)"})
    init_B_std: float = field(default=0.0, metadata={"help": "standard deviation of B at the start"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("loran")
        self.activation = canonical_name(self.activation, NAMES)
        for name, positive in (("amplitude", False), ("frequency", True), ("init_B_std", False)):
            value = getattr(self, name)
            if not is_number(value) or value < 0 or (positive and value == 0):
                raise UserError(f"{name} must be a {'positive' if positive else 'non-negative'} number, not {value!r}")
        check_choice("scale_position", self.scale_position, SCALE_POSITIONS)

    def delta_map(self) -> DeltaMap:
        """The entrywise map u -> dW that these settings describe."""
        activation = Activation(self.activation, float(self.amplitude), float(self.frequency))
        return DeltaMap(activation, float(self.scale), self.scale_position == "inside")


class LoranLayer(DenseDeltaLayer):
    """A linear layer with LoRAN adapters."""

    adapter_layer_names = ("loran_A", "loran_B")


class LoranModel(AdapterModel):
    """LoRAN as a PEFT tuner."""

    prefix = "loran_"
    tuner_layer_cls = LoranLayer


METHOD = Method(
    name="loran",
    title="LoRAN: low-rank adaptation with a nonlinearity on the weight update",
    formula="h = W0 x + s f(BA) x,  s = alpha / r,  Sinter f(u) = a u sin(w u) + u",
    paper="LoRAN (arXiv 2509.21870; Findings of EMNLP 2024 no. 177)",
    provided_by="curvelora",
    config_class=LoranConfig,
    model_class=LoranModel,
    defaults={},
    family=lambda config: "weight space",
    merge=lambda config: config.merge,
    identity_at_init=lambda config: config.init_B_std == 0 and config.delta_map().activation.value_at_zero == 0,
    trainable_parameters=lambda config, d_out, d_in: config.r * (d_in + d_out),
    cost="forms d_out x d_in in every pass; backward has one more product of that size than LoRA",
    caveats=(
        "At the published setting (a = 5e-5, w = 1e4) Sinter evaluated in bf16 or fp16 is the identity, bit for bit; here f "
        "is evaluated in fp32, but what enters a bf16 product still changes in well under 1 % of its entries.",
        "relu with B = 0 has zero gradient for ever: set init_B_std.",
        "sigmoid has f(0) = 0.5, so the update is s/2 in every entry before training.",
        "Merging into a bf16 or quantised base loses most of what f added.",
    ),
)
