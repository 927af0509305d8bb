"""bf16 products at a usable speed on x86 CPUs without bf16 instructions.

oneDNN multiplies bf16 matrices on x86 CPUs with AVX-512 alone. Elsewhere, so on most laptops and on AMD before Zen 4, torch falls
back on a loop that takes some sixty times as long as the product in fp32 where a backward pass forms it. Here such products are
formed in fp32 and rounded once, which is what the instructions do. Products of few rows, as in decoding, are left to torch: there
the copies in fp32 would take longer than anything.
"""

from __future__ import annotations

import functools
import platform
import warnings
from typing import Any

import torch
from torch import Tensor

NAMES = ("mm", "addmm", "bmm", "baddbmm")
ROWS = 16  # from which on it pays


def slow_here() -> bool:
    """Whether torch multiplies bf16 matrices without oneDNN on this CPU."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def round_products_once() -> torch.library.Library:
    """Form the products of bf16 matrices on the CPU in fp32, in this process from now on; other dtypes keep their bits.

    Returns:
        what holds the replaced operators.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[^$]*Overriding a previously registered kernel")
        for name in NAMES:
            library.impl(name, functools.partial(_product, getattr(torch, name)), "CPU", allow_override=True)
    return library


def _product(product: Any, *operands: Tensor, **scales: Any) -> Tensor:
    """`product` by its form with `out`, which is an operator of its own and still torch's."""
    narrow = operands[-2].shape[-2] >= ROWS and all(operand.dtype == torch.bfloat16 for operand in operands)
    wide = [operand.float() for operand in operands] if narrow else list(operands)
    result = product(*wide, **scales, out=wide[0].new_empty(0))
    return result.bfloat16() if narrow else result
