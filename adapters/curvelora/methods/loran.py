"""LoRAN: dW = s f(BA), f elementwise, by default Sinter f(x) = a x sin(w x) + x.

    h = W0 x + (alpha / r) f(BA) drop(x)        A: (r, d_in)   B: (d_out, r)

Paper: arXiv 2509.21870, with the authors' code of the predecessor (Findings of EMNLP 2024 no. 177) where the two differ.
Init: A Kaiming-uniform, B = 0, so the model starts as the base wherever f(0) = 0. Trains A and B, as many as LoRA. Merges
exactly. Generalised from the authors' square layers to any d_out x d_in. Cost: forms a d_out x d_in matrix in each pass and
one product of that size more than LoRA in the backward pass.

Extensions of this package, off by default (`learn`, `terms`, `amplitude_schedule`, `frequency_schedule`): a and w are learned,
one for a layer or one for each row of dW, by

    a = a0 exp(theta_a)    w = w0 exp(theta_w)    theta = 0 at the start

with a0 and w0 the configured values. A learning rate then means the same for both, where w = 1e4 itself would hardly move under
Adam at 1e-4; both stay positive, and weight decay pulls them to their start. The coefficients of `fourier` and `chebyshev`
(`curvelora.series`) may have either sign: c_k = a0 (theta_k + 1 for k = 1), so that Fourier starts as Sinter.
A schedule (`curvelora.schedules`) multiplies a, or all c_k, or w by a factor that changes over the run; at amplitude 0 the
adapter is LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from curvelora import series
from curvelora.activations import NAMES, Activation, canonical_name
from curvelora.errors import UserError
from curvelora.layers.dense_delta import DeltaMap, DenseDeltaLayer
from curvelora.method import Method
from curvelora.peft_registration import extend_peft_type
from curvelora.precision import at_least_fp32
from curvelora.schedules import Schedule, read_schedule
from curvelora.tuner import AdapterModel, LowRankConfig, check_choice, is_number

SCALE_POSITIONS = ("outside", "inside")
LEARNED = ("none", "amplitude", "frequency", "both")
GRANULARITIES = ("layer", "row")
DROPOUT_FORMS = ("exact", "features")
WITH_TERMS = ("fourier", "chebyshev")


@dataclass
class LoranConfig(LowRankConfig):
    """Config of LoRAN; the defaults are the published ones (r 64, alpha 16, dropout 0.2, Sinter at 5e-5 and 1e4).

    Args:
        activation: f, one of `curvelora.activations.NAMES` or an alias ("sin", "swish-25"), or fourier or chebyshev.
        amplitude: a of Sinter, dimensionless and at least 0; the first coefficient of fourier and chebyshev at the start.
        frequency: w of Sinter, cos and fourier, in radians per unit of BA, positive; of chebyshev 1 / range of BA.
        scale_position: "outside" for s f(BA), the authors' code; "inside" for f(s BA), the paper's text. At s = 0.25 the
            effective frequencies differ four-fold.
        init_B_std: standard deviation of B at the start; 0 is the published zero. ReLU needs a positive one: its gradient
            at BA = 0 is zero for ever.
        learn: what of f trains besides A and B: "none", "amplitude" (the coefficients), "frequency" or "both".
        granularity: one value for a "layer", or one for each "row" of dW, that is for each output.
        terms: K of fourier and chebyshev.
        dropout_form: "exact" for f(BA) drop(x), the definition; "features" for f(BA') x, with the columns of A dropped and so the
            same inputs for all tokens of a pass. The exact form costs a second product with a d_out x d_in matrix.
        amplitude_schedule: a mapping as `curvelora.schedules` has it, for example {"kind": "anneal", "share": 0.8}, or None.
        frequency_schedule: the same for the frequency.

    Raises:
        UserError: an unknown choice, a value out of its range, or options that contradict each other.
    """

    r: int = field(default=64, metadata={"help": "rank"})
    alpha: float = field(default=16, metadata={"help": "scale s = alpha / r"})
    dropout: float = field(default=0.2, metadata={"help": "dropout on the adapter's input"})
    activation: str = field(default="sinter", metadata={"help": "elementwise function f"})
    amplitude: float = field(default=5e-5, metadata={"help": "amplitude a of Sinter"})
    frequency: float = field(default=1e4, metadata={"help": "frequency w of Sinter and cos"})
    scale_position: str = field(default="outside", metadata={"help": "outside: s f(BA); inside: f(s BA)"})
    init_B_std: float = field(default=0.0, metadata={"help": "standard deviation of B at the start"})
    learn: str = field(default="none", metadata={"help": "train none, amplitude, frequency or both"})
    granularity: str = field(default="layer", metadata={"help": "one learned value a layer or a row of dW"})
    dropout_form: str = field(default="exact", metadata={"help": "exact: of x; features: of A's columns, cheaper"})
    terms: int = field(default=1, metadata={"help": "terms of fourier and chebyshev"})
    amplitude_schedule: dict[str, Any] | None = field(default=None, metadata={"help": "factor over the run"})
    frequency_schedule: dict[str, Any] | None = field(default=None, metadata={"help": "factor over the run"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("loran")
        self.activation = canonical_name(self.activation, (*NAMES, *WITH_TERMS))
        for name, positive in (("amplitude", False), ("frequency", True), ("init_B_std", False)):
            value = getattr(self, name)
            if not is_number(value) or value < 0 or (positive and value == 0):
                raise UserError(f"{name} must be a {'positive' if positive else 'non-negative'} number, not {value!r}")
        check_choice("scale_position", self.scale_position, SCALE_POSITIONS)
        check_choice("dropout_form", self.dropout_form, DROPOUT_FORMS)
        check_choice("learn", self.learn, LEARNED)
        check_choice("granularity", self.granularity, GRANULARITIES)
        self._check_learned()
        for name in ("amplitude_schedule", "frequency_schedule"):
            schedule = read_schedule(name, getattr(self, name))
            if schedule is not None and schedule.kind == "constant":
                setattr(self, name, None)  # what has no schedule needs no tensors
            elif schedule is not None and self.activation not in series.NAMES:
                raise UserError(f"{name} needs one of {', '.join(series.NAMES)}, not activation {self.activation}")

    def _check_learned(self) -> None:
        if not isinstance(self.terms, int) or isinstance(self.terms, bool) or self.terms < 1:
            raise UserError(f"terms must be a whole number of at least 1, not {self.terms!r}")
        if self.terms > 1 and self.activation not in WITH_TERMS:
            raise UserError(f"terms {self.terms} needs activation fourier or chebyshev: {self.activation} has no terms")
        if self.learn != "none" and self.activation not in series.NAMES:
            raise UserError(
                f"learn {self.learn} needs one of {', '.join(series.NAMES)}, not activation {self.activation}"
            )
        if self.activation in WITH_TERMS and not self.learns("amplitude"):
            raise UserError(f"activation {self.activation} has coefficients to learn: write learn: amplitude or both")
        if self.learn != "none" and self.amplitude == 0:
            raise UserError(
                "amplitude 0 leaves nothing to learn, because it is what is multiplied: write a positive one"
            )
        if self.granularity == "row" and self.learn == "none":
            raise UserError("granularity row is that of what is learned: write learn: amplitude, frequency or both")

    def learns(self, what: str) -> bool:
        """Whether the "amplitude" (or the coefficients), or the "frequency", trains."""
        return self.learn in (what, "both")

    @property
    def has_tensors(self) -> bool:
        """Whether f has tensors besides A and B."""
        return self.learn != "none" or self.amplitude_schedule is not None or self.frequency_schedule is not None

    @property
    def schedules(self) -> dict[str, Schedule]:
        """What changes over the run, "amplitude" or "frequency" -> how."""
        found = {name: read_schedule(name, getattr(self, f"{name}_schedule")) for name in ("amplitude", "frequency")}
        return {name: schedule for name, schedule in found.items() if schedule is not None}

    def factors_at(self, fraction: float, total_steps: int | None) -> list[float]:
        """The factors of amplitude and frequency when `fraction` of the run is done."""
        own = self.schedules
        return [own[n].factor(fraction, total_steps) if n in own else 1.0 for n in ("amplitude", "frequency")]

    @property
    def curve_parameters(self) -> tuple[int, int]:
        """How many amplitudes and frequencies train in a layer, or in each of its rows."""
        return self.terms * self.learns("amplitude"), int(self.learns("frequency"))

    def delta_map(self) -> DeltaMap:
        """The entrywise map u -> dW that these settings describe; at the start, where f has tensors that train."""
        if self.activation in WITH_TERMS:
            return self.map_of(self.initial_amplitude(), torch.full((1, 1), float(self.frequency)))
        activation = Activation(self.activation, float(self.amplitude), float(self.frequency))
        return DeltaMap(activation, float(self.scale), self.scale_position == "inside")

    def initial_amplitude(self) -> Tensor:
        """(1, K) fp32: a for the first term, 0 for the others."""
        return torch.tensor([[float(self.amplitude)] + [0.0] * (self.terms - 1)])

    def map_of(self, amplitude: Tensor, frequency: Tensor) -> DeltaMap:
        """The map with these amplitudes, (rows, K), and this frequency, (rows, 1)."""
        f = series.Series(self.activation, amplitude, frequency)
        return DeltaMap(f, float(self.scale), self.scale_position == "inside")


class LoranLayer(DenseDeltaLayer):
    """A linear layer with LoRAN adapters."""

    adapter_layer_names = ("loran_A", "loran_B", "loran_amplitude", "loran_frequency")
    other_param_names = ("configs", "loran_schedule")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loran_schedule = BufferDict({}, persistent=True)

    def create_parameters(self, adapter: str, config: LoranConfig, model: nn.Module | None) -> None:
        """A and B as the family does; theta_a (K,) or (d_out, K), without K = 1 of Sinter, and theta_w (1,) or (d_out,), zero.

        With a schedule, a buffer (2,) with the factors of amplitude and frequency.
        """
        super().create_parameters(adapter, config, model)
        lead = (self.out_features,) if config.granularity == "row" else ()
        if config.learns("amplitude"):
            shape = (*lead, config.terms) if config.activation in WITH_TERMS else lead or (1,)
            self.loran_amplitude[adapter] = nn.Parameter(torch.zeros(shape))
        if config.learns("frequency"):
            self.loran_frequency[adapter] = nn.Parameter(torch.zeros(lead or (1,)))
        if config.schedules:
            # at the start no number of steps is needed
            self.loran_schedule[adapter] = torch.tensor(config.factors_at(0.0, 1))

    @torch.no_grad()
    def set_schedule_position(self, fraction: float, total_steps: int | None = None) -> bool:
        """Set the factors of the active adapters in place; whether there is one with a schedule."""
        found = [adapter for adapter in self.active_adapters if adapter in self.loran_schedule]
        for adapter in found:
            for factor, value in zip(
                self.loran_schedule[adapter], self.configs[adapter].factors_at(fraction, total_steps), strict=True
            ):
                factor.fill_(value)
        return bool(found)

    def delta_map(self, adapter: str) -> DeltaMap:
        """The map of `adapter` with what it has learned and where its schedule is; differentiable in the former."""
        config = self.configs[adapter]
        if not config.has_tensors:
            return config.delta_map()
        A, _ = self.factors(adapter)
        work = at_least_fp32(A.dtype)
        if adapter not in self.loran_amplitude:
            amplitude = A.new_full((1, 1), float(config.amplitude), dtype=work)
        else:
            theta = self.loran_amplitude[adapter].to(work).view(-1, config.terms)
            if config.activation in WITH_TERMS:
                first = torch.arange(config.terms, device=A.device) == 0
                amplitude = float(config.amplitude) * (theta + first.to(work))
            else:
                amplitude = float(config.amplitude) * theta.exp()
        if adapter not in self.loran_frequency:
            frequency = A.new_full((1, 1), float(config.frequency), dtype=work)
        else:
            frequency = float(config.frequency) * self.loran_frequency[adapter].to(work).view(-1, 1).exp()
        if adapter in self.loran_schedule:
            factors = self.loran_schedule[adapter].to(work)
            amplitude, frequency = factors[0] * amplitude, factors[1] * frequency
        return config.map_of(amplitude, frequency)


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
    trainable_parameters=lambda config, d_out, d_in: (
        config.r * (d_in + d_out) + sum(config.curve_parameters) * (d_out if config.granularity == "row" else 1)
    ),
    cost="forms d_out x d_in in every pass; backward has one more product of that size than LoRA",
    caveats=(
        "At the published setting (a = 5e-5, w = 1e4) Sinter evaluated in bf16 or fp16 is the identity, bit for bit; here f "
        "is evaluated in fp32, but what enters a bf16 product still changes in well under 1 % of its entries.",
        "relu with B = 0 has zero gradient for ever: set init_B_std.",
        "sigmoid has f(0) = 0.5, so the update is s/2 in every entry before training.",
        "Merging into a bf16 or quantised base loses most of what f added.",
        "learn, fourier, chebyshev and schedules are extensions of this package, in no paper; what is learned of a and w is a "
        "factor, theta in a = a0 exp(theta), so the learning rate is relative to the configured values.",
    ),
)
