"""What one process can say of itself and its machine: packages, code, GPUs."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from curvelora_eval.environment import describe_environment
from curvelora_training.preflight.code import hash_of_code
from curvelora_training.preflight.place import Place

GIB = 1 << 30


def describe_node(place: Place) -> dict[str, Any]:
    """Versions, code and hardware of this machine, as plain data; the first process of each node says it."""
    environment = describe_environment()
    versions = environment["versions"] | {"python": platform.python_version(), "CUDA": torch.version.cuda or "none"}
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "host": place.host,
        "node": place.node,
        "versions": versions,
        "commit": environment["commit"],
        "code": hash_of_code(),
        "hardware": environment["hardware"],
        "platform": environment["platform"],
    }


def visible_gpus(own: int | None) -> dict[str, Any]:
    """The GPUs that this process sees: `gpus` (uuid, name, memory, how much of it is in use), `driver`.

    Use is asked of the driver's own library, which needs no memory on the GPU; without it of PyTorch, for the process's own GPU
    alone, and else null.

    Args:
        own: index of the GPU that this process will use.
    """
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [
        {"uuid": str(p.uuid), "name": p.name, "memory_bytes": p.total_memory, "used_bytes": None, "index": i}
        for i, p in enumerate(found)
    ]
    driver = _ask_driver(gpus) if gpus else None
    if own is not None and own < len(gpus) and gpus[own]["used_bytes"] is None:
        free, total = torch.cuda.mem_get_info(own)
        gpus[own]["used_bytes"] = total - free
    return {"gpus": gpus, "driver": driver}


def _ask_driver(gpus: list[dict[str, Any]]) -> str | None:
    """Fill `used_bytes` in, and return the driver's version; neither where the library or a GPU of it cannot be found."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, a container without it
        return None
    try:
        for gpu in gpus:
            try:
                uuid = gpu["uuid"] if gpu["uuid"].startswith(("GPU-", "MIG-")) else f"GPU-{gpu['uuid']}"
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                gpu["used_bytes"] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            except pynvml.NVMLError:  # a slice of a GPU, for one
                continue
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def own_gpu(place: Place) -> int | None:
    """Index of the GPU that this process uses: LOCAL_RANK, or the only one where SLURM shows each task its own. None: no GPU."""
    count = torch.cuda.device_count()
    if count == 0:
        return None
    return 0 if count == 1 and place.local_processes > 1 else place.local_rank


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be. Quotas are not seen."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
