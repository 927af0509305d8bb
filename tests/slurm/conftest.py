"""A SLURM cluster for the session; every test gets it with all nodes idle."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from curvelora_training.launch.job import Job
from slurm_world import HERE, SCRIPT, Cluster

FAULTS = pytest.StashKey[int]()  # of SLURM's daemons before the test


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[FAULTS] = Cluster().faults()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that fails while a daemon of SLURM dies by a fault of its own is run once more: it says nothing of our script."""
    for item in items:
        if item.path.parent == HERE and item.path.name != "test_cluster.py":
            item.add_marker(pytest.mark.flaky(reruns=1, condition=a_daemon_failed_in(item)))


def a_daemon_failed_in(item: pytest.Item) -> Callable[[], bool]:
    return lambda: Cluster().faults() > item.stash[FAULTS]


DIED: list[str] = []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which daemons died, where a test passed too; `test_cluster.py` lets one die."""
    for line in DIED:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def powered() -> Iterator[Cluster]:
    """The cluster, up for the session; one that was up before stays up."""
    if os.geteuid() != 0:
        pytest.skip("the SLURM cluster of the tests needs root: it makes network namespaces and starts daemons")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        pytest.skip("the SLURM cluster of the tests needs SLURM, or a Debian-like system to install it on")
    was_up = subprocess.run([SCRIPT, "status"], capture_output=True, check=False).returncode == 0
    up = subprocess.run([SCRIPT, "up"], capture_output=True, text=True, timeout=300, check=False)
    assert up.returncode == 0, up.stdout + up.stderr
    yield Cluster()
    DIED.extend(Cluster().deaths())
    if not was_up:
        subprocess.run([SCRIPT, "down"], capture_output=True, timeout=60, check=False)


@pytest.fixture
def cluster(powered: Cluster) -> Iterator[Cluster]:
    """The cluster, with nothing on it, before and after."""
    yield powered
    powered.restore()


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """`job(launcher="deepspeed")`: a job of two nodes with one CPU process each."""

    def make(**changes: Any) -> Job:
        settings: dict[str, Any] = {"name": "test", "recipe": "unused.yaml", "output": str(tmp_path / "run")}
        settings |= {"nodes": 2, "gpus_per_node": 0, "processes_per_node": 1, "time": "10", "warning_seconds": 60}
        return Job(**settings | changes)

    return make
