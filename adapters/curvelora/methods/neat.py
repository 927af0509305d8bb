"""NEAT, also called PEANuT: the update is a small network of the frozen weight itself.

    dW^T = s f(W0^T T1) T2        T1: (d_out, r)   T2: (r, d_out)        h = W0 x + dW drop(x)

Paper: arXiv 2410.01870; PEFT has it as PEANuT. With `depth` D, between the two stand D encoders and D decoders, r x r each with
f after it; the input of encoder D + 1 - i, counted from 1, is added to the output of decoder i. Init: all Kaiming-uniform but
T2 = 0, so the model starts as the base. Trains 2 r d_out + 2 D r^2 entries. Merges exactly, from the weight as it was before any
merge.

dW has at most rank r: dW = s B A with B = T2^T and A = f(T1^T W0), (r, d_in). So dW is never formed here: the skinny product
T1^T W0 (`layers.weight_product`), by blocks, then two thin products a token as LoRA has them. Cost: LoRA, and two skinny products
with W0 a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvelora.activations import Activation, canonical_name
from curvelora.errors import UserError
from curvelora.layers.base_weight import refuse_reordered_4bit, snapshot
from curvelora.layers.bottleneck import BottleneckLayer
from curvelora.layers.initial import kaiming_A, zero_B
from curvelora.layers.weight_product import number_of, weight_product
from curvelora.method import Method
from curvelora.peft_registration import extend_peft_type
from curvelora.precision import at_least_fp32
from curvelora.tuner import AdapterModel, LowRankConfig

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "leaky_relu", "identity")


@dataclass
class NeatConfig(LowRankConfig):
    """Config of NEAT; r and depth are PEFT's defaults, alpha "r" is the scale of 1 that the authors' vision code has.

    Args:
        alpha: a number, s = alpha / r, or "r" for s = 1. The authors take s of 0.01 to 0.1 for GLUE.
        activation: f, one of relu (the paper's), gelu, silu, tanh, leaky_relu, identity.
        depth: pairs of r x r layers between the two factors, at least 0.

    Raises:
        UserError: an unknown activation or a value out of its range.
    """

    r: int = field(default=32, metadata={"help": "rank"})
    alpha: float | str = field(default="r", metadata={"help": "scale s = alpha / r; a number, or r for s = 1"})
    activation: str = field(default="relu", metadata={"help": "f: " + ", ".join(ACTIVATIONS)})
    depth: int = field(default=0, metadata={"help": "pairs of r x r layers between the factors"})

    alpha_rule: ClassVar[str] = "r"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("neat")
        self.activation = canonical_name(self.activation, ACTIVATIONS)
        if not isinstance(self.depth, int) or isinstance(self.depth, bool) or self.depth < 0:
            raise UserError(f"depth must be a whole number of at least 0, not {self.depth!r}")

    @property
    def scale(self) -> float:
        """s = alpha / r, or 1."""
        return 1.0 if self.alpha == self.alpha_rule else self.alpha / self.r  # no super(): torch.compile stops there


class NeatLayer(BottleneckLayer):
    """A linear layer with NEAT adapters: neat_A is T1^T (r, d_out), neat_B is T2^T (d_out, r)."""

    adapter_layer_names = ("neat_A", "neat_B", "neat_E", "neat_D")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.number = number_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = number_of(self)  # a copy has a weight of its own

    def create_parameters(self, adapter: str, config: NeatConfig, model: nn.Module | None) -> None:
        """neat_A (r, d_out), neat_B (d_out, r), and with a depth the encoders neat_E and decoders neat_D (depth, r, r).

        Raises:
            UserError: the weight cannot be read back.
        """
        backend, base_layer = self.quantization_backend, self.get_base_layer()
        if backend is not None and not backend.supports_merge:
            raise UserError(
                f"module {self.name!r} is quantised with {backend.backend_name}, whose weight cannot be read back, and this "
                "method computes its update from the weight: take an unquantised, NF4 or int8 base, or another method"
            )
        refuse_reordered_4bit(base_layer, self.name)
        tensors = {"neat_A": kaiming_A(config.r, self.out_features), "neat_B": zero_B(self.out_features, config.r)}
        if config.depth:
            for name in ("neat_E", "neat_D"):
                tensors[name] = torch.stack([kaiming_A(config.r, config.r) for _ in range(config.depth)])
        self.set_tensors(adapter, tensors)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(A, B) with dW = s B A, shapes (r, d_in) and (d_out, r); A = f(T1^T W0) is computed, in fp32 or wider."""
        T = self.neat_A[adapter]
        with torch.autocast(T.device.type, enabled=False):
            product = weight_product(T.to(at_least_fp32(T.dtype)), self.number, self.in_features)
            return self.network(adapter, product), self.neat_B[adapter]

    def network(self, adapter: str, z: Tensor) -> Tensor:
        """f, then encoders and decoders with their skips, on the columns of z: (r, d_in) -> (r, d_in)."""
        config = self.configs[adapter]
        f = Activation(config.activation)
        z, skipped = f.value(z), []
        for i in range(config.depth):
            skipped.append(z)
            z = f.value(self.neat_E[adapter][i].to(z.dtype) @ z)
        for i in range(config.depth):
            z = f.value(self.neat_D[adapter][i].to(z.dtype) @ z) + skipped[-1 - i]
        return z

    def bottleneck(self, adapter: str, z: Tensor) -> Tensor:
        """s z: the nonlinearity is in A."""
        return self.configs[adapter].scale * z

    def delta_weight(self, adapter: str) -> Tensor:
        """dW: (d_out, d_in), fp32 or wider, of the weight as it was before any merge."""
        with self.pristine_weight():
            return super().delta_weight(adapter)

    @contextlib.contextmanager
    def pristine_weight(self) -> Iterator[None]:
        """Inside, the base has the weight that it had before adapters were merged into it."""
        if not self.merged:
            yield
            return
        merged = snapshot(self.get_base_layer())
        self._restore_base()
        try:
            yield
        finally:
            merged()


class NeatModel(AdapterModel):
    """NEAT as a PEFT tuner."""

    prefix = "neat_"
    tuner_layer_cls = NeatLayer


METHOD = Method(
    name="neat",
    title="NEAT (PEANuT): the update is a small network of the weight itself",
    formula="h = W0 x + s B A x,  A = f(T1^T W0),  B = T2^T,  f ReLU",
    paper="NEAT / PEANuT (arXiv 2410.01870)",
    provided_by="curvelora",
    config_class=NeatConfig,
    model_class=NeatModel,
    defaults={},
    family=lambda config: "weight space, low rank",
    merge=lambda config: config.merge,
    identity_at_init=lambda config: True,
    trainable_parameters=lambda config, d_out, d_in: 2 * config.r * (d_out + config.depth * config.r),
    cost="as LoRA, and two skinny products with the weight a step (dequantised by blocks where it is quantised)",
    caveats=(
        "The update has at most rank r, whatever f is: the nonlinearity is in how A depends on the weight.",
        "A unit of ReLU that is negative for every input feature is dead, and its column of T2 with it.",
        "For narrow outputs (grouped k, v) it trains fewer entries than LoRA of the same rank, for wide ones more: 2 r d_out.",
        "The adapter belongs to the exact base weight: on a quantised base the update is another one than on its original.",
    ),
)
