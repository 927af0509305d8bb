"""MoSLoRA: a trained r x r mixer between the two factors.

    h = W0 x + s B M A drop(x)        A: (r, d_in)   M: (r, r)   B: (d_out, r)   s = alpha / r

Paper: arXiv 2406.11909, with the authors' code for the init: A and M Kaiming-uniform, B = 0, so the model starts as the base
(M = 0 beside B = 0 would never train). Trains A, M and B. Merges exactly; after training M can be folded into B. Cost: LoRA and
an r x r product a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from curvelora.layers.bottleneck import BottleneckLayer
from curvelora.layers.initial import kaiming_A, zero_B
from curvelora.method import Method
from curvelora.peft_registration import extend_peft_type
from curvelora.tuner import AdapterModel, LowRankConfig, check_choice

MIXER_INITS = ("kaiming", "orthogonal")


@dataclass
class MosloraConfig(LowRankConfig):
    """Config of MoSLoRA; the defaults are those of the authors' commonsense script (r 16, alpha 32, dropout 0.05).

    Args:
        mixer_init: of M: "kaiming", U(-1/sqrt(r), 1/sqrt(r)), the authors' code; "orthogonal", the paper's other good one.

    Raises:
        UserError: an unknown choice or a value out of its range.
    """

    r: int = field(default=16, metadata={"help": "rank"})
    alpha: float = field(default=32, metadata={"help": "scale s = alpha / r"})
    dropout: float = field(default=0.05, metadata={"help": "dropout on the adapter's input"})
    mixer_init: str = field(default="kaiming", metadata={"help": "of M: kaiming or orthogonal"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("moslora")
        check_choice("mixer_init", self.mixer_init, MIXER_INITS)


class MosloraLayer(BottleneckLayer):
    """A linear layer with MoSLoRA adapters."""

    adapter_layer_names = ("moslora_A", "moslora_B", "moslora_M")

    def create_parameters(self, adapter: str, config: MosloraConfig, model: nn.Module | None) -> None:
        """A (r, d_in), M (r, r), B (d_out, r)."""
        M = kaiming_A(config.r, config.r)
        if config.mixer_init == "orthogonal":
            nn.init.orthogonal_(M)
        A, B = kaiming_A(config.r, self.in_features), zero_B(self.out_features, config.r)
        self.set_tensors(adapter, {"moslora_A": A, "moslora_B": B, "moslora_M": M})

    def bottleneck(self, adapter: str, z: Tensor) -> Tensor:
        """s M z."""
        return self.configs[adapter].scale * F.linear(z, self.moslora_M[adapter].to(z.dtype))


class MosloraModel(AdapterModel):
    """MoSLoRA as a PEFT tuner."""

    prefix = "moslora_"
    tuner_layer_cls = MosloraLayer


METHOD = Method(
    name="moslora",
    title="MoSLoRA: a trained mixer between the factors",
    formula="h = W0 x + s B M A x,  s = alpha / r,  M r x r",
    paper="MoSLoRA (arXiv 2406.11909)",
    provided_by="curvelora",
    config_class=MosloraConfig,
    model_class=MosloraModel,
    defaults={},
    family=lambda config: "activation space, linear",
    merge=lambda config: config.merge,
    identity_at_init=lambda config: True,
    trainable_parameters=lambda config, d_out, d_in: config.r * (d_in + d_out) + config.r**2,
    cost="LoRA and an r x r product a token",
    caveats=(
        "B M A has rank r, as LoRA's B A: M changes how it is trained and not what it can be.",
        "With B = 0 the first step moves only B.",
    ),
)
