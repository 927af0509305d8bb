"""What the records of all processes amount to: reasons to refuse, and warnings. Plain data in, sentences out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

GIB = 1 << 30
BUSY = 2 * GIB  # bytes of a GPU in use; the driver's own and an empty context are below it
SLOW_DISK = 50e6  # bytes a second
SLOW_LINKS = {"node": 10e9, "across": 1e9}  # bytes a second of bus bandwidth, GPUs only: no NVLink or PCIe 4, no 10 GbE
SHOWN = 4  # differences in a sentence


@dataclass
class Verdict:
    """Attributes: refusals and warnings, a sentence each; `reducible`: whether it makes sense to try the all-reduce."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    reducible: bool = True


@dataclass(frozen=True)
class Bounds:
    """What is asked for: GPUs a node (None: one a process where there are any), free bytes, seconds between clocks."""

    gpus: int | None = None
    disk_bytes: int = 5 * GIB
    skew: float = 2.0


def judge(records: list[dict[str, Any]], bounds: Bounds) -> Verdict:
    """Judge what processes found out by themselves.

    Args:
        records: in order of rank, each with `host`, `rank`, `node_index`, `gpu` (uuid or null), `skew`, and for the first of a
            node `node` (from `describe_node`, with the `gpus` and `driver` of the node) and `folder` (from `look_at_folder`;
            null where none was named).
    """
    verdict = Verdict()
    leaders = [record for record in records if record["node"]]
    for check in (_same_code, _same_versions, _gpus):
        before = len(verdict.refusals)
        check(verdict, leaders, records, bounds)
        # with other versions of NCCL, or without a GPU, the all-reduce hangs or ends in an error that says less
        verdict.reducible &= check is _same_code or len(verdict.refusals) == before
    _folder(verdict, leaders, bounds)
    _clocks(verdict, leaders, bounds)
    return verdict


def _same_code(verdict: Verdict, leaders: list, records: list, bounds: Bounds) -> None:
    groups = _groups(leaders, lambda leader: (leader["node"]["code"], leader["node"]["commit"]), by=0)
    if len(groups) > 1:
        said = "; ".join(
            f"{_hosts(hosts)} {'have' if len(hosts) > 1 else 'has'} {code[:12]} (commit {commit or 'unknown'})"
            for (code, commit), hosts in groups.items()
        )
        verdict.refusals.append(
            f"the code differs between nodes (sha256 of the packages' files): {said}: install the same everywhere, or run from a "
            "shared folder"
        )


def _same_versions(verdict: Verdict, leaders: list, records: list, bounds: Bounds) -> None:
    names = sorted({name for leader in leaders for name in leader["node"]["versions"]})
    different = []
    for name in names:
        groups = _groups(leaders, lambda leader, name=name: (leader["node"]["versions"].get(name, "none"),))
        if len(groups) > 1:
            different.append(
                name + " " + ", ".join(f"{value} on {_hosts(hosts)}" for (value,), hosts in groups.items())
            )
    if different:
        more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        verdict.refusals.append(
            f"versions differ between nodes: {'; '.join(different[:SHOWN])}{more}: use the same environment everywhere"
        )
    drivers = _groups(leaders, lambda leader: (leader["node"]["driver"],))
    if len(drivers) > 1:
        said = ", ".join(f"{driver or 'none'} on {_hosts(hosts)}" for (driver,), hosts in drivers.items())
        verdict.warnings.append(f"the GPU drivers differ: {said}")


def _gpus(verdict: Verdict, leaders: list, records: list, bounds: Bounds) -> None:
    any_gpu = any(leader["node"]["gpus"] for leader in leaders)
    for leader in leaders:
        host, gpus = leader["host"], leader["node"]["gpus"]
        own = [record for record in records if record["node_index"] == leader["node_index"]]
        seen = len(gpus)
        if bounds.gpus is not None and seen < bounds.gpus:
            verdict.refusals.append(
                f"{host} shows {seen} GPU{'s' * (seen != 1)} and {bounds.gpus} were asked for (--expect-gpus): look at "
                "nvidia-smi there, and at what SLURM and CUDA_VISIBLE_DEVICES leave of them"
            )
        elif any_gpu and bounds.gpus != 0 and (without := [record["rank"] for record in own if not record["gpu"]]):
            verdict.refusals.append(
                f"{host} has no GPU for process {', '.join(map(str, without))}: {len(own)} processes run there and {seen} "
                f"GPU{'s' * (seen != 1)} can be seen; start one process a GPU"
            )
        shared = [uuid for uuid, count in Counter(r["gpu"] for r in own if r["gpu"]).items() if count > 1]
        for uuid in shared:
            ranks = ", ".join(str(record["rank"]) for record in own if record["gpu"] == uuid)
            verdict.refusals.append(f"processes {ranks} on {host} would share one GPU: start one process a GPU")
        for gpu in gpus:
            if (gpu["used_bytes"] or 0) > BUSY:
                verdict.refusals.append(
                    f"GPU {gpu['index']} of {host} is busy: {gpu['used_bytes'] / GIB:.1f} of {gpu['memory_bytes'] / GIB:.0f} GiB "
                    "are in use; end what runs there (nvidia-smi), or leave that node out"
                )
    names = _groups(leaders, lambda leader: (tuple(sorted({gpu["name"] for gpu in leader["node"]["gpus"]})),))
    if len(names) > 1:
        said = "; ".join(f"{' and '.join(kinds) or 'none'} on {_hosts(hosts)}" for (kinds,), hosts in names.items())
        verdict.warnings.append(f"the GPUs differ: {said}; the slowest sets the pace")


