"""A job for tests of preflight: processes are threads that meet over a real store and reduce over gloo; machines are made up."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import AllreduceOptions, PrefixStore, ProcessGroupGloo, ReduceOp, TCPStore

from curvelora.errors import UserError
from curvelora_training.preflight.allreduce import Ring
from curvelora_training.preflight.check import Machine
from curvelora_training.preflight.judge import GIB
from curvelora_training.preflight.meeting import Meeting
from curvelora_training.preflight.place import Place, open_store

CPU = torch.device("cpu")
SMALL = {"sizes": (1 << 10, 1 << 14), "sample": 1 << 16, "patience": 0.3}
NODE = {
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
    "commit": "0123456789ab",
    "code": "c" * 64,
    "hardware": {"cpu_cores": 8, "memory_bytes": 64 * GIB},
    "platform": "Linux",
}


def places(nodes: int, each: int) -> list[Place]:
    """The processes of a job on `nodes` machines n1, n2, ..."""
    names = tuple(f"n{i + 1}" for i in range(nodes))
    return [
        Place(node * each + local, nodes * each, local, each, node, names[node], names)
        for node in range(nodes)
        for local in range(each)
    ]


def gloo(place: Place, store: Any, device: torch.device, nodes: list[list[int]], seconds: float) -> dict[str, Ring]:
    """As `open_rings`, without the one process group that a process has: a thread has its own."""

    def ring(name: str, members: list[int]) -> Ring:
        index = members.index(place.rank)
        group = ProcessGroupGloo(PrefixStore(name, store), index, len(members), timedelta(seconds=20))

        def reduce(tensor: torch.Tensor, operation: str) -> None:
            options = AllreduceOptions()
            options.reduceOp = ReduceOp.SUM if operation == "sum" else ReduceOp.MAX
            group.allreduce([tensor], options).wait()

        return Ring(reduce, index, len(members), tuple(members))

    rings = {"all": ring("all", list(range(place.processes)))}
    own = next(ranks for ranks in nodes if place.rank in ranks)
    if len(nodes) > 1 and len(own) > 1:
        rings["node"] = ring(f"node {own}", own)
        if place.rank == own[0]:
            rings["across"] = ring("across", [ranks[0] for ranks in nodes])
    return rings


def meet(
    who: list[Place],
    act: Callable[[Meeting], Any],
    seconds: float = 20.0,
    absent: tuple[int, ...] = (),
) -> dict[int, Any]:
    """What `act` gives, or raises, in each process that comes."""
    server = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    came: dict[int, Any] = {}

    def process(place: Place) -> None:
        here = replace(place, address="127.0.0.1", port=server.port, served=True)
        meeting = Meeting(open_store(here, seconds), here, seconds)
        try:
            came[place.rank] = act(meeting)
        except UserError as error:
            came[place.rank] = error
        finally:
            meeting.part(1.0)

    threads = [
        threading.Thread(target=process, args=(place,), daemon=True) for place in who if place.rank not in absent
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a process hangs"
    return came


def machine(**other: Any) -> Machine:
    """A machine without GPUs, whose facts are `NODE`."""
    usual = {
        "describe": lambda place: copy.deepcopy(NODE),
        "gpu": lambda place: None,
        "gpus": lambda own: {"gpus": [], "driver": None},
        "rings": gloo,
    }
    return Machine(**usual | other)
