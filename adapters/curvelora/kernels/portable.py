"""Pieces that every kernel here uses: bf16 rounding, products with more digits than bf16 has, sine and cosine.

Triton's interpreter, in which the tests run on a CPU, truncates where a GPU rounds to bf16 and cannot multiply bf16 tiles. There
the same numbers are rounded by integer arithmetic and multiplied as fp32: products of bf16 numbers are exact in fp32, so what
differs from a GPU is the order of sums and the accuracy of sine and cosine.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = knobs.runtime.interpret  # the environment's TRITON_INTERPRET=1, read when this package is imported
TWO_PI = tl.constexpr(6.283185307179586)

if INTERPRETED:

    @triton.jit
    def to_bf16(x):
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def dot(a, b, sums):
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")

    @triton.jit
    def sin_cos(z):
        return tl.sin(z), tl.cos(z)

else:

    @triton.jit
    def to_bf16(x):
        return x.to(tl.bfloat16)

    @triton.jit
    def dot(a, b, sums):
        """a b + sums: bf16 tiles, fp32 sums."""
        return tl.dot(a, b, sums)

    @triton.jit
    def sin_cos(z):
        """Of |z| <= pi, with an absolute error below 2^-20: the hardware's own, without the search for far multiples of pi."""
        sine = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)
        cosine = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)
        return sine, cosine


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes longer on the host than a small kernel on the GPU."""
    return -(-a // b)


@triton.jit
def split(x):
    """x (fp32) as a sum of two bf16 numbers; what is left is below 2^-17 |x|."""
    high = to_bf16(x)
    return high, to_bf16(x - high.to(tl.float32))


@triton.jit
def split_product(b_high, b_low, a_high, a_low, sums):
    """b a + sums from split factors, to about 2^-16 of |b| |a|: three products of bf16, the smallest first.

    bf16 factors alone would be off by 2^-9, which at |ba| = 1e-2 turns the phase of Sinter by 0.2 rad.
    """
    sums = dot(b_low, a_high, sums)
    sums = dot(b_high, a_low, sums)
    return dot(b_high, a_high, sums)


@triton.jit
def sin_cos_of_multiple(u, frequency):
    """sin(w u), cos(w u): the multiple of 2 pi is taken off in turns, where an fp32 number of up to 2^10 has 13 digits left."""
    turns = u * (frequency / TWO_PI)
    return sin_cos((turns - tl.floor(turns + 0.5)) * TWO_PI)
