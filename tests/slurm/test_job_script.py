"""The job script on a real SLURM, with a stand-in for training: exit codes, bounds, ports, signals, what is written down.

Each job takes a few seconds, as nothing imports torch here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvelora_training.launch.job import LAUNCHERS, Job
from curvelora_training.launch.render import render
from slurm_world import BIN, HERE, Cluster, Submitted, until

pytestmark = pytest.mark.slurm


# name -> plan (see stand_in.py) and what else the job has. SLURM takes 6 s to start a job again, so these wait together.
STARTED_AGAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "stopped": ("75 75 0", {}),
    "bounded": ("75", {"max_requeues": 1}),
    "crashes": ("1 save+1 1 1 1", {}),
    "warned through the script": ("listen 0", {}),
    "warned past the script": ("listen 0", {}),
}


def submit_plan(cluster: Cluster, job: Job, plan: str) -> Submitted:
    path = os.pathsep.join([str(HERE / "bin"), os.environ["PATH"]])
    return cluster.submit(job, PLAN=plan, PATH=path)


def listens(job: Submitted) -> None:
    """Wait until both processes handle the signal."""
    until(lambda: len(list(job.run.glob("listening-*"))) == 2, "training listens", job.words)


@pytest.fixture
def stand_in(cluster: Cluster, job: Callable[..., Job]) -> Callable[..., Submitted]:
    """`stand_in("75 0")` submits a job whose training follows the plan."""

    def submit(plan: str, overrides: tuple[str, ...] = (), **changes: object) -> Submitted:
        return submit_plan(cluster, job(module="stand_in", overrides=overrides, **changes), plan)

    return submit


@pytest.fixture(scope="module")
def started_again(powered: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Submitted]:
    """The jobs of `STARTED_AGAIN` when all of them are over."""
    settings: dict[str, Any] = {"recipe": "unused.yaml", "nodes": 2, "gpus_per_node": 0, "processes_per_node": 1}
    settings |= {"module": "stand_in", "time": "10", "warning_seconds": 60}

    def make() -> dict[str, Submitted]:
        jobs = {}
        for name, (plan, more) in STARTED_AGAIN.items():
            word = name.replace(" ", "_")
            made = Job(name=word, output=str(tmp_path_factory.mktemp("again") / word), **settings | more)
            jobs[name] = submit_plan(powered, made, plan)
        for name, where in (("warned through the script", ["--batch"]), ("warned past the script", [])):
            listens(jobs[name])
            jobs[name].signal("USR1", *where)
        for job in jobs.values():
            job.ends()
        return jobs

    return powered.undisturbed(make)


def test_it_ends_with_the_code_of_training(stand_in: Callable[..., Submitted]) -> None:
    """0 and 2 and 130 are kept and never started again; arguments arrive word for word."""
    words = ("a b", "$HOME", "it's", '"', "*", "--x=1")
    good = stand_in("0", words)
    assert good.ends() == "COMPLETED"
    assert good.outcomes() == [(0, 0, "done")]
    for rank in (0, 1):
        log = (good.run / f"logs/node{rank}-rank{rank}.log").read_text("utf-8").splitlines()
        assert log[0].startswith(f"=== n{rank + 1}, attempt {good.number}-0, ")
        assert log[1].endswith(f"arguments {['--config', 'unused.yaml', f'output={good.run}', *words, '--resume']}")
    assert (good.run / f"logs/slurm-{good.number}.out").is_file()


@pytest.mark.parametrize("code", [2, 130])
def test_an_error_that_is_explained_is_not_started_again(stand_in: Callable[..., Submitted], code: int) -> None:
    job = stand_in(str(code))
    assert job.ends() == "FAILED"
    assert job.fact("ExitCode") == f"{code}:0"
    assert job.outcomes() == [(0, code, "failed")]
    assert "not started again" in job.words()


def test_stopped_it_goes_back_into_the_queue(started_again: dict[str, Submitted]) -> None:
    """Logs and the record are appended to, and name the attempt."""
    job = started_again["stopped"]
    assert job.ends() == "COMPLETED"
    assert job.outcomes() == [(0, 75, "requeued"), (1, 75, "requeued"), (2, 0, "done")]
    assert [line["event"] for line in job.attempts()] == ["start", "end"] * 3
    first = job.attempts()[0]
    assert (first["job"], first["nodes"], first["launcher"], first["processes"]) == (
        job.number,
        ["n1", "n2"],
        "torchrun",
        2,
    )
    heads = [line for line in (job.run / "logs/node1-rank1.log").read_text("utf-8").splitlines() if "===" in line]
    assert [head.split()[3] for head in heads] == [f"{job.number}-{attempt}," for attempt in (0, 1, 2)]


def test_requeues_are_bounded(started_again: dict[str, Submitted]) -> None:
    job = started_again["bounded"]
    assert job.ends() == "FAILED"
    assert [(restart, why) for restart, _, why in job.outcomes()] == [(0, "requeued"), (1, "requeued"), (2, "gave_up")]
    assert "started again 1 times and not done" in job.words()


def test_crashes_are_retried_while_checkpoints_come(started_again: dict[str, Submitted]) -> None:
    """Three in a row without a new one are the end."""
    job = started_again["crashes"]
    assert job.ends() == "FAILED"
    # 137 where srun killed one node's task before it came to its own end
    assert all(code in (1, 137) for _, code, _ in job.outcomes())
    assert [(restart, why) for restart, _, why in job.outcomes()] == [
        *((n, "requeued") for n in range(4)),
        (4, "gave_up"),
    ]
    assert "crashed 3 times in a row without a new checkpoint" in job.words()


@pytest.mark.parametrize("way", ["through", "past"])
def test_the_warning_reaches_training_and_spares_the_launcher(started_again: dict[str, Submitted], way: str) -> None:
    """Sent to the batch script, as SLURM does it ahead of the time limit, or to the steps alone."""
    job = started_again[f"warned {way} the script"]
    assert job.ends() == "COMPLETED", job.words()
    assert job.outcomes() == [(0, 75, "requeued"), (1, 0, "done")]


def test_cancelled_it_stays_so(stand_in: Callable[..., Submitted], cluster: Cluster) -> None:
    job = stand_in("listen 0")
    listens(job)
    assert cluster.run("scancel", job.number).returncode == 0
    assert job.ends() == "CANCELLED"
    until(job.outcomes, "the script has written its end down", job.words)
    (outcome,) = job.outcomes()
    assert (outcome[0], outcome[2]) == (0, "ended_by_slurm")


LISTENER = """
import pathlib, socket, sys, time
with socket.create_server(("", int(sys.argv[1]))):
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(60)
"""


def test_a_port_that_answers_is_passed_over(
    stand_in: Callable[..., Submitted], cluster: Cluster, tmp_path: Path
) -> None:
    """The port is the job number's; here another program listens on it."""
    script, there = tmp_path / "listener.sh", tmp_path / "there"
    text = f"#!/bin/bash\nexec {sys.executable} -c '{LISTENER}' $((10000 + SLURM_JOB_ID + 1)) {there}\n"
    script.write_text(text, encoding="utf-8")
    done = cluster.run("sbatch", "--parsable", "--nodelist=n1", f"--output={tmp_path}/listener.out", str(script))
    assert done.returncode == 0, done.stderr
    until(there.exists, "the other program listens")
    job = stand_in("0")
    assert int(job.number) == int(done.stdout) + 1
    assert job.ends() == "COMPLETED", job.words()
    assert ports(job) == [10000 + int(job.number) + 7919]
    assert "taken" not in job.words()


