"""RanLoRA: an activation between the two factors, which start from the weight's own singular vectors.

    h = W0 x - C x + s B (v * phi(A drop(x)))        A: (r, d_in)   B: (d_out, r)   v: (r,)   C = B0 A0

Paper: Findings of ACL 2026 no. 852; no code was published. Init codes as there: `R` takes the last r singular triplets of W0
(A0 = S^1/2 V^T, B0 = U S^1/2, which are taken out of the weight as C), `P` the first r, `K` is LoRA's (A Kaiming-uniform,
B = 0, nothing removed). Trains A, B, v. What the paper leaves open is an option here; docs/decisions.md has the reasons.

Not the base model at the start (except with K): phi bends what the factors carry. Does not merge, except with phi = identity.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvelora.activations import Activation, canonical_name
from curvelora.errors import UserError
from curvelora.factor_cache import cached_triplets
from curvelora.layers.base_weight import device_of_weight
from curvelora.layers.bottleneck import BottleneckLayer
from curvelora.layers.initial import SOURCES, initial_weight, kaiming_A, zero_B
from curvelora.merging import Merge
from curvelora.method import Method
from curvelora.peft_registration import extend_peft_type
from curvelora.tuner import AdapterModel, LowRankConfig, check_choice, check_switch

ACTIVATIONS = ("gelu", "relu", "tanh", "identity")
ENDS = {"R": "last", "P": "first"}
SCALE_POSITIONS = ("outside", "inside", "none")
FACTOR_SCALINGS = ("sqrt", "divided")
V_INITS = ("ones", "zeros")


@dataclass
class RanloraConfig(LowRankConfig):
    """Config of RanLoRA; the defaults are the published ones where the paper has them (r 2, alpha 2 r, dropout 0.05, GELU, R).

    Args:
        alpha: a number, or "2r", the paper's, which follows each module's own r.
        activation: phi, one of gelu (exact, with erf), relu, tanh, identity (the paper's "w/o act").
        init: "R", "P" or "K" (the paper's "w/o rai").
        use_v: whether v exists (False is the paper's "w/o v").
        v_init: "ones" (the same start as without v) or "zeros" (the adapter starts as -C x, and A and B wait for v).
        scale_position: where s = alpha / r enters: "outside" s B(v * phi(A x)); "inside" B(v * phi(s A x)); "none" as the
            paper's equation is printed.
        factor_scaling: "sqrt" for factors whose product is the removed part, the paper's; "divided" for that divided by s, so
            that the linear part of the adapter is the removed part (as PiSSA does).
        svd_source: "unquantised" takes the singular vectors from the layer's own weight or, on a quantised base, from the
            checkpoint that it was loaded from; "dequantised" allows those of the dequantised weight, whose last ones have little
            to do with the weight's own (docs/methods.md has a figure).
        factors_stored: written by saving: the tensors come from the file beside the config, and nothing is computed.

    Raises:
        UserError: an unknown choice or a value out of its range.
    """

    r: int = field(default=2, metadata={"help": "rank"})
    alpha: float | str = field(default="2r", metadata={"help": "scale s = alpha / r; a number, or 2r"})
    dropout: float = field(default=0.05, metadata={"help": "dropout on the adapter's input"})
    activation: str = field(default="gelu", metadata={"help": "phi: gelu, relu, tanh or identity"})
    init: str = field(default="R", metadata={"help": "R: last r singular triplets; P: first r; K: Kaiming, B = 0"})
    use_v: bool = field(default=True, metadata={"help": "train the vector v"})
    v_init: str = field(default="ones", metadata={"help": "ones or zeros"})
    scale_position: str = field(
        default="outside", metadata={"help": "outside: s B phi(A x); inside: B phi(s A x); none"}
    )
    factor_scaling: str = field(default="sqrt", metadata={"help": "sqrt: B A is the removed part; divided: s B A is"})
    svd_source: str = field(default="unquantised", metadata={"help": "unquantised, or dequantised to allow that"})
    factors_stored: bool = field(default=False, metadata={"help": "set by saving: the factors are in the file"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("ranlora")
        self.activation = canonical_name(self.activation, ACTIVATIONS)
        self.init = str(self.init).upper()
        check_choice("init", self.init, ("R", "P", "K"))
        check_switch("use_v", self.use_v)
        check_switch("factors_stored", self.factors_stored)
        check_choice("v_init", self.v_init, V_INITS)
        check_choice("scale_position", self.scale_position, SCALE_POSITIONS)
        check_choice("factor_scaling", self.factor_scaling, FACTOR_SCALINGS)
        check_choice("svd_source", self.svd_source, SOURCES)
        if self.init == "K" and self.use_v and self.v_init == "zeros":
            raise UserError("init K has B = 0, and with v_init zeros nothing would ever train: write v_init: ones")

    @property
    def scale(self) -> float:
        """s = alpha / r, or 1 where the equation is taken as printed."""
        if self.scale_position == "none":
            return 1.0
        return 2.0 if self.alpha == self.alpha_rule else self.alpha / self.r  # no super(): torch.compile stops there

    @property
    def merge(self) -> Merge:
        return Merge.EXACT if self.activation == "identity" else Merge.IMPOSSIBLE

    alpha_rule: ClassVar[str] = "2r"
    why_not_exact: ClassVar[str] = "phi acts on A x, which makes the update nonlinear in the input"

    @property
    def needs_unquantised_weight(self) -> bool:
        return self.init != "K" and self.svd_source == "unquantised" and not self.factors_stored

    @property
    def is_base_at_start(self) -> bool:
        """Whether the untrained adapter adds what was removed: B = 0, or a linear adapter whose factors carry it exactly."""
        linear = self.activation == "identity" and not (self.use_v and self.v_init == "zeros")
        one = self.scale == 1 and (self.scale_position == "none" or not (self.rank_pattern or self.alpha_pattern))
        return self.init == "K" or (linear and (self.factor_scaling == "divided" or one))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does it; the file says that the factors lie beside it, so loading computes no singular vectors."""
        stored = copy.copy(self)
        stored.factors_stored = True
        super(RanloraConfig, stored).save_pretrained(save_directory, **kwargs)


class RanloraLayer(BottleneckLayer):
    """A linear layer with RanLoRA adapters."""

    adapter_layer_names = ("ranlora_A", "ranlora_B", "ranlora_v")
    removed_names = ("ranlora_A0", "ranlora_B0")

    def create_parameters(self, adapter: str, config: RanloraConfig, model: nn.Module | None) -> None:
        """A (r, d_in), B (d_out, r), v (r,), and frozen A0, B0 of the same shapes where the init removes something."""
        v = torch.ones(config.r) if config.v_init == "ones" else torch.zeros(config.r)
        vector = {"ranlora_v": v} if config.use_v else {}
        if config.init == "K":
            A, B = kaiming_A(config.r, self.in_features), zero_B(self.out_features, config.r)
            self.set_tensors(adapter, {"ranlora_A": A, "ranlora_B": B, **vector})
            return
        A0, B0 = self.removed_factors(config, model)
        divisor = math.sqrt(config.scale) if config.factor_scaling == "divided" else 1.0
        self.set_tensors(
            adapter,
            {"ranlora_A": A0 / divisor, "ranlora_B": B0 / divisor, **vector},
            {"ranlora_A0": A0, "ranlora_B0": B0},
        )

    def removed_factors(self, config: RanloraConfig, model: nn.Module | None) -> tuple[Tensor, Tensor]:
        """(A0, B0) = (S^1/2 V^T, U S^1/2) of the first or last r singular triplets; fp32, rounded once from fp64."""
        shapes = (config.r, self.in_features), (self.out_features, config.r)
        device = device_of_weight(self.get_base_layer())
        if device.type == "meta":
            return tuple(torch.empty(shape, device=device) for shape in shapes)
        if config.factors_stored:  # NaN, so that a tensor that no file fills cannot go unseen
            return tuple(torch.full(shape, math.nan, device=device) for shape in shapes)
        weight = initial_weight(self, config.svd_source, model, config.revision)
        try:
            found = cached_triplets(weight, config.r, ENDS[config.init])
        except ValueError as error:
            raise UserError(f"module {self.name!r} has no singular triplets to start from: {error}") from error
        root = found.S.sqrt()
        return (root[:, None] * found.V.T).float(), (found.U * root).float()

    def bottleneck(self, adapter: str, z: Tensor) -> Tensor:
        """s v * phi(z), or v * phi(s z)."""
        config = self.configs[adapter]
        phi = Activation(config.activation)
        inside = config.scale_position == "inside"
        z = phi.value(config.scale * z) if inside else config.scale * phi.value(z)
        return z * self.ranlora_v[adapter] if adapter in self.ranlora_v else z


class RanloraModel(AdapterModel):
    """RanLoRA as a PEFT tuner."""

    prefix = "ranlora_"
    tuner_layer_cls = RanloraLayer


METHOD = Method(
    name="ranlora",
    title="RanLoRA: an activation between factors that start from the weight's singular vectors",
    formula="h = W0 x - C x + s B (v * phi(A x)),  s = alpha / r,  C = B0 A0 what the init took from W0 (nothing for init K)",
    paper="RanLoRA (Findings of ACL 2026 no. 852)",
    provided_by="curvelora",
    config_class=RanloraConfig,
    model_class=RanloraModel,
    defaults={},
    internal_options=("factors_stored",),
    family=lambda config: "activation space, linear" if config.merge is Merge.EXACT else "activation space, nonlinear",
    merge=lambda config: config.merge,
    identity_at_init=lambda config: config.is_base_at_start,
    trainable_parameters=lambda config, d_out, d_in: config.r * (d_in + d_out) + config.r * config.use_v,
    cost="four thin products per layer (two with init K), an activation on r numbers a token, one SVD a layer at the start",
    caveats=(
        "With init R or P the untrained adapter is not the base model: phi bends what the factors carry. R moves little; P "
        "takes the leading part of the weight out and changes a layer's output by a third to a half. Runs log the change.",
        "Does not merge unless activation is identity: serve it as an adapter.",
        "The adapter file holds the removed factors too, so it is twice as large as its trainable part (init R and P).",
        "alpha 2r, the paper's, follows each module's own rank; tanh with s = 2 and unscaled factors starts at twice the "
        "removed part.",
        "On a quantised base the factors come from the unquantised checkpoint; a base that exists only quantised needs "
        "svd_source: dequantised, whose last singular vectors are other ones.",
    ),
)
