"""One buffer a device and stream for matrices that live within one layer's pass, so that none of them outlives it.

Forward and backward passes use it for the merged weight, and the backward pass for G before that. Work on one stream runs in
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
# (device, stream) -> the buffer, and the views of it that have been handed out, by shape: it is asked for several times a layer
_BUFFERS: dict[tuple[torch.device, int], tuple[Tensor, dict[tuple[int, int], Tensor]]] = {}


def stream_of(device: torch.device) -> int:
    """The number of the current stream; as `torch.cuda.current_stream` asks, without an object around it."""
    return torch._C._cuda_getCurrentStream(device.index)[0] if device.type == "cuda" else 0


def workspace(d_out: int, d_in: int, device: torch.device) -> Tensor:
    """An uninitialised (d_out, d_in) bf16 matrix, which the next call on this stream hands out again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(d_out, d_in, dtype=torch.bfloat16, device=device)
    key, shape = (device, stream_of(device)), (d_out, d_in)
    held, views = _BUFFERS.get(key, (None, {}))
    if (found := views.get(shape)) is not None:
        return found
    with torch.inference_mode(False):  # or no training step after an evaluation could write to it
        if held is None or held.numel() < d_out * d_in:
            _BUFFERS.pop(key, None)
            held, views = None, {}  # the smaller one goes before the larger one comes
            held = torch.empty(d_out * d_in, dtype=torch.bfloat16, device=device)
            _BUFFERS[key] = held, views
        views[shape] = found = held[: d_out * d_in].view(shape)
    return found


def release() -> None:
    """Give the buffers back to PyTorch's allocator."""
    _BUFFERS.clear()