def test_a_port_that_is_taken_in_the_last_moment(stand_in: Callable[..., Submitted]) -> None:
    """Another one is tried, in the same attempt."""
    job = stand_in("taken")
    assert job.ends() == "COMPLETED", job.words()
    first = 10000 + int(job.number)
    assert ports(job) == [first, first + 7919]
    assert "was taken by another program" in job.words()
    assert job.outcomes() == [(0, 0, "done")]


def ports(job: Submitted) -> list[int]:
    """Those that the first process was given, in order."""
    log = (job.run / "logs/node0-rank0.log").read_text("utf-8")
    return [int(line.split()[3]) for line in log.splitlines() if line.startswith("rank 0 port ")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_shellcheck(job: Callable[..., Job], launcher: str, tmp_path: Path) -> None:
    """Clean, with everything that a job may have."""
    full = {"partition": "p", "account": "a", "qos": "q", "constraint": "c", "cpus_per_task": 96, "memory": "0"}
    full |= {"setup": ("module load cuda", "source .venv/bin/activate"), "environment": {"NCCL_IB_HCA": "mlx5_0 $x"}}
    path = tmp_path / "job.sbatch"
    for more in ({}, full | {"gpus_per_node": 8, "processes_per_node": 0, "engine": "zero2"}):
        path.write_text(render(job(launcher=launcher, module="curvelora_training.finetune", **more)), encoding="utf-8")
        done = subprocess.run([str(BIN / "shellcheck"), str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
