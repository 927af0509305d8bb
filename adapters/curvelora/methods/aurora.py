"""AuroRA: an adaptive nonlinear layer (ANL) between the two factors.

    h = W0 x + s B sigma(A drop(x))          A: (r, d_in)   B: (d_out, r)   s = alpha / r
    sigma(z) = tanh(H tanh(z)) + w b(z)      H: (r, r)      w: (r, G + k)   b(z) = sum_i (B-spline basis at z_i), (G + k,)

Paper: arXiv 2505.18738, sections 4.1-4.2; its code could not be had. What the paper leaves open (A's init, the scale, the shape
of w) is chosen as docs/decisions.md says. Trains A, B, H, w. B = 0, so the model starts as the base.

Three things that are easily mixed up, kept apart here: `mode: dynamic` applies sigma to A x, for every token; `mode: static`
applies sigma to the columns of A, in training too, which makes the adapter linear and its merge exact; and merging a dynamic
adapter puts the static form in the place of what was trained, which is an approximation, and often a bad one: measure it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvelora.activations import Activation, canonical_name
from curvelora.errors import UserError
from curvelora.layers.bottleneck import BottleneckLayer
from curvelora.layers.initial import kaiming_A, zero_B
from curvelora.merging import Merge
from curvelora.method import Method
from curvelora.peft_registration import extend_peft_type
from curvelora.spline import Grid, basis_sum
from curvelora.tuner import AdapterModel, LowRankConfig, check_choice, check_switch, is_number

MODES = ("dynamic", "static")
ACTIVATIONS = ("tanh", "leaky_relu", "sigmoid")
A_INITS = ("kaiming", "xavier")
MOST_INTERVALS, MOST_ORDERS = 1000, 10
SPLINE_NOISE = 0.1  # w starts as U(-0.1, 0.1)


@dataclass
class AuroraConfig(LowRankConfig):
    """Config of AuroRA; the defaults are the published ones (r 2, alpha 4, dropout 0.05; grid 5, order 3 on [-1, 1]).

    Args:
        mode: "dynamic" h = W0 x + s B sigma(A x), the paper's training form; "static" h = W0 x + s B sigma(A) x, in training too.
        fixed: whether the fixed nonlinearity F, tanh(H tanh(z)), is there (False is the paper's "w/o F"; H goes with it).
        learnable: whether the learnable nonlinearity L, the spline, is there (False is the paper's "w/o L").
        activation: both functions of F: tanh, or leaky_relu (AuroRA-lr) or sigmoid (AuroRA-sm).
        init_A: "kaiming", as LoRA, keeps A x inside the grid; "xavier" (normal) spreads it 2.4 times wider.
        grid_size: G, number of intervals.
        spline_order: k, 3 for cubic.
        grid_limit: the grid covers [-grid_limit, grid_limit].

    Raises:
        UserError: an unknown choice, a value out of its range, or neither F nor L.
    """

    r: int = field(default=2, metadata={"help": "rank"})
    alpha: float = field(default=4, metadata={"help": "scale s = alpha / r"})
    dropout: float = field(default=0.05, metadata={"help": "dropout on the adapter's input"})
    mode: str = field(default="dynamic", metadata={"help": "dynamic: B sigma(A x); static: B sigma(A) x"})
    fixed: bool = field(default=True, metadata={"help": "the fixed nonlinearity tanh(H tanh(z))"})
    learnable: bool = field(default=True, metadata={"help": "the learnable spline"})
    activation: str = field(default="tanh", metadata={"help": "tanh, leaky_relu or sigmoid in the fixed part"})
    init_A: str = field(default="kaiming", metadata={"help": "kaiming or xavier"})
    grid_size: int = field(default=5, metadata={"help": "intervals of the spline grid"})
    spline_order: int = field(default=3, metadata={"help": "order of the splines"})
    grid_limit: float = field(default=1.0, metadata={"help": "the grid covers [-limit, limit]"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("aurora")
        self.activation = canonical_name(self.activation, ACTIVATIONS)
        check_choice("mode", self.mode, MODES)
        check_choice("init_A", self.init_A, A_INITS)
        check_switch("fixed", self.fixed)
        check_switch("learnable", self.learnable)
        for name, limit in (("grid_size", MOST_INTERVALS), ("spline_order", MOST_ORDERS)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise UserError(
                    f"{name} must be a whole number from 1 to {limit}, not {value!r}: grid_size + spline_order functions are "
                    "evaluated for every token"
                )
        if not is_number(self.grid_limit) or self.grid_limit <= 0:
            raise UserError(
                f"grid_limit must be a positive number, not {self.grid_limit!r}: the grid covers +-grid_limit"
            )
        if not self.fixed and not self.learnable:
            raise UserError(
                "fixed: false and learnable: false leave no nonlinearity: take method lora, or keep one of them"
            )

    def grid(self) -> Grid:
        """The spline's grid."""
        return Grid(self.grid_size, self.spline_order, -float(self.grid_limit), float(self.grid_limit))

    @property
    def merge(self) -> Merge:
        return Merge.EXACT if self.mode == "static" else Merge.APPROXIMATE

    why_not_exact: ClassVar[str] = "it acts as B sigma(A x), and merging puts B sigma(A) x in its place"


class AuroraLayer(BottleneckLayer):
    """A linear layer with AuroRA adapters."""

    adapter_layer_names = ("aurora_A", "aurora_B", "aurora_H", "aurora_spline")
    grid_monitor: Any = None  # a `curvelora.grid_monitor.GridMonitor`

    def create_parameters(self, adapter: str, config: AuroraConfig, model: nn.Module | None) -> None:
        """A (r, d_in) Kaiming-uniform or Xavier-normal, B (d_out, r) zero, H (r, r) Xavier-normal, w (r, G + k) U(-0.1, 0.1)."""
        A = kaiming_A(config.r, self.in_features)
        tensors = {"aurora_A": A, "aurora_B": zero_B(self.out_features, config.r)}
        if config.init_A == "xavier":
            nn.init.xavier_normal_(A)
        if config.fixed:
            tensors["aurora_H"] = nn.init.xavier_normal_(torch.empty(config.r, config.r))
        if config.learnable:
            tensors["aurora_spline"] = torch.empty(config.r, config.grid().size).uniform_(-SPLINE_NOISE, SPLINE_NOISE)
        self.set_tensors(adapter, tensors)

    def acts_on_weights(self, adapter: str) -> bool:
        return self.configs[adapter].mode == "static" or self.in_merged_form

    def bottleneck(self, adapter: str, z: Tensor) -> Tensor:
        """s sigma(z)."""
        config, total = self.configs[adapter], 0.0
        if config.fixed:
            activation = Activation(config.activation)
            total = total + activation.value(F.linear(activation.value(z), self.aurora_H[adapter].to(z.dtype)))
        if config.learnable:
            if self.grid_monitor is not None and self.training:
                self.grid_monitor.see(adapter, z, config.grid())
            total = total + F.linear(basis_sum(z, config.grid()), self.aurora_spline[adapter].to(z.dtype))
        return config.scale * total


class AuroraModel(AdapterModel):
    """AuroRA as a PEFT tuner."""

    prefix = "aurora_"
    tuner_layer_cls = AuroraLayer


def _trainable_parameters(config: AuroraConfig, d_out: int, d_in: int) -> int:
    r = config.r
    return r * (d_in + d_out) + (r * r if config.fixed else 0) + (r * config.grid().size if config.learnable else 0)


METHOD = Method(
    name="aurora",
    title="AuroRA: an adaptive nonlinear layer between the factors",
    formula="h = W0 x + s B sigma(A x),  sigma(z) = tanh(H tanh(z)) + w sum_i basis(z_i),  s = alpha / r",
    paper="AuroRA (arXiv 2505.18738)",
    provided_by="curvelora",
    config_class=AuroraConfig,
    model_class=AuroraModel,
    defaults={},
    family=lambda config: "activation space, linear" if config.merge is Merge.EXACT else "activation space, nonlinear",
    merge=lambda config: config.merge,
    identity_at_init=lambda config: True,
    trainable_parameters=_trainable_parameters,
    cost="two thin products per layer as LoRA, and on r numbers a token two tanh, one r x r product and a spline",
    caveats=(
        "Merging a dynamic adapter, as the paper does for inference, replaces sigma(A x) by sigma(A) x, another function: "
        "untrained, with random B, the two differ by several times their own size. Runs log the gap; judge it before merging.",
        "mode static trains what is merged, so its merge is exact.",
        "Inputs z = A x beyond the grid lose part of the spline, beyond its support (2.2 by default) all of it and its "
        "gradient. Runs log both shares.",
        "sigma(0) is not 0, so a trained adapter adds a constant s B sigma(0) to every token.",
    ),
)
