"""The cluster that the other tests here run on."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from slurm_world import SCRIPT, STATE, Cluster, until

pytestmark = pytest.mark.slurm


def test_a_daemon_that_dies_is_started_again_and_leaves_a_line(cluster: Cluster) -> None:
    before, faults = cluster.deaths(), cluster.faults()
    cluster.control("slurmd-crash", "n2")
    until(lambda: len(cluster.deaths()) > len(before), "the death is noticed", cluster.words)
    (line,) = [line for line in set(cluster.deaths()) - set(before) if "n2" in line]
    assert line.endswith("slurmd of n2 died unasked (code 139)") and cluster.faults() > faults

    def runs() -> bool:
        return cluster.run("srun", "--nodelist=n2", "--ntasks=1", "hostname").stdout.strip() == "n2"

    until(runs, "n2 runs something", cluster.words, 60)


def test_what_a_killed_one_left_is_not_in_the_way(powered: Cluster) -> None:
    """As where tests are killed with all that they started: namespaces and files outlive the processes."""
    state = STATE.with_name(f"{STATE.name}-second")  # not below tmp_path: munged wants folders that all can enter
    second = os.environ | {"SLURMCI_NAME": "second", "SLURMCI_STATE": str(state), "SLURMCI_NODES": "1"}

    def control(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = second | variables
        return subprocess.run(
            [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    try:
        assert (first := control("up")).returncode == 0, first.stderr
        started = [int((state / f"{name}.pid").read_text("utf-8")) for name in ("ctl", "n1", "munged")]
        for process in started:
            os.kill(process, signal.SIGKILL)
        assert control("run", "hostname").returncode != 0
        elsewhere = control("up", SLURMCI_STATE=str(SCRIPT.parent))
        assert elsewhere.returncode == 1 and "has other files: set SLURMCI_STATE" in elsewhere.stderr
        assert (again := control("up")).returncode == 0, again.stderr
        other = control("up", SLURMCI_STATE=f"{state}-other")
        assert other.returncode == 1 and "is another cluster's: set SLURMCI_NAME" in other.stderr
        shown = control("run", "srun", "--ntasks=1", "hostname")
        assert shown.stdout.strip() == "n1", shown.stderr
    finally:
        assert (gone := control("down")).returncode == 0, gone.stderr
    assert not state.exists()
