"""Training on two nodes of a real SLURM: the same run with every launcher, and after everything that can stop it.

The first attempt goes slowly from step 6 on, where tests do something to it; what comes of it is compared byte for byte with the
run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from curvelora_training.checkpoint import flaw
from curvelora_training.finetune import main
from curvelora_training.launch.job import Job
from run_files import metrics, result
from slurm_world import SMALL, Cluster, Submitted, until

pytestmark = pytest.mark.slurm
STEPS = 24
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], root: Path) -> Path:
    """24 steps of 8 rows over both processes; a checkpoint every four."""
    rows = {"path": str(root / "tests/data/sst2_sentences_train.tsv"), "limit": 64}
    adapter = {"method": "loran", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["query", "value"]}
    training = {"learning_rate": 1e-3, "epochs": 3, "batch_size": 4, "log_every": 1, "save_every": 4}
    training |= {"keep_checkpoints": 3, "timeout_minutes": 1}
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    content = {
        "output": "unused",
        "model": {"path": str(tiny_models["bert"]), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 32},
        "data": {"train": rows},
        "adapter": adapter,
        "training": training,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def submit(cluster: Cluster, job: Callable[..., Job], recipe: Path, tmp_path: Path) -> Callable[..., Submitted]:
    """`submit(launcher="deepspeed")`; `held=2` takes 2 s a step from step 6 on, in its first attempt."""

    def submit(held: float = 0, name: str = "run", **changes: Any) -> Submitted:
        output = changes.pop("output", str(tmp_path / name))
        preflight = changes.pop("preflight", 0)
        made = job(module="held_finetune", recipe=str(recipe), output=output, name=name, **changes)
        return cluster.submit(made, HELD=str(held), PREFLIGHT=str(preflight))

    return submit


@pytest.fixture(scope="module")
def straight(powered: Cluster, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to, on two nodes with torchrun."""
    settings: dict[str, Any] = {"nodes": 2, "gpus_per_node": 0, "processes_per_node": 1, "time": "10"}

    def make() -> Path:
        output = tmp_path_factory.mktemp("straight") / "run"
        job = Job(name="straight", recipe=str(recipe), output=str(output), module="held_finetune", **settings)
        submitted = powered.submit(job, HELD="0")
        assert submitted.ends() == "COMPLETED", submitted.words()
        return output

    return powered.undisturbed(make)


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process on the same global batches, without SLURM."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main(["--config", str(recipe), "training.batch_size=8", f"output={run}"]) == 0
    return run


def check_same(run: Path, straight: Path) -> None:
    """The same losses and the same bytes of weights; every checkpoint that is there is whole."""
    assert [line["loss"] for line in metrics(run) if "loss" in line] == [
        line["loss"] for line in metrics(straight) if "loss" in line
    ]
    assert result(run)["engine"] == result(straight)["engine"]
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (straight / name).read_bytes()
    for checkpoint in (run / "checkpoints").glob("checkpoint-*"):
        assert flaw(checkpoint) is None
    assert not list((run / "checkpoints").glob("damaged*"))
    assert not (run / "lease.json").exists()


def check_resumed(job: Submitted, straight: Path) -> int:
    """It came to its end in a later attempt, which continued from a checkpoint; the first step of that attempt."""
    assert job.ends() == "COMPLETED", job.words()
    assert job.outcomes()[-1][1:] == (0, "done")
    check_same(job.run, straight)
    log = (job.run / "logs/node0-rank0.log").read_text("utf-8")
    last = log.rpartition(f", attempt {job.number}-")[2]
    assert "resuming from" in last, job.words()
    return int(last.partition("checkpoint-")[2].partition(",")[0])


