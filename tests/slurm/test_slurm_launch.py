"""`curvelora launch` and the array script against a real SLURM: refusals in a sentence, a run and its evaluation, a sweep."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvelora_training.launch.snapshot import submissions
from run_files import result
from slurm_world import BIN, Cluster, Submitted

pytestmark = pytest.mark.slurm
SETTINGS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def recipe(tiny_models: dict[str, Path], root: Path, tmp_path: Path) -> Path:
    """Four steps on two processes."""
    content = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_models["bert"]), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 32},
        "data": {"train": {"path": str(root / "tests/data/sst2_sentences_train.tsv"), "limit": 32}},
        "adapter": {"method": "loran", "r": 4, "alpha": 8, "target_modules": ["query", "value"]},
        "training": {"learning_rate": 1e-3, "epochs": 1, "batch_size": 4, "log_every": 1},
    }
    path = tmp_path / "tiny_sst2_loran.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def launch(cluster: Cluster) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`launch("--recipe", ...)` on the login node."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        settings = SETTINGS | {"PATH": path, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        return cluster.run(str(BIN / "python"), "-m", "curvelora_training.launch", *arguments, **settings)

    return run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--partition", "mian"], "there is no partition 'mian'; did you mean 'main'?"),
        (["--nodes", "9", "training.batch_size=4"], "--nodes 9 are more than the 3 that the partition main has"),
        (["--recipe", "missing.yaml"], "missing.yaml"),
    ],
    ids=["partition", "nodes", "recipe"],
)
def test_what_cannot_run_is_refused_in_a_sentence(
    launch: Callable[..., Any], cluster: Cluster, recipe: Path, changes: list[str], said: str
) -> None:
    """At submission, with nothing in the queue and no folder."""
    size = ["--nodes", "2", "--gpus-per-node", "0", "--processes-per-node", "1", "--time", "10"]
    done = launch("--recipe", str(recipe), *size, *changes)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in done.stderr
    assert not (recipe.parent / "run").exists()
    assert cluster.run("squeue", "-h").stdout == ""


@pytest.mark.slow
def test_a_run_and_its_evaluation(launch: Callable[..., Any], cluster: Cluster, recipe: Path, root: Path) -> None:
    """Submitted with the check of the nodes before training; the evaluation begins when the run is done."""
    rows = root / "tests/data/sst2_sentences_unseen.tsv"
    size = ["--nodes", "2", "--gpus-per-node", "0", "--processes-per-node", "1", "--time", "10"]
    done = launch("--recipe", str(recipe), *size, "--evaluate-after", str(rows))
    assert done.returncode == 0, done.stdout + done.stderr
    run = recipe.parent / "run"
    first, second = (line["job"] for line in submissions(run))
    job, evaluation = Submitted(cluster, first, run), Submitted(cluster, second, run)
    assert evaluation.fact("JobState") == "PENDING"
    assert job.ends() == "COMPLETED", job.words()
    assert job.outcomes() == [(0, 0, "done")]
    assert "n1" in (run / f"logs/slurm-{first}.out").read_text("utf-8")
    assert (run / "launch/preflight.json").is_file()
    assert evaluation.ends() == "COMPLETED", job.words()
    (scores,) = run.glob("evaluation-*/evaluation.json")
    assert result(scores.parent, scores.name)


@pytest.mark.slow
def test_a_sweep_as_an_array(cluster: Cluster, recipe: Path, root: Path, tmp_path: Path) -> None:
    """Two tasks share the runs; the one that is done last writes the report."""
    sweep, path = tmp_path / "sweep", f"{BIN}{os.pathsep}{os.environ['PATH']}"
    settings = SETTINGS | {"PATH": path, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "GRID": "paper", "SHARES": "2"}
    options = [
        f"--output={tmp_path}/slurm-%A_%a.out",
        "--array=0-1",
        f"--chdir={root}",
        "--cpus-per-task=1",
        "--mem=1000",
    ]
    grid = ["--amplitude", "0.01", "--frequency", "1000,10000", "--steps", "2", "--base", "fp32", "--batch-size", "4"]
    done = cluster.run(
        "sbatch", "--parsable", *options, "launch/slurm/sweep.sbatch", str(recipe), *grid, RUN=str(sweep), **settings
    )
    assert done.returncode == 0, done.stderr
    tasks = [Submitted(cluster, f"{done.stdout.strip()}_{task}", tmp_path) for task in (0, 1)]
    said = {task.number: task.ends() for task in tasks}
    logs = "\n".join(log.read_text("utf-8")[-2000:] for log in tmp_path.glob("slurm-*.out"))
    assert set(said.values()) == {"COMPLETED"}, logs
    assert (sweep / "report.html").is_file(), logs
    assert (sweep / "sweep.json").is_file()