def _folder(verdict: Verdict, leaders: list, bounds: Bounds) -> None:
    for leader in leaders:
        host, folder = leader["host"], leader["folder"]
        if folder is None:
            continue
        if leader["rank"] == 0 and folder["written"] and folder["seen"] == folder["written"]:
            verdict.refusals.append(f"{host} cannot write the run folder: {folder['written']}")
            return  # nobody else could see anything there
        if folder["seen"]:
            verdict.refusals.append(
                f"{host} does not see what {leaders[0]['host']} writes into the run folder: {folder['seen']}; name a folder on a "
                "file system that all nodes share"
            )
            continue
        if folder["written"]:
            verdict.refusals.append(f"{host} cannot write the run folder: {folder['written']}")
        free, rate = folder["free_bytes"], folder["write_bytes_per_second"]
        if free is not None and free < bounds.disk_bytes:
            verdict.refusals.append(
                f"the run folder has {free / GIB:.1f} GiB of free space on {host}, and --min-disk asks for "
                f"{bounds.disk_bytes / GIB:.1f}: make room, or name another output"
            )
        if rate is not None and rate < SLOW_DISK:
            verdict.warnings.append(
                f"{host} writes {rate / 1e6:.0f} MB/s into the run folder: saving will take its time"
            )


def _clocks(verdict: Verdict, leaders: list, bounds: Bounds) -> None:
    for leader in leaders:
        if abs(leader["skew"]) > bounds.skew:
            side = "ahead of" if leader["skew"] > 0 else "behind"
            verdict.refusals.append(
                f"the clock of {leader['host']} is {abs(leader['skew']):.1f} s {side} that of {leaders[0]['host']}, and "
                f"{bounds.skew:g} s are allowed (--max-skew): set the clocks (chrony, ntpd)"
            )


def judge_reduction(measured: dict[int, dict[str, list[dict[str, Any]]]], hosts: list[str], on_gpus: bool) -> Verdict:
    """Judge the all-reduces.

    Args:
        measured: rank -> ring -> from `measure`, of all processes.
        hosts: by rank.
    """
    verdict = Verdict()
    for rank, rings in measured.items():
        for ring, results in rings.items():
            if wrong := next((result["wrong"] for result in results if result["wrong"]), None):
                verdict.refusals.append(
                    f"the all-reduce ({RINGS[ring]}) is wrong on process {rank} ({hosts[rank]}): {wrong}; a GPU, a link or the "
                    "network is broken: leave that node out"
                )
    slow = {(ring, hosts[rank] if ring == "node" else ""): results[-1]["bus_bytes_per_second"]
            for rank, rings in measured.items() for ring, results in rings.items() if ring in SLOW_LINKS}  # fmt: skip
    for (ring, host), rate in slow.items():
        if on_gpus and rate < SLOW_LINKS[ring]:
            where = f"within {host}" if host else "across nodes"
            hint = (
                "peer access or NVLink is off"
                if host
                else "NCCL may use the wrong network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
            )
            verdict.warnings.append(f"the all-reduce {where} moves {rate / 1e9:.1f} GB/s: {hint}")
    return verdict


RINGS = {"all": "all processes", "node": "within a node", "across": "across nodes"}


def _groups(leaders: list, key: Any, by: int | None = None) -> dict[tuple, list[str]]:
    """key -> hosts, the most frequent first; with `by` keys that agree at this index are one."""
    found: dict[tuple, list[str]] = {}
    for leader in leaders:
        value = key(leader)
        same = next((k for k in found if by is not None and k[by] == value[by]), value)
        found.setdefault(same, []).append(leader["host"])
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _hosts(hosts: Iterable[str]) -> str:
    """The names, the first few of many."""
    names = list(dict.fromkeys(hosts))
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
