"""One buffer a device and stream for matrices that live within one layer's pass, so that none of them outlives it.

Forward and backward passes use it for the merged weight, and the backward pass for G after that. Work on one stream runs in
order, so the next layer may have the same memory; each stream has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFERS: dict[tuple[torch.device, int], Tensor] = {}


def workspace(d_out: int, d_in: int, device: torch.device) -> Tensor:
    """An uninitialised (d_out, d_in) bf16 matrix, which the next call on this stream hands out again."""
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    held = _BUFFERS.get(key)
    if held is None or held.numel() < d_out * d_in:
        _BUFFERS.pop(key, None)
        held = None  # the smaller one goes before the larger one comes
        held = _BUFFERS[key] = torch.empty(d_out * d_in, dtype=torch.bfloat16, device=device)
    return held[: d_out * d_in].view(d_out, d_in)


def release() -> None:
    """Give the buffers back to PyTorch's allocator."""
    _BUFFERS.clear()
