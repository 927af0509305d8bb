"""The process groups that reduce: all processes, those of a node, and one process a node."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from curvelora_training.preflight.allreduce import Ring
from curvelora_training.preflight.place import Place

OPERATIONS = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}


def open_rings(
    place: Place, store: Any, device: torch.device, nodes: list[list[int]], seconds: float
) -> dict[str, Ring]:
    """`all`, and where there are several nodes with several processes `node` (this one's) and `across` (of one process a node).

    Args:
        store: of all processes.
        nodes: the ranks of each node.
        seconds: after which an all-reduce is given up.
    """
    if place.processes == 1:
        return {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    options = {"device_id": device} if device.type == "cuda" else {}
    distributed.init_process_group(
        backend,
        store=store,
        rank=place.rank,
        world_size=place.processes,
        timeout=timedelta(seconds=seconds),
        **options,
    )
    rings = {"all": _ring(None, place.rank, tuple(range(place.processes)))}
    if len(nodes) > 1 and any(len(ranks) > 1 for ranks in nodes):
        for ranks in nodes:  # every process takes part in making every group
            group = distributed.new_group(ranks)
            if place.rank in ranks and len(ranks) > 1:
                rings["node"] = _ring(group, place.rank, tuple(ranks))
        firsts = [ranks[0] for ranks in nodes]
        group = distributed.new_group(firsts)
        if place.rank in firsts:
            rings["across"] = _ring(group, place.rank, tuple(firsts))
    return rings


def _ring(group: Any, rank: int, members: tuple[int, ...]) -> Ring:
    def reduce(tensor: Tensor, operation: str) -> None:
        distributed.all_reduce(tensor, OPERATIONS[operation], group=group)

    return Ring(reduce, members.index(rank), len(members), members)


@contextlib.contextmanager
def deadline(seconds: float, say: Callable[[], str | None]) -> Iterator[None]:
    """End the process with exit code 2 where what is inside takes longer: a collective that waits cannot be called off.

    Args:
        say: gives what is printed then, or None.
    """

    def give_up() -> None:
        try:
            if text := say():
                print(f"error: {text}", file=sys.stderr, flush=True)
        finally:
            os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def close_rings() -> None:
    """Take the process group down, where there is one."""
    with contextlib.suppress(Exception):
        if distributed.is_initialized():
            distributed.destroy_process_group()
