"""Where this process stands in its job, whichever launcher started it: torchrun, accelerate, deepspeed, srun, or none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, PrefixStore, TCPStore

from curvelora.errors import UserError

FIRST_PORT, PORTS = 20000, 10000  # below those that Linux gives to outgoing connections


@dataclass(frozen=True)
class Place:
    """One process of a job.

    Attributes:
        node: index of the node from 0, as the launcher counts.
        nodes: the names of all nodes, by index, where SLURM says them; else empty.
        served: whether another process than the first one keeps the store (torchrun's agent).
    """

    rank: int = 0
    processes: int = 1
    local_rank: int = 0
    local_processes: int = 1
    node: int = 0
    host: str = "localhost"
    nodes: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    port: int = 0
    served: bool = False
    launcher: str = "none"


def find_place(environ: Mapping[str, str] | None = None) -> Place:
    """This process's place, from the variables that its launcher has set.

    Raises:
        UserError: a variable is missing or is no number.
    """
    given = os.environ if environ is None else environ
    host = socket.gethostname()
    nodes = _slurm_nodes(given)

    def number(*names: str, default: int | None = None) -> int:
        name = next((name for name in names if name in given), None)
        if name is None and default is not None:
            return default
        try:
            return int(given[name]) if name else int("")
        except ValueError:
            said = f"is {given[name]!r}, and no number" if name else "is not set"
            raise UserError(f"the variable {name or names[0]} {said}: start preflight with a launcher") from None

    if "RANK" in given:  # torchrun, accelerate (which is torchrun inside) and deepspeed
        processes = number("WORLD_SIZE")
        local = number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=processes)
        node = number("GROUP_RANK", "CROSS_RANK", default=number("RANK") // max(local, 1))
        agent = given.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in given else "deepspeed" if "CROSS_RANK" in given else "other"
        address, port = given.get("MASTER_ADDR", ""), number("MASTER_PORT")
        if not address:
            raise UserError("the variable MASTER_ADDR is not set: start preflight with a launcher")
        rank, own = number("RANK"), number("LOCAL_RANK")
        return Place(rank, processes, own, local, node, host, nodes, address, port, agent, launcher)
    # in the batch script itself SLURM_PROCID is set as well; the number of tasks of a step is not
    if number("SLURM_STEP_NUM_TASKS", default=1) > 1 and "SLURM_PROCID" in given:
        address = given.get("MASTER_ADDR") or (nodes[0] if nodes else "")
        if not address:
            raise UserError(
                "the variable MASTER_ADDR is not set, and SLURM names no nodes: set it to the first node's name"
            )
        port = number("MASTER_PORT", default=FIRST_PORT + number("SLURM_JOB_ID", default=0) % PORTS)
        place = (number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS"), number("SLURM_LOCALID"), _tasks_here(given))
        return Place(*place, number("SLURM_NODEID", default=0), host, nodes, address, port, False, "srun")
    return Place(host=host)


def open_store(place: Place, seconds: float) -> Any:
    """The store over which all processes of the job talk; nobody waits for anybody here.

    Raises:
        UserError: the first process cannot be reached within `seconds`.
    """
    if place.processes == 1:
        return HashStore()
    where = f"{place.address}:{place.port}"
    try:
        store = TCPStore(
            place.address,
            place.port,
            None,
            is_master=place.rank == 0 and not place.served,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except Exception as error:  # torch has a class of errors for each of: no such name, refused, in use, timed out
        why = " ".join(str(error).split())[:200]
        if place.rank == 0 and not place.served:
            raise UserError(f"{place.host} cannot serve {where} ({why}): name another MASTER_PORT") from error
        raise UserError(
            f"{place.host} (process {place.rank}) cannot reach the first process at {where} within {seconds:g} s ({why}): "
            "look whether that node runs, whether its name means the same here, and whether a firewall is between them"
        ) from error
    return PrefixStore("curvelora-preflight", store)


def _slurm_nodes(given: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the job's nodes in SLURM's order, which its compressed list does not show."""
    listed = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST")
    if not listed:
        return ()
    if "[" not in listed and shutil.which("scontrol") is None:
        return tuple(listed.split(","))
    try:
        run = {"capture_output": True, "text": True, "timeout": 20, "check": True}
        return tuple(subprocess.run(["scontrol", "show", "hostnames", listed], **run).stdout.split())
    except (OSError, subprocess.SubprocessError):
        return ()


def _tasks_here(given: Mapping[str, str]) -> int:
    """Tasks on this node, of a list like "2(x3),1" by node."""
    counts: list[int] = []
    for part in given.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(given.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[-1]
