"""The activations of `curvelora.activations` inside kernels: f(u), and f'(u) - f'(0).

The slope comes without its value at zero, because that part is LoRA's and can be formed elsewhere: at |u| = 1e-2 Sinter's
f' - 1 is 5e-3 at most, and a bf16 product of the whole f' would lose half of it.

    sinter      f' - 1    = a (sin z + z cos z)          z = w u
    cos         f' - 2    = cos z - 1 - z sin z
    tanh        f' - 1    = -tanh^2 u
    sigmoid     f' - 1/4  = -t^2 / 4                     t = tanh(u/2) = 2 sigmoid(u) - 1
    relu        f'        = [u > 0]
    silu, swish f' - 1/2  = t/2 + beta u (1 - t^2) / 4   t = tanh(beta u / 2), beta = 1, 25
    gaussian    f' - 1/2  = (1/2 - u^2) exp(-u^2) - 1/2
"""

from __future__ import annotations

import triton
import triton.language as tl

from curvelora.activations import SWISH_BETA
from curvelora.kernels.portable import sin_cos

BETA = tl.constexpr(SWISH_BETA)
NAMES = ("identity", "sinter", "tanh", "sigmoid", "relu", "silu", "swish", "cos", "gaussian")


@triton.jit
def tanh(u):
    """Near zero by its series, where 1 - 2 / (1 + exp(2u)) would cancel. Most tiles of BA are near zero as a whole, and then
    neither exponentials nor quotients are formed, which take longer than all else here.
    """
    square = u * u
    y = u * (1 + square * (-0.3333333333 + square * (0.1333333333 + square * (-0.05396825397 + square * 0.0218694885))))
    if tl.max(tl.abs(u)) >= 0.25:
        y = tl.where(tl.abs(u) < 0.25, y, 2 * tl.sigmoid(2 * u) - 1)
    return y


@triton.jit
def sigmoid(u):
    return 0.5 + 0.5 * tanh(0.5 * u)


@triton.jit
def value(u, NAME: tl.constexpr, amplitude, frequency):
    """f(u), fp32."""
    if NAME == "sinter":
        sine, _ = sin_cos(u * frequency)
        return u + amplitude * u * sine
    elif NAME == "cos":
        _, cosine = sin_cos(u * frequency)
        return u + u * cosine
    elif NAME == "tanh":
        return tanh(u)
    elif NAME == "sigmoid":
        return sigmoid(u)
    elif NAME == "relu":
        return tl.where(u < 0, 0.0, u)  # a maximum would be 0 where u is not a number
    elif NAME == "silu":
        return u * sigmoid(u)
    elif NAME == "swish":
        return u * sigmoid(u * BETA)
    elif NAME == "gaussian":
        return 0.5 * u * tl.exp(-u * u)
    else:
        tl.static_assert(NAME == "identity")
        return u


@triton.jit
def slope_beyond_zero(u, NAME: tl.constexpr, amplitude, frequency):
    """f'(u) - f'(0), fp32."""
    if NAME == "sinter":
        sine, cosine = sin_cos(u * frequency)
        return amplitude * (sine + frequency * u * cosine)
    elif NAME == "cos":
        sine, cosine = sin_cos(u * frequency)
        return cosine - 1 - frequency * u * sine
    elif NAME == "tanh":
        y = tanh(u)
        return -y * y
    elif NAME == "sigmoid":
        t = tanh(0.5 * u)
        return -0.25 * t * t
    elif NAME == "relu":
        return tl.where(u > 0, 1.0, 0.0)
    elif NAME == "silu":
        t = tanh(0.5 * u)
        return 0.5 * t + 0.25 * u * (1 - t * t)
    elif NAME == "swish":
        z = u * BETA
        t = tanh(0.5 * z)
        return 0.5 * t + 0.25 * z * (1 - t * t)
    else:
        tl.static_assert(NAME == "gaussian")
        return (0.5 - u * u) * tl.exp(-u * u) - 0.5
