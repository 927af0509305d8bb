"""The elementwise functions of all methods, with their derivatives.

Weight-space adapters, dW = s f(BA). Definitions and names: LoRAN (arXiv 2509.21870; the authors' code of the predecessor,
Findings of EMNLP 2024 no. 177), activation ablation. With x = BA, amplitude a and frequency w:

    identity   x                       f(0)=0    f'(0)=1     LoRA as an explicit d_out x d_in product
    sinter     a x sin(w x) + x        f(0)=0    f'(0)=1     the method's own
    tanh       tanh x                  f(0)=0    f'(0)=1
    sigmoid    1 / (1 + exp(-x))       f(0)=0.5  f'(0)=0.25  dW = s/2 everywhere before training
    relu       max(0, x)               f(0)=0    f'(0)=0     with B = 0 it never trains: the gradient is exactly zero
    silu       x sigmoid(x)            f(0)=0    f'(0)=0.5
    swish      x sigmoid(25 x)         f(0)=0    f'(0)=0.5   "Swish-25"
    cos        x cos(w x) + x          f(0)=0    f'(0)=2
    gaussian   0.5 x exp(-x^2)         f(0)=0    f'(0)=0.5

Activation-space adapters take identity, tanh, sigmoid and relu of these, and two more:

    gelu        x Phi(x), exact, with erf   f(0)=0    f'(0)=0.5   RanLoRA's default
    leaky_relu  max(x, 0.01 x)              f(0)=0    f'(0)=0.01  PyTorch's slope; AuroRA's ablation

SineLoRA has one of its own:

    sine        a sin(w x)                  f(0)=0    f'(0)=a w   arXiv 2403.19243; not "sin", LoRAN's name for sinter

All work in the dtype of their argument. The layers call them on fp32: in bf16 and fp16 Sinter at its published setting
(a = 5e-5, w = 1e4) is the identity, bit for bit, because |f(x) - x| <= 5e-5 |x| is far below half a unit in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from curvelora.errors import UserError, nearest

SWISH_BETA = 25.0
LEAKY_SLOPE = 0.01


def _sinter(x: Tensor, a: float, w: float) -> Tensor:
    return a * x * torch.sin(w * x) + x


def _sinter_slope(x: Tensor, a: float, w: float) -> Tensor:
    phase = w * x
    return 1 + a * torch.sin(phase) + a * phase * torch.cos(phase)


def _cos_slope(x: Tensor, a: float, w: float) -> Tensor:
    phase = w * x
    return 1 + torch.cos(phase) - phase * torch.sin(phase)


def _sigmoid_slope(x: Tensor, a: float, w: float) -> Tensor:
    y = torch.sigmoid(x)
    return y * (1 - y)


def _swish(beta: float) -> Callable[[Tensor, float, float], Tensor]:
    return lambda x, a, w: x * torch.sigmoid(beta * x)


def _swish_slope(beta: float) -> Callable[[Tensor, float, float], Tensor]:
    def slope(x: Tensor, a: float, w: float) -> Tensor:
        y = torch.sigmoid(beta * x)
        return y * (1 + beta * x * (1 - y))

    return slope


def _gelu_slope(x: Tensor, a: float, w: float) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


# name -> (f, f'), each called as (x, amplitude, frequency)
_FUNCTIONS: dict[str, tuple[Callable[[Tensor, float, float], Tensor], Callable[[Tensor, float, float], Tensor]]] = {
    "identity": (lambda x, a, w: x, lambda x, a, w: torch.ones_like(x)),
    "sinter": (_sinter, _sinter_slope),
    "tanh": (lambda x, a, w: torch.tanh(x), lambda x, a, w: 1 - torch.tanh(x) ** 2),
    "sigmoid": (lambda x, a, w: torch.sigmoid(x), _sigmoid_slope),
    "relu": (lambda x, a, w: torch.relu(x), lambda x, a, w: (x > 0).to(x.dtype)),
    "silu": (_swish(1.0), _swish_slope(1.0)),
    "swish": (_swish(SWISH_BETA), _swish_slope(SWISH_BETA)),
    "cos": (lambda x, a, w: x * torch.cos(w * x) + x, _cos_slope),
    "gaussian": (lambda x, a, w: 0.5 * x * torch.exp(-x * x), lambda x, a, w: (0.5 - x * x) * torch.exp(-x * x)),
    "sine": (lambda x, a, w: a * torch.sin(w * x), lambda x, a, w: a * w * torch.cos(w * x)),
    "gelu": (lambda x, a, w: functional.gelu(x), _gelu_slope),
    "leaky_relu": (
        lambda x, a, w: functional.leaky_relu(x, LEAKY_SLOPE),
        lambda x, a, w: torch.where(x > 0, 1.0, LEAKY_SLOPE).to(x.dtype),
    ),
}
# names that the paper, its code and its tables use for the same functions
ALIASES = {"sin": "sinter", "swish-25": "swish", "swish25": "swish", "swish-1": "silu", "sinusoid": "sinter"}
# those with a phase w x
PERIODIC = ("sinter", "cos", "sine", "fourier", "chebyshev")
# those of LoRAN
NAMES = ("identity", "sinter", "tanh", "sigmoid", "relu", "silu", "swish", "cos", "gaussian")


def canonical_name(name: str, known: Sequence[str] = tuple(_FUNCTIONS)) -> str:
    """Return the name under which an activation is defined.

    Args:
        known: the names that the method accepts.

    Raises:
        UserError: none of them; the nearest one and the list are in the message.
    """
    key = ALIASES.get(str(name).lower(), str(name).lower())
    if key not in known:
        candidates = [*known, *(alias for alias, target in ALIASES.items() if target in known)]
        raise UserError(f"unknown activation {name!r}{nearest(key, candidates)} (known: {', '.join(known)})")
    return key


@dataclass(frozen=True)
class Activation:
    """One elementwise f with its parameters; hashable, so it can be a constant of an autograd function.

    Args:
        name: a name of the table above or an alias.
        amplitude: a of Sinter and sine, dimensionless; ignored by the others.
        frequency: w of Sinter, cos and sine, in radians per unit of BA; ignored by the others.
    """

    name: str = "sinter"
    amplitude: float = 5e-5
    frequency: float = 1e4

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", canonical_name(self.name))

    def value(self, x: Tensor) -> Tensor:
        """f(x), elementwise, in the dtype of x."""
        return _FUNCTIONS[self.name][0](x, self.amplitude, self.frequency)

    def slope(self, x: Tensor) -> Tensor:
        """f'(x), elementwise, in the dtype of x; at a kink (relu at 0) the value that PyTorch's autograd uses."""
        return _FUNCTIONS[self.name][1](x, self.amplitude, self.frequency)

    @property
    def value_at_zero(self) -> float:
        """f(0), in fp64."""
        return _at_zero(self)[0]

    @property
    def slope_at_zero(self) -> float:
        """f'(0), in fp64."""
        return _at_zero(self)[1]


@cache
def _at_zero(f: Activation) -> tuple[float, float]:
    zero = torch.zeros((), dtype=torch.float64)
    return f.value(zero).item(), f.slope(zero).item()
