"""What preflight makes of the records of all processes, and what a process knows of its place and its GPUs."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from curvelora.errors import UserError
from curvelora_training.preflight.check import _share_gpus
from curvelora_training.preflight.facts import own_gpu, visible_gpus
from curvelora_training.preflight.judge import GIB, Bounds, judge, judge_reduction
from curvelora_training.preflight.place import Place, find_place
from preflight_world import NODE, places


def job(nodes: int = 2, each: int = 2, gpus: int = 2) -> list[dict[str, Any]]:
    """Good records of a job on machines with GPUs, as `judge` gets them."""
    records = []
    for place in places(nodes, each):
        own = [
            {"uuid": f"{place.host}-{i}", "name": "H100", "memory_bytes": 80 * GIB, "used_bytes": GIB // 2, "index": i}
            for i in range(gpus)
        ]
        node = copy.deepcopy(NODE) | {"gpus": own, "driver": "580.1"}
        folder = {"seen": None, "written": None, "free_bytes": 900 * GIB, "write_bytes_per_second": 5e8}
        first = place.local_rank == 0
        records.append(
            {"rank": place.rank, "host": place.host, "node_index": place.node, "skew": 0.001}
            | {
                "gpu": f"{place.host}-{place.local_rank}",
                "node": node if first else None,
                "folder": folder if first else None,
            }
        )
    return records


REFUSALS = {
    "code": (
        lambda r: r[2]["node"].update(code="d" * 64),
        "n1 has cccccccccccc (commit 0123456789ab); n2 has dddddddddddd",
    ),
    "package missing": (lambda r: r[2]["node"]["versions"].pop("peft"), "peft 0.21.2 on n1, none on n2"),
    "no gpu": (lambda r: r[3].update(gpu=None), "n2 has no GPU for process 3"),
    "one gpu for two": (lambda r: r[3].update(gpu="n2-0"), "processes 2, 3 on n2 would share one GPU"),
    "busy": (
        lambda r: r[2]["node"]["gpus"][1].update(used_bytes=30 * GIB),
        "GPU 1 of n2 is busy: 30.0 of 80 GiB are in use",
    ),
    "not writable": (
        lambda r: r[2]["folder"].update(written="Permission denied"),
        "n2 cannot write the run folder: Permission",
    ),
    "not shared": (
        lambda r: r[2]["folder"].update(seen="No such file", written="No such file"),
        "n2 does not see what n1",
    ),
    "not made": (
        lambda r: [x["folder"].update(seen="full", written="full") for x in (r[0], r[2])],
        "n1 cannot write the run",
    ),
    "disk": (lambda r: r[2]["folder"].update(free_bytes=GIB), "the run folder has 1.0 GiB of free space on n2"),
    "clock behind": (lambda r: r[2].update(skew=-3.5), "the clock of n2 is 3.5 s behind that of n1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_one_difference_is_one_reason(name: str) -> None:
    records, (damage, part) = job(), REFUSALS[name]
    assert judge(records, Bounds(gpus=2)).refusals == []
    damage(records)
    verdict = judge(records, Bounds(gpus=2))
    assert len(verdict.refusals) == 1 and part in verdict.refusals[0], verdict.refusals
    assert verdict.reducible is (name not in ("package missing", "no gpu", "one gpu for two", "busy"))


def test_gpus_that_were_asked_for_and_are_not_there() -> None:
    refusals = judge(job(), Bounds(gpus=8)).refusals
    assert [text.split(":")[0] for text in refusals] == [
        f"{host} shows 2 GPUs and 8 were asked for (--expect-gpus)" for host in ("n1", "n2")
    ]
    assert judge(job(), Bounds(gpus=2)).refusals == judge(job(gpus=3), Bounds()).refusals == []


def test_what_is_slow_or_odd_is_a_warning_only() -> None:
    records = job()
    records[2]["node"].update(driver="550.0")
    records[2]["node"]["gpus"][0].update(name="A100")
    records[2]["folder"].update(write_bytes_per_second=3e6)
    verdict = judge(records, Bounds())
    assert verdict.refusals == [] and verdict.reducible
    for part in ("the GPU drivers differ: 580.1 on n1, 550.0 on n2", "the GPUs differ", "n2 writes 3 MB/s"):
        assert sum(part in text for text in verdict.warnings) == 1
    slow = {"wrong": None, "bus_bytes_per_second": 2e8}
    measured = {rank: {"all": [slow], "node": [slow]} for rank in range(4)}
    measured[0]["across"] = measured[2]["across"] = [slow]
    hosts = [record["host"] for record in records]
    warnings = judge_reduction(measured, hosts, on_gpus=True).warnings
    assert len(warnings) == 3 and sum("across nodes moves 0.2 GB/s" in text for text in warnings) == 1
    assert judge_reduction(measured, hosts, on_gpus=False).warnings == []


class Driver:
    """The driver's library on a machine with two GPUs, of which it cannot name the second (a slice of one, say)."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-a":
            raise self.NVMLError
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=3 * GIB)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"


def test_what_is_asked_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process reads its own GPU where the driver's library does not know it; the first one puts a node's together."""
    properties = [SimpleNamespace(uuid=uuid, name="H100", total_memory=80 * GIB) for uuid in "ab"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: properties[i])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda i: (70 * GIB, 80 * GIB))
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    seen = [visible_gpus(own) for own in (0, 1)]
    assert [[gpu["used_bytes"] for gpu in found["gpus"]] for found in seen] == [[3 * GIB, None], [3 * GIB, 10 * GIB]]
    assert seen[0]["driver"] == "580.1"
    assert [own_gpu(place) for place in places(1, 2)] == [0, 1]
    records = [
        {"node_index": 0, "node": {"code": "c"} if rank == 0 else None, **found}
        for rank, found in enumerate(copy.deepcopy(seen))
    ]
    records[1]["gpus"][0]["used_bytes"] = 4 * GIB  # a reading after preflight itself has begun to use it
    _share_gpus(records)
    assert [gpu["used_bytes"] for gpu in records[0]["node"]["gpus"]] == [3 * GIB, 10 * GIB]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # SLURM shows each task its own
    assert [own_gpu(place) for place in places(1, 2)] == [0, 0]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert own_gpu(Place()) is None and visible_gpus(None) == {"gpus": [], "driver": None}


TORCHRUN = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"},
    **{"MASTER_ADDR": "n1", "MASTER_PORT": "23456", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "7"},
}
DEEPSPEED = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
    **{"MASTER_ADDR": "n1", "MASTER_PORT": "23456"},
}
SRUN = {
    **{"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
    **{"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "n1,n2", "SLURM_JOB_ID": "123456"},
}


@pytest.mark.parametrize("given", [TORCHRUN, DEEPSPEED, SRUN], ids=["torchrun", "deepspeed", "srun"])
def test_every_launcher_says_where_a_process_stands(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    place = find_place(given)
    assert (place.rank, place.processes, place.local_rank, place.local_processes, place.node) == (5, 8, 1, 4, 1)
    assert place.address == "n1" and place.served is (given is TORCHRUN)
    assert place.port == (20000 + 3456 if given is SRUN else 23456)
    assert place.nodes == (("n1", "n2") if given is SRUN else ())


def test_no_launcher_is_one_process_and_half_of_one_an_error() -> None:
    assert find_place({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}).processes == 1, "a batch script is no step"
    with pytest.raises(UserError, match="WORLD_SIZE is not set"):
        find_place({"RANK": "0"})
    with pytest.raises(UserError, match="LOCAL_RANK is 'x', and no number"):
        find_place(TORCHRUN | {"LOCAL_RANK": "x"})
