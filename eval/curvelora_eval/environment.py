"""Where a number was measured: versions, hardware and commit, for every result file."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("curvelora", "curvelora-eval", "curvelora-training"),
    *("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets", "evaluate"),
)


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, commit and Python version, as plain data."""
    return {
        "versions": {name: found for name in PACKAGES if (found := installed_version(name))},
        "hardware": _hardware(),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
    }


def installed_version(package: str) -> str | None:
    """Version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpus[0].name if gpus else None,
        "gpus": len(gpus),
        "gpu_memory_bytes": gpus[0].total_memory if gpus else None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the source tree that this package runs from, with "+" where the tree has changes; None outside git.

    Where there is no repository (an image, a copied tree), CURVELORA_COMMIT says it.
    """
    if stated := os.environ.get("CURVELORA_COMMIT"):
        return stated
    here = Path(__file__).parent
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        # an installed copy may lie inside somebody else's repository (a virtual environment in a project folder)
        if not subprocess.run(["git", "ls-files", "--", Path(__file__).name], **run).stdout.strip():
            return None
        return commit + ("+" if subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
