"""The preflight itself, in order: all come, say what they have, look at the run folder and the clocks, and reduce a tensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from curvelora.errors import UserError
from curvelora_training.preflight.allreduce import SIZES, measure
from curvelora_training.preflight.clocks import clock_skew
from curvelora_training.preflight.code import changed_code
from curvelora_training.preflight.facts import describe_node, own_gpu, visible_gpus
from curvelora_training.preflight.folder import PATIENCE, SAMPLE, look_at_folder
from curvelora_training.preflight.judge import Bounds, Verdict, judge, judge_reduction
from curvelora_training.preflight.meeting import Meeting
from curvelora_training.preflight.place import Place
from curvelora_training.preflight.rings import close_rings, deadline, open_rings


@dataclass(frozen=True)
class Asked:
    """What is to be checked.

    Attributes:
        sizes: bytes of the all-reduces; None: `SIZES` of the device.
        sample: bytes that each node writes.
        patience: seconds until a file of another node has to be there.
    """

    folder: Path | None = None
    bounds: Bounds = field(default_factory=Bounds)
    sizes: tuple[int, ...] | None = None
    sample: int = SAMPLE
    patience: float = PATIENCE


@dataclass
class Machine:
    """Where this process's facts come from; tests give other ones."""

    describe: Callable[[Place], dict[str, Any]] = describe_node
    gpu: Callable[[Place], int | None] = own_gpu
    gpus: Callable[[int | None], dict[str, Any]] = visible_gpus
    clock: Callable[[], float] = time.time
    rings: Callable[..., dict[str, Any]] = open_rings


@dataclass
class Found:
    """What came of it, on the first process. `records` are those of `judge`; `reduced` is rank -> ring -> measurements."""

    records: list[dict[str, Any]]
    verdict: Verdict
    reduced: dict[int, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)

    @property
    def leaders(self) -> list[dict[str, Any]]:
        """The records of the first process of each node."""
        return [record for record in self.records if record["node"]]


def check(meeting: Meeting, asked: Asked, machine: Machine) -> tuple[bool, Found | None]:
    """Whether the job may begin, on every process; what was found, on the first one. Every process calls it.

    Raises:
        UserError: on every process that is there, where one does not come or stops answering; naming it.
    """
    meeting.call_the_roll()
    place = meeting.place
    record = _describe(place, machine)
    record["skew"] = clock_skew(meeting, machine.clock)
    record["folder"] = None
    if asked.folder is not None:
        record["folder"] = look_at_folder(meeting, asked.folder, asked.sample, asked.patience)
    records = meeting.gather("record", record)
    found, plan = None, None
    if records is not None:
        _name_nodes(records)
        _share_gpus(records)
        found = Found(records, judge(records, asked.bounds))
        found.verdict.refusals[:0] = (errors := _errors(records))
        if asked.folder is not None and found.leaders and (why := changed_code(asked.folder, found.leaders[0]["node"]["code"])):
            found.verdict.warnings.append(why)
        plan = {
            "reduce": found.verdict.reducible and not errors,
            "nodes": _by_node(records),
            "cuda": all(record["gpu"] for record in records),
        }
    plan = meeting.announce("plan", plan)
    if plan["reduce"] and place.processes > 1:
        own = _reduce(meeting, asked, machine, plan)
        reduced = meeting.gather("reduced", own)
        if found is not None:
            found.reduced = dict(enumerate(reduced))
            more = judge_reduction(found.reduced, [record["host"] for record in records], plan["cuda"])
            found.verdict.refusals += more.refusals
            found.verdict.warnings += more.warnings
    return meeting.announce("verdict", found and not found.verdict.refusals), found


def _describe(place: Place, machine: Machine) -> dict[str, Any]:
    """This process's record; an error becomes one of its fields, so that nobody waits for it."""
    record: dict[str, Any] = {"rank": place.rank, "host": place.host, "node_index": place.node}
    record |= {"gpu": None, "gpus": [], "driver": None, "node": None, "error": None}
    try:
        index = machine.gpu(place)
        record |= machine.gpus(index)
        record["gpu"] = record["gpus"][index]["uuid"] if index is not None and index < len(record["gpus"]) else None
        record["node"] = machine.describe(place) if place.local_rank == 0 else None
    except Exception as error:  # a driver that is broken has errors of every class
        record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return record


def _errors(records: list[dict[str, Any]]) -> list[str]:
    found = [
        f"{record['host']} (process {record['rank']}) cannot say what it has: {record['error']}"
        for record in records
        if record["error"]
    ]
    described = {record["node_index"] for record in records if record["node"] or record["error"]}
    lacking = {record["node_index"]: record["host"] for record in records if record["node_index"] not in described}
    return found + [f"{host} has no process with LOCAL_RANK 0, which describes it" for host in lacking.values()]


def _name_nodes(records: list[dict[str, Any]]) -> None:
    """Add the node's index to names that two nodes have."""
    pairs = {(record["host"], record["node_index"]) for record in records}
    names = [host for host, _ in pairs]
    for record in records:
        if names.count(record["host"]) > 1:
            record["host"] += f" (node {record['node_index']})"


def _share_gpus(records: list[dict[str, Any]]) -> None:
    """Put all GPUs that a node's processes see into the record of its first one: SLURM may show each task one only."""
    for leader in [record for record in records if record["node"]]:
        gpus: dict[str, dict[str, Any]] = {}
        for record in records:
            for gpu in record["gpus"] if record["node_index"] == leader["node_index"] else ():
                known = gpus.setdefault(gpu["uuid"], gpu | {"index": len(gpus)})
                # what others use is in every reading, what preflight itself takes only in the later ones
                readings = [use for use in (known["used_bytes"], gpu["used_bytes"]) if use is not None]
                known["used_bytes"] = min(readings, default=None)
        leader["node"] |= {"gpus": list(gpus.values()), "driver": leader["driver"]}


def _by_node(records: list[dict[str, Any]]) -> list[list[int]]:
    nodes: dict[int, list[int]] = {}
    for record in records:
        nodes.setdefault(record["node_index"], []).append(record["rank"])
    return list(nodes.values())


def _reduce(meeting: Meeting, asked: Asked, machine: Machine, plan: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """ring -> measurements of this process. Where it takes longer than the time-out, the process ends."""
    place = meeting.place
    device = torch.device("cuda", machine.gpu(place)) if plan["cuda"] else torch.device("cpu")
    watching = meeting.watcher()

    def why() -> str | None:
        if not meeting.first:
            return None
        late = watching.absent("reducing")
        who = meeting.named(late) if late else "all have begun it, so a link or the network between them does not work"
        hint = "; NCCL_DEBUG=INFO shows where NCCL waits" if plan["cuda"] else ""
        return f"the all-reduce did not end within {meeting.seconds:g} s: {who}{hint}"

    try:
        with deadline(meeting.seconds, why):
            if plan["cuda"]:
                torch.cuda.set_device(device)
            meeting.store.set(f"reducing/{place.rank}", "1")
            rings = machine.rings(place, meeting.store, device, plan["nodes"], meeting.seconds + 60)
            sizes = asked.sizes or SIZES[device.type]
            return {name: measure(ring, sizes if name == "all" else sizes[-1:], device) for name, ring in rings.items()}
    except RuntimeError as error:
        why_not = " ".join(str(error).split())[:300]
        raise UserError(f"the all-reduce failed on {place.host} (process {place.rank}): {why_not}") from error
    finally:
        close_rings()
