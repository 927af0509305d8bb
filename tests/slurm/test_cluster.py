"""The cluster that the other tests here run on."""

from __future__ import annotations

import pytest

from slurm_world import Cluster, until

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
