"""The all-reduce between all processes: is the sum right, and how fast does it come.

    algorithm bandwidth = S / t          bus bandwidth = (S / t) 2 (n - 1) / n

for S bytes a process, n processes and t seconds (the slowest process's mean). The second one is what each link has to carry, in
each direction, in a ring; it can be compared with the hardware whatever n is, and is what nccl-tests calls busbw.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES = {"cuda": (1 << 20, 1 << 26, 1 << 28), "cpu": (1 << 16, 1 << 20, 1 << 24)}  # bytes
WARM_UP, TIMED = 3, 10
PATTERN = 7  # values in turn: a wrong offset is noticed


@dataclass(frozen=True)
class Ring:
    """Processes that reduce with each other.

    Attributes:
        reduce: the all-reduce of all of them, in place: `reduce(tensor, "sum" or "max")`.
        index, size: of this process among them, from 0.
        members: their ranks in the job.
    """

    reduce: Callable[[Tensor, str], None]
    index: int
    size: int
    members: tuple[int, ...]


def check_sum(ring: Ring, numel: int, device: torch.device) -> str | None:
    """Reduce a tensor whose sum is known and compare every element; what is wrong, or None.

    Process i gives (i + 1) (1, 2, ..., 7, 1, 2, ...) in float32, so all sums are whole numbers below 2^24 up to 2,188 processes.
    """
    pattern = torch.arange(numel, device=device, dtype=torch.int32).remainder_(PATTERN).add_(1).float()
    given = pattern * (ring.index + 1)
    ring.reduce(given, "sum")
    wanted = pattern * (ring.size * (ring.size + 1) // 2)
    wrong = (given != wanted).nonzero()
    if not len(wrong):
        return None
    at = int(wrong[0])
    return f"{len(wrong)} of {numel} sums are wrong, the first at {at}: {float(given[at]):g} instead of {float(wanted[at]):g}"


def measure(ring: Ring, sizes: tuple[int, ...], device: torch.device, timed: int = TIMED) -> list[dict[str, Any]]:
    """Time the all-reduce at each size, with its result checked before and after. Every process of the ring calls it.

    Args:
        sizes: bytes a process.
        timed: all-reduces that are timed together, after a few that are not.
    """
    found = []
    for size in sizes:
        numel = max(size // 4, 1)
        before = check_sum(ring, numel, device)
        data = torch.zeros(numel, device=device)
        for _ in range(WARM_UP):
            ring.reduce(data, "sum")
        _finish(device)
        start = time.perf_counter()
        for _ in range(timed):
            ring.reduce(data, "sum")
        _finish(device)
        slowest = torch.tensor([(time.perf_counter() - start) / timed], device=device)
        ring.reduce(slowest, "max")
        seconds, after = float(slowest), check_sum(ring, numel, device)
        rate = 4 * numel / seconds
        found.append(
            {
                "bytes": 4 * numel,
                "seconds": seconds,
                "algorithm_bytes_per_second": rate,
                "bus_bytes_per_second": rate * 2 * (ring.size - 1) / ring.size,
                "wrong": before or after,
            }
        )
    return found


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