def test_two_nodes_are_one_process(straight: Path, alone: Path) -> None:
    """The same global batches on one process give the same losses and weights, to the rounding of sums."""
    losses, wanted = ([line["loss"] for line in metrics(run) if "loss" in line] for run in (straight, alone))
    assert losses == pytest.approx(wanted, rel=1e-5) and len(losses) == STEPS
    engine = result(straight)["engine"]
    assert (engine["engine"], engine["processes"]) == ("DistributedDataParallel", 2)
    weights, others = (load_file(run / "adapter/adapter_model.safetensors") for run in (straight, alone))
    assert all((weights[key] - others[key]).abs().max() <= 1e-4 for key in others)


@slow
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_launchers(submit: Callable[..., Submitted], straight: Path, launcher: str) -> None:
    """The same losses with the others; `deepspeed` means ZeRO-2."""
    job = submit(launcher=launcher)
    assert job.ends() == "COMPLETED", job.words()
    losses, wanted = ([line["loss"] for line in metrics(run) if "loss" in line] for run in (job.run, straight))
    assert losses == pytest.approx(wanted, rel=1e-5) and len(losses) == STEPS
    engine = result(job.run)["engine"]
    assert engine["processes"] == 2
    assert engine["zero_stage"] == (2 if launcher == "deepspeed" else None)


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("accelerate", marks=slow), pytest.param("deepspeed", marks=slow)]
)
def test_warned_it_saves_and_resumes(submit: Callable[..., Submitted], straight: Path, launcher: str) -> None:
    """USR1 by scancel: a checkpoint at the very step, and the rest in the next attempt."""
    job = submit(held=2, launcher=launcher)
    job.reaches(6)
    job.signal("USR1", "--batch")
    if launcher == "deepspeed":  # ZeRO-2 rounds otherwise
        assert job.ends() == "COMPLETED", job.words()
        losses, wanted = ([line["loss"] for line in metrics(run) if "loss" in line] for run in (job.run, straight))
        assert losses == pytest.approx(wanted, rel=1e-5) and len(losses) == STEPS
    else:
        assert check_resumed(job, straight) >= 6
    assert job.outcomes() == [(0, 75, "requeued"), (1, 0, "done")]


@slow
def test_the_time_limit(submit: Callable[..., Submitted], straight: Path) -> None:
    """SLURM warns ahead of it, by up to a minute more than it was asked to; the start has to fit in before."""
    job = submit(held=8, time="3", warning_seconds=60)
    assert check_resumed(job, straight) >= 4
    assert job.outcomes() == [(0, 75, "requeued"), (1, 0, "done")]


