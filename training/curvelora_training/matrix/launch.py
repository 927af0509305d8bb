"""Start launchers, watch what they print, and end what hangs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

FINETUNE = "curvelora_training.finetune"
ERROR = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception): .*)")
GRACE = 20  # seconds from being asked to end until being ended


def torchrun(processes: int) -> list[str]:
    """Start of a command line."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def command_line(launcher: str, engine: str, configs: Path, processes: int) -> list[str]:
    """How a user starts fine-tuning with this launcher, before the recipe and its overrides.

    DeepSpeed comes from the Accelerate file with `accelerate`, and from the recipe's `training.deepspeed` with the others.
    """
    count = str(processes)
    if launcher == "torchrun":
        return [*torchrun(processes), "-m", FINETUNE]
    if launcher == "accelerate":
        start = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
        return [
            *start,
            "--num_processes",
            count,
            "--config_file",
            str(configs / f"accelerate_{engine}.yaml"),
            "-m",
            FINETUNE,
        ]
    with socket.socket() as probe:  # deepspeed's launcher takes port 29500 where none is named
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", count, "--master_port", port]
    return [*start, "--module", FINETUNE]


def watch(command: list[str], log: Path, folder: Path, limit: float, line: Callable[[str], None]) -> int | None:
    """Run `command` in `folder` with its output in `log`; returns its exit code, or None where it was ended.

    Args:
        limit: seconds that may pass without a new line of output.
        line: is told every line.
    """
    cpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"} | cpu
    with log.open("w", encoding="utf-8") as output, log.open(encoding="utf-8", errors="replace") as shown:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            heard = time.monotonic()
            while True:
                code = process.poll()  # before reading, so that the last lines are read as well
                for text in shown:
                    heard = time.monotonic()
                    line(text.rstrip("\n"))
                if code is not None:
                    return code
                if time.monotonic() - heard > limit:
                    return None
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a launcher and what it started, which is a process group of its own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()


def tail(log: Path, lines: int = 30) -> str:
    """The end of a log, and the last error that Python named in it, which torchrun's own summary hides."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [found[1] for line in text if (found := ERROR.match(line)) and "ChildFailedError" not in line]
    return "\n".join([*text[-lines:], *errors[-1:]])
