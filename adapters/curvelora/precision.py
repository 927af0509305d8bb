"""Exact fp32 products where a nonlinearity depends on them, whatever the user's global settings are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_BACKENDS = {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Autocast off, and fp32 matrix products computed in fp32 (no TF32, no bf16 splitting) on `device`.

    Sinter's phase is w BA with w = 1e4: a relative error of 2^-11 in BA (TF32) at |BA| = 1e-2 already moves it by 0.05 rad,
    bf16 factors by 0.2 rad. The settings are restored on exit.
    """
    backend = _BACKENDS.get(device.type)
    before = backend.fp32_precision if backend is not None else None
    with torch.autocast(device.type, enabled=False):
        if before in (None, "ieee"):
            yield
            return
        backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            backend.fp32_precision = before


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which BA and f are evaluated: fp32, or fp64 where the factors are fp64 (reference runs)."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply `x`: autocast's where autocast is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
