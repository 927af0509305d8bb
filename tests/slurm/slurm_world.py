"""A real SLURM of three nodes, and jobs on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from curvelora_training.launch.job import Job
from curvelora_training.launch.render import render

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = HERE / "cluster.sh"
BIN = Path(sys.executable).parent
STATE = Path(os.environ.get("SLURMCI_STATE", "/run/slurmci"))  # where `cluster.sh` keeps all
SMALL = STATE / "small"  # a file system of 1 MB
NODES = ("n1", "n2", "n3")
# how a daemon ends that fails by itself, or is killed where memory is short; our scripts send others of the signals
FAULTS = tuple(
    f"(code {128 + signal.Signals[name]})" for name in ("SIGILL", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGSEGV")
)
PATIENCE = 240.0  # seconds for anything to happen; a busy machine imports our libraries in 30
Made = TypeVar("Made")


class Cluster:
    """The cluster of `cluster.sh`."""

    def __init__(self) -> None:
        self.touched: set[str] = set()
        """Nodes that are off or unplugged."""

    def control(self, *arguments: str) -> str:
        """What `cluster.sh ARGUMENTS` prints."""
        done = subprocess.run(
            [str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
        )
        assert done.returncode == 0, f"cluster.sh {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, in the repository."""
        settings = [f"{name}={value}" for name, value in variables.items()]
        return subprocess.run(
            [str(SCRIPT), "run", "env", *settings, *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=ROOT,
        )

    def deaths(self) -> list[str]:
        """A line for each time that a daemon died unasked, and was started again."""
        return [line for path in sorted(STATE.glob("n*.died")) for line in path.read_text("utf-8").splitlines()]

    def faults(self) -> int:
        """How many of them our scripts cannot have caused."""
        return sum(line.endswith(FAULTS) for line in self.deaths())

    def undisturbed(self, make: Callable[[], Made]) -> Made:
        """What `make` returns for tests to share, made once more where a daemon failed: a rerun would get the same again."""
        before = self.faults()
        try:
            made = make()
            if self.faults() == before:
                return made
        except AssertionError:
            if self.faults() == before:
                raise
        self.restore()
        return make()

    def crash(self, node: str) -> None:
        """Power a node off: all of its processes are gone at once."""
        self.touched.add(node)
        self.control("node-crash", node)

    def kill_daemon(self, node: str) -> None:
        """Kill slurmd alone; what it started lives on, unheard of by SLURM."""
        self.touched.add(node)
        self.control("slurmd-kill", node)

    def unplug(self, node: str) -> None:
        """Take a node off the network."""
        self.touched.add(node)
        self.control("unplug", node)

    def restore(self) -> None:
        """No jobs, and all nodes as new."""
        self.run("scancel", "--user=root")
        self._power_cycle()
        until(lambda: not self.run("squeue", "-h").stdout.strip(), "the queue is empty", self.words)
        try:
            until(lambda: not self._busy(), "all nodes are idle", self.words, 60)
        except AssertionError:  # drained, or with a daemon that hangs: not for the next test to suffer from
            self.touched |= (lost := self._busy())
            self._power_cycle()
            for node in lost:
                self.run("scontrol", "update", f"nodename={node}", "state=resume")  # refused where it is not drained
            until(lambda: not self._busy(), "all nodes are idle", self.words)

    def _power_cycle(self) -> None:
        for node in self.touched:
            self.control("plug", node)
            self.control("node-crash", node)
            self.control("node-start", node)
        self.touched.clear()

    def _busy(self) -> set[str]:
        """Nodes that are not idle, or whose daemon has not come back (-r); `-t idle` would take drained ones for idle."""
        shown = self.run("sinfo", "-hNr", "-p", "main", "-o", "%N %t").stdout.splitlines()
        return set(NODES) - {line.split()[0] for line in shown if line.split()[1] == "idle"}

    def words(self) -> str:
        """The state of nodes and queue, why nodes are down, and which daemons died, for messages."""
        shown = [self.run(*command.split()).stdout for command in ("sinfo -N -l", "sinfo -R", "squeue -l")]
        return "\n".join([*shown, *self.deaths()])

    def submit(self, job: Job, **variables: str) -> Submitted:
        """Render and submit a job.

        Args:
            **variables: of its environment.
        """
        run = Path(job.output)
        (run / "logs").mkdir(parents=True, exist_ok=True)
        (run / "launch").mkdir(exist_ok=True)
        script = run / "launch/job.sbatch"
        script.write_text(render(job), encoding="utf-8")
        # what a user's login shell would have
        settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PREFLIGHT": "0", "LEAVING": "2"}
        settings["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        done = self.run("sbatch", "--parsable", str(script), **settings | variables)
        assert done.returncode == 0, done.stderr
        return Submitted(self, done.stdout.strip(), run)


class Submitted:
    """A job in the queue, or out of it."""

    def __init__(self, cluster: Cluster, number: str, run: Path) -> None:
        self.cluster = cluster
        self.number = number
        self.run = run
        self.since = time.monotonic()

    def fact(self, name: str) -> str:
        """A field of `scontrol show job`, such as JobState."""
        shown = self.cluster.run("scontrol", "show", "job", "-o", self.number).stdout.split()
        return next((word.partition("=")[2] for word in shown if word.startswith(f"{name}=")), "")

    def signal(self, name: str, *where: str) -> None:
        """`scancel --signal=NAME WHERE... JOB`."""
        done = self.cluster.run("scancel", f"--signal={name}", *where, self.number)
        assert done.returncode == 0, done.stderr

    def reaches(self, step: int) -> None:
        """Wait until training has logged this step."""

        def reached() -> bool:
            lines = (
                (self.run / "metrics.jsonl").read_text("utf-8").splitlines()
                if (self.run / "metrics.jsonl").exists()
                else []
            )
            return any(f'"step": {step},' in line for line in lines)

        until(reached, f"step {step}", self.words)

    def ends(self) -> str:
        """Wait for the end of the job, over all of its attempts; its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        until(lambda: self.fact("JobState") in over, "the job is over", self.words, PATIENCE * 2)
        return self.fact("JobState")

    def attempts(self) -> list[dict[str, Any]]:
        """The lines of attempts.jsonl."""
        path = self.run / "launch/attempts.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def outcomes(self) -> list[tuple[int, int, str]]:
        """Restart count, exit code and why, of every attempt that came to its own end."""
        return [(line["restart"], line["code"], line["why"]) for line in self.attempts() if line["event"] == "end"]

    def words(self) -> str:
        """The ends of all logs, for messages."""
        logs = sorted((self.run / "logs").glob("*"))
        ends = [f"--- {log.name}\n{log.read_text('utf-8', errors='replace')[-1500:]}" for log in logs]
        return "\n".join([*ends, "--- cluster", self.cluster.words()])


def until(happened: Callable[[], Any], what: str, words: Callable[[], str] = str, patience: float = PATIENCE) -> None:
    """Wait for something; fails with what was waited for and with `words()`."""
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < patience, f"waited {patience:.0f} s until {what}\n{words()}"
        time.sleep(0.3)
