"""Several processes: two that share a batch make the steps of one, and runs that are packed are those made one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from curvelora.cli import main

COMMON = ("--arms", "qlora,loran:sinter-large", "--no-cost", "--no-sharpness", "--no-spectra", "--steps", "4")
COMMON = (*COMMON, "--learning-rate", "1e-2")
ARMS = ("qlora", "loran_sinter-large")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_run) -> Path:
    """Two seeds of two arms, made by one process in batches of four."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("alone") / "lab"
    assert main(["bench", "compare", *tiny_run, *COMMON, "--seeds", "1-2", "--out", str(out)]) == 0
    return out


def run(folder: Path) -> tuple[list[dict], dict]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "run.json").read_text())


def test_two_processes_take_the_steps_of_one_with_their_batches_together(alone, tiny_run, tmp_path):
    out = tmp_path / "lab"
    shared = [*tiny_run, *COMMON, "--batch-size", "2", "--seeds", "1", "--out", str(out)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "curvelora.cli", "bench", "compare", *shared],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1  # only the first process speaks
    for arm in ARMS:
        (ours, record), (theirs, reference) = (run(folder / "runs" / arm / "seed-1") for folder in (out, alone))
        assert (record["processes"], reference["processes"]) == (2, 1) and len(ours) == len(theirs) == 4
        for one, two in zip(ours, theirs, strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        assert record["heldout"]["loss"] == pytest.approx(reference["heldout"]["loss"], rel=1e-5)
        assert theirs[0]["loss"] - theirs[-1]["loss"] != pytest.approx(0, abs=1e-3)  # something was learnt


def test_packed_runs_are_those_made_one_by_one(alone, tiny_run, tmp_path, capfd):
    out = tmp_path / "lab"
    assert main(["bench", "compare", *tiny_run, *COMMON, "--seeds", "1-2", "--jobs", "2", "--out", str(out)]) == 0
    said = capfd.readouterr().out
    assert "[4/4]" in said and len(list((out / "workers").glob("*.log"))) == 2
    for arm in ARMS:
        for seed in ("seed-1", "seed-2"):
            (ours, record), (theirs, reference) = (run(folder / "runs" / arm / seed) for folder in (out, alone))
            assert ours == theirs and record["heldout"] == reference["heldout"]


def test_packing_and_a_launcher_exclude_each_other(tiny_run, tmp_path, monkeypatch, capsys):
    from curvelora_training.bench import compare

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(compare, "join", lambda: torch.device("cpu"))
    assert main(["bench", "compare", *tiny_run, *COMMON, "--jobs", "2", "--out", str(tmp_path / "lab")]) == 2
    assert "without a launcher" in capsys.readouterr().err and not (tmp_path / "lab").exists()