@slow
def test_preemption(submit: Callable[..., Submitted], straight: Path, cluster: Cluster) -> None:
    """Another partition takes all nodes: a checkpoint within the grace time, and the rest when they are back."""
    job = submit(held=2)
    job.reaches(6)
    other = ("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    done = cluster.run("sbatch", "--parsable", *other)
    assert done.returncode == 0, done.stderr
    assert check_resumed(job, straight) >= 6


@slow
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_crashes(submit: Callable[..., Submitted], straight: Path, cluster: Cluster, node: str) -> None:
    """The batch script's, or the other one: SLURM starts the job on those that are left."""
    job = submit(held=2)
    job.reaches(6)
    cluster.crash(node)
    assert check_resumed(job, straight) == 4
    assert node not in job.attempts()[-1]["nodes"]


@slow
@pytest.mark.parametrize("how", ["kill_daemon", "unplug"])
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_is_lost_and_lives_on(
    submit: Callable[..., Submitted], straight: Path, cluster: Cluster, how: str, node: str
) -> None:
    """The old processes go on beside the new attempt: what they write is fenced off, and nothing is damaged."""
    job = submit(held=2)
    job.reaches(6)
    getattr(cluster, how)(node)
    assert check_resumed(job, straight) >= 4
    assert node not in job.attempts()[-1]["nodes"]


@slow
@pytest.mark.parametrize("how", ["kill_daemon", "unplug"])
def test_the_fence(submit: Callable[..., Submitted], alone: Path, cluster: Cluster, how: str) -> None:
    """A job of one node, which nothing else stops when its node is lost: it finds out that another attempt has its folder."""
    job = submit(held=15, nodes=1, overrides=("training.batch_size=8",))
    job.reaches(6)
    getattr(cluster, how)("n1")
    assert check_resumed(job, alone) >= 4
    assert [line["event"] for line in job.attempts()].count("start") == 2
    assert [outcome for outcome in job.outcomes() if outcome[2] == "done"] == [(1, 0, "done")]
    log = job.run / "logs/node0-rank0.log"  # of both attempts
    until(lambda: "was taken over by another attempt" in log.read_text("utf-8"), "the old attempt stops", job.words)
    check_same(job.run, alone)


@slow
def test_a_process_is_killed(submit: Callable[..., Submitted], straight: Path) -> None:
    """SIGKILL, as the kernel does it where memory is short: the job starts again by itself."""
    job = submit(held=2)
    job.reaches(6)
    os.kill(_process_of(job, rank=1), signal.SIGKILL)
    assert check_resumed(job, straight) == 4
    assert job.outcomes()[0][2] == "requeued" and job.outcomes()[0][1] not in (0, 2, 75)


def _process_of(job: Submitted, rank: int) -> int:
    """The training process of this rank, on whatever node."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {f"RANK={rank}".encode(), f"RUN={job.run}".encode()}
        if b"held_finetune" in command and command[0].endswith(b"python") and wanted <= set(environment):
            return int(path.name)
    raise AssertionError(job.words())


@slow
def test_two_jobs_on_the_same_nodes(submit: Callable[..., Submitted], straight: Path) -> None:
    """At the same time, each with its own port and folder."""
    jobs = [submit(name=name) for name in ("first", "second")]
    for job in jobs:
        assert job.ends() == "COMPLETED", job.words()
        check_same(job.run, straight)
    starts = [job.attempts()[0] for job in jobs]
    assert starts[0]["nodes"] == starts[1]["nodes"]
    assert jobs[0].attempts()[-1]["time"] > starts[1]["time"]


@slow
def test_nodes_without_their_gpus(submit: Callable[..., Submitted]) -> None:
    """The check before training refuses them: SLURM gives two GPUs a node, and there are none. Not started again."""
    job = submit(preflight=1, gpus_per_node=2, processes_per_node=0)
    assert job.ends() == "FAILED", job.words()
    assert job.outcomes() == [(0, 2, "failed")], job.words()
    said = (job.run / f"logs/slurm-{job.number}.out").read_text("utf-8")
    assert "n2 shows 0 GPUs and 2 were asked for" in said and "Traceback" not in said
    assert not (job.run / "metrics.jsonl").exists()


@slow
@pytest.mark.parametrize("left", [320, 150])
def test_a_full_disk(submit: Callable[..., Submitted], cluster: Cluster, left: int) -> None:
    """Explained, and not started again; with more space the same job goes on from the last checkpoint that is whole.

    Args:
        left: KB; room for two checkpoints and a half, or for half of one.
    """
    filler, run = SMALL / "filler", SMALL / f"run-{left}"
    free = shutil.disk_usage(SMALL).free
    filler.write_bytes(b"x" * (free - left * 1024))
    try:
        job = submit(output=str(run))
        assert job.ends() == "FAILED", job.words()
        assert job.fact("ExitCode") == "2:0", job.words()
        assert job.fact("Restarts") == "0"
        said = (run / "logs/node0-rank0.log").read_text("utf-8")
        assert "No space left on device" in said or "ended with an error" in said
        assert all(flaw(checkpoint) is None for checkpoint in (run / "checkpoints").glob("checkpoint-*"))
        filler.unlink()
        again = submit(output=str(run))
        assert again.ends() == "COMPLETED", again.words()
    finally:
        filler.unlink(missing_ok=True)
        shutil.rmtree(run, ignore_errors=True)
