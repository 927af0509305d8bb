"""Pieces that every kernel here uses: bf16 rounding, products with more digits than bf16 has, sine and cosine.

Triton's interpreter, in which the tests run on a CPU, truncates where a GPU rounds to bf16 and cannot multiply bf16 tiles. There
the same numbers are rounded by integer arithmetic and multiplied as fp32: products of bf16 numbers are exact in fp32, so what
differs from a GPU is the order of sums and the accuracy of sine and cosine. Nor does it round to FP8 as GPUs do (ties to even).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = knobs.runtime.interpret  # the environment's TRITON_INTERPRET=1, read when this package is imported

if INTERPRETED:

    @triton.jit
    def to_bf16(x):
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x.to(tl.float32))

    @triton.jit
    def dot(a, b, sums):
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")

    @triton.jit
    def upper_half(bits):
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def to_e4m3(x):
        bits = x.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        size = tl.where((size > 0x43E00000) & (size <= 0x7F800000), 0x43E00000, size)  # infinity too becomes 448
        # from 2^-6 on: three bits of mantissa stay, and the exponent's bias is 7 instead of 127
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # below: a multiple of 2^-9, which is the last place of numbers at 2^14
        small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) & 0xF
        code = tl.where(size > 0x7F800000, 0x7F, tl.where(size >= 0x3C800000, normal, small))
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)

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
    def upper_half(bits):
        """The bf16 number whose bits are the upper half of `bits`, where the lower half is zero."""
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)

    @triton.jit
    def to_e4m3(x):
        """x (fp32) in FP8, rounded to nearest, 448 at most; NaN stays NaN. On GPUs of capability 8.9 and later."""
        return x.to(tl.float8e4nv)

    @triton.jit
    def sin_cos(z):
        """The hardware's own, without a search for multiples of pi. Off by the larger of 2^-20 and 2^-23 |z|, which is less than
        z = w u itself is off by: 2^-16 |z|. NVIDIA states errors up to |z| = 100 pi; beyond, up to 1e5, it was measured.
        """
        sine = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)
        cosine = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)
        return sine, cosine


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes longer on the host than a small kernel on the GPU."""
    return -(-a // b)


@triton.jit
def split(x):
    """x (fp32) as a sum of two bf16 numbers; what is left is below 2^-17 |x|.

    The first is rounded by integer arithmetic, ties away from zero: a conversion that is converted back goes through the units
    of sines, an eighth as many as those of integers. A NaN whose bits are all ones loses its first half, and stays one by the
    second.
    """
    bits = (x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    return upper_half(bits), to_bf16(x - bits.to(tl.float32, bitcast=True))


@triton.jit
def split_product(b_high, b_low, a_high, a_low, sums):
    """b a + sums from split factors, to about 2^-16 of |b| |a|: three products of bf16, the smallest first.

    bf16 factors alone would be off by 2^-9, which at |ba| = 1e-2 turns the phase of Sinter by 0.2 rad.
    """
    sums = dot(b_low, a_high, sums)
    sums = dot(b_high, a_low, sums)
    return dot(b_high, a_high, sums)


@triton.jit
def add_parts(total, parts, at, there, count, apart, TURN: tl.constexpr):
    """total + what stands at `at` in each of `count` arrays that lie `apart` entries from one another."""
    for start in range(0, count, TURN):
        part = start + tl.arange(0, TURN)
        of_parts = part.to(tl.int64)[:, None] * apart + at[None, :]
        total += tl.sum(tl.load(parts + of_parts, (part < count)[:, None] & there[None, :], other=0.0), 0)
    return total
