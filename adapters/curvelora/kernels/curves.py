"""The activations of `curvelora.activations` inside kernels: f(u), and f'(u) - f'(0).

The slope comes without its value at zero, because that part is LoRA's and can be formed elsewhere: at |u| = 1e-2 Sinter's
f' - 1 is 5e-3 at most, and a bf16 product of the whole f' would lose half of it.

    sinter      f' - 1    = a (sin z + z cos z)          z = w u
    cos         f' - 2    = cos z - 1 - z sin z
    tanh        f' - 1    = -tanh^2 u
    sigmoid     f' - 1/4  = -(sigmoid u - 1/2)^2
    relu        f'        = [u > 0]
    silu, swish f' - 1/2  = y - 1/2 + beta u y (1 - y)   y = sigmoid(beta u), beta = 1, 25
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
def _series(u):
    """tanh for |u| < 0.25, where 2 sigmoid(2u) - 1 would cancel."""
    square = u * u
    return u * (
        1 + square * (-0.3333333333 + square * (0.1333333333 + square * (-0.05396825397 + square * 0.0218694885)))
    )


@triton.jit
def tanh(u):
    """tanh(u), fp32, right near zero too."""
    return tl.where(tl.abs(u) < 0.25, _series(u), 2 * tl.sigmoid(2 * u) - 1)


@triton.jit
def _tanh_of_tile(u):
    """tanh(u) again. Nearly all tiles of BA are near zero as a whole, and then neither exponentials nor quotients are formed,
    which take longer than all else here. (The gradients' kernel has no registers left for two ways.)
    """
    y = _series(u)
    if tl.max(tl.abs(u)) >= 0.25:
        y = tanh(u)
    return y


@triton.jit
def _sigmoid_of_tile(u):
    """sigmoid(u), fp32, by the same means."""
    y = 0.5 + 0.5 * _series(0.5 * u)
    if tl.max(tl.abs(u)) >= 0.5:
        y = tl.sigmoid(u)
    return y


@triton.jit
def value(u, NAME: tl.constexpr, amplitude, frequency):
    """f(u), fp32. u: a tile."""
    if NAME == "sinter":
        sine, _ = sin_cos(u * frequency)
        return u + amplitude * u * sine
    elif NAME == "cos":
        _, cosine = sin_cos(u * frequency)
        return u + u * cosine
    elif NAME == "tanh":
        return _tanh_of_tile(u)
    elif NAME == "sigmoid":
        return _sigmoid_of_tile(u)
    elif NAME == "relu":
        return tl.where(u < 0, 0.0, u)  # a maximum would be 0 where u is not a number
    elif NAME == "silu":
        return u * _sigmoid_of_tile(u)
    elif NAME == "swish":
        return u * tl.sigmoid(u * BETA)
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
        y = tl.sigmoid(u) - 0.5
        return -y * y
    elif NAME == "relu":
        return tl.where(u > 0, 1.0, 0.0)
    elif NAME == "silu":
        y = tl.sigmoid(u)
        return y - 0.5 + u * y * (1 - y)
    elif NAME == "swish":
        y = tl.sigmoid(u * BETA)
        return y - 0.5 + u * BETA * y * (1 - y)
    else:
        tl.static_assert(NAME == "gaussian")
        return (0.5 - u * u) * tl.exp(-u * u) - 0.5
