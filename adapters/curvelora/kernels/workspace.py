"""One buffer a device and stream for matrices that live within one layer's pass, so that none of them outlives it.

Forward and backward passes use it for the merged weight, and the backward pass for G after that. Work on one stream runs in
order, so the next layer may have the same memory; each stream has its own. Threads may share a stream, so who uses the buffer
holds `LOCK` until the last reader is queued.

While a CUDA graph is recorded there is no such buffer: the graph would replay into memory that has another owner, or none, once
a larger matrix is wanted or the graph before it is gone. PyTorch lends the memory then, from the graph's own, and again to the
next layer.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

LOCK = threading.RLock()
_BUFFERS: dict[tuple[torch.device, int], Tensor] = {}


def workspace(d_out: int, d_in: int, device: torch.device) -> Tensor:
    """An uninitialised (d_out, d_in) bf16 matrix, which the next call on this stream hands out again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(d_out, d_in, dtype=torch.bfloat16, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    held = _BUFFERS.get(key)
    if held is None or held.numel() < d_out * d_in:
        _BUFFERS.pop(key, None)
        held = None  # the smaller one goes before the larger one comes
        with torch.inference_mode(False):  # or no training step after an evaluation could write to it
            held = _BUFFERS[key] = torch.empty(d_out * d_in, dtype=torch.bfloat16, device=device)
    return held[: d_out * d_in].view(d_out, d_in)


def release() -> None:
    """Give the buffers back to PyTorch's allocator."""
    _BUFFERS.clear()
