"""Faults in one of two CPU processes: both leave alike, and what they leave is that of one process with the same fault.

One launch makes all cells (`fault_cells.py`); a process that dies or hangs takes its launch with it, so these are slow tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from curvelora_training.checkpoint import flaw
from curvelora_training.lease import Lease
from curvelora_training.signals import REQUEUE
from run_files import metrics, result

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
SKIP, BACK = "training.on_nonfinite=skip", "training.on_nonfinite=rollback"
# output -> (overrides and options, fault: kind, process, steps that are made). Four steps of eight rows.
CELLS: dict[str, tuple[list[str], list[Any] | None]] = {
    "ddp": ([], None),
    "ddp signal stopped": ([], ["SIGTERM", 1, 1]),
    "ddp signal": (["--resume"], None),
    "ddp evaluation stopped": ([], ["evaluation", 1, 0]),
    "ddp evaluation": (["--resume"], None),
    "ddp scoring stopped": ([], ["scoring", 0, 0]),
    "ddp scoring": (["--resume"], None),
    "ddp stop": ([], ["nan", 1, 2]),
    "ddp skip": ([SKIP], ["nan", 1, 2]),
    "ddp rollback": ([BACK, "training.save_every=1"], ["nan", 0, 2]),
    "ddp taken": ([], ["taken", 0, 1]),
}
for stage in (1, 2, 3):
    engine = f"training.deepspeed=ds_configs/zero{stage}.json"
    CELLS[f"zero{stage} skip"] = ([engine, SKIP], ["nan", 1, 2])
    CELLS[f"zero{stage} rollback"] = ([engine, BACK, "training.save_every=1"], ["nan", 0, 2])
# which gives no norm of the gradient, so that the step is applied: found all the same
CELLS["zero0 stop"] = (["training.deepspeed=ZERO_0", SKIP], ["nan", 1, 2])
CELLS["zero0 rollback"] = (["training.deepspeed=ZERO_0", BACK, "training.save_every=1"], ["nan", 0, 2])
BEFORE: dict[str, list[str]] = {"ddp": [], "zero0": ["training.deepspeed=ZERO_0"]}
BEFORE |= {f"zero{stage}": [f"training.deepspeed=ds_configs/zero{stage}.json"] for stage in (1, 2, 3)}
BEFORE |= {f"full {name}": [*BEFORE[name], "adapter={method: full}"] for name in ("ddp", "zero2", "zero3")}
for engine, more in BEFORE.items():
    CELLS[f"{engine} back"] = ([*more, BACK, "training.save_every=2"], ["nan", 1, 3])
CELLS["zero2 stop"] = (["training.deepspeed=ds_configs/zero2.json"], ["nan", 1, 2])
CELLS["zero3"] = (["training.deepspeed=ds_configs/zero3.json"], None)
CELLS["zero3 signal stopped"] = (["training.deepspeed=ds_configs/zero3.json"], ["SIGUSR1", 1, 1])
CELLS["zero3 signal"] = (["training.deepspeed=ds_configs/zero3.json", "--resume"], None)


def recipe(folder: Path, model: Path, root: Path) -> Path:
    rows = {name: {"path": str(root / f"tests/data/sst2_sentences_{name}.tsv")} for name in ("train", "unseen")}
    settings = {
        "learning_rate": 1e-2,
        "epochs": 1,
        "batch_size": 2,
        "accumulation": 2,
        "eval_batch_size": 4,
        "log_every": 1,
    }
    content = {
        "output": str(folder / "unused"),
        "model": {"path": str(model), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 32},
        "data": {"train": rows["train"] | {"limit": 32}, "validation": rows["unseen"] | {"limit": 16}},
        "adapter": {"method": "loran", "r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["query", "value"]},
        "training": settings,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def launch(
    cells: list[dict[str, Any]], folder: Path, root: Path, limit: float = 600
) -> subprocess.CompletedProcess[str]:
    (folder / "cells.json").write_text(json.dumps(cells), encoding="utf-8")
    return subprocess.run(
        [*TORCHRUN, str(root / "tests/training/fault_cells.py"), str(folder / "cells.json")],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], root: Path) -> Callable[[str], Path]:
    """`made("ddp skip")` -> the run folder of that cell; a stopped one's folder is that of the one that goes on."""
    folder = tmp_path_factory.mktemp("faults")
    path = str(recipe(folder, tiny_models["bert"], root))
    (folder / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}', encoding="utf-8")
    cells = []
    for name, (arguments, fault) in CELLS.items():
        output = f"output={folder / name.removesuffix(' stopped')}"
        arguments = [argument.replace("ZERO_0", str(folder / "zero0.json")) for argument in arguments]
        cells.append({"name": name, "arguments": ["--config", path, output, *arguments], "fault": fault})
    done = launch(cells, folder, root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "said").write_text(done.stdout + done.stderr, encoding="utf-8")
    return lambda name: folder / name


def codes(run: Path) -> list[int]:
    return [int(run.with_name(f"{run.name}.code{rank}").read_text()) for rank in (0, 1)]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


@pytest.mark.parametrize(("name", "saved"), [("ddp signal", 2), ("ddp evaluation", 4), ("zero3 signal", 2)])
def test_a_signal_to_one_process_stops_both_with_one_checkpoint(
    made: Callable[[str], Path], name: str, saved: int
) -> None:
    """And the run that goes on from it is the one that nothing stopped, bit for bit."""
    run, straight = made(name), made(name.split()[0])
    assert codes(run.with_name(f"{name} stopped")) == [REQUEUE, REQUEUE]
    assert codes(run) == codes(straight) == [0, 0]
    said = made("said").read_text(encoding="utf-8")
    assert said.count(f"stopped after step {saved}, saved as {run}/checkpoints/checkpoint-{saved}: continue") == 1
    assert flaw(run / f"checkpoints/checkpoint-{saved}") is None
    assert [line["stopped"]["at"] for line in metrics(run) if "stopped" in line] == [saved]
    for kind in ("loss", "eval_loss"):
        lines = [[(line["step"], line[kind]) for line in metrics(f) if kind in line] for f in (run, straight)]
        assert lines[0] == lines[1] and lines[0]
    assert all(torch.equal(tensor, weights(run)[key]) for key, tensor in weights(straight).items())


def test_a_signal_while_the_first_process_scores_stops_both(made: Callable[[str], Path]) -> None:
    run = made("ddp scoring")
    assert codes(run.with_name("ddp scoring stopped")) == [REQUEUE, REQUEUE] and codes(run) == [0, 0]
    assert "stopped while the test rows were scored" in made("said").read_text(encoding="utf-8")
    assert all(torch.equal(tensor, weights(run)[key]) for key, tensor in weights(made("ddp")).items())
    assert result(run)["steps"] == result(made("ddp"))["steps"] == 4


@pytest.mark.parametrize(
    ("engine", "action"),
    [*product(("ddp", "zero1", "zero2", "zero3"), ("skip", "rollback")), ("zero0", "rollback")],
)
def test_what_one_process_finds_both_leave_out(made: Callable[[str], Path], engine: str, action: str) -> None:
    """The third of four steps is lost on one process; the fourth trains on what was there before it, with every engine."""
    run = made(f"{engine} {action}")
    assert codes(run) == [0, 0]
    (record,) = [line for line in metrics(run) if "nonfinite" in line]
    assert record["step"] == 3 and record["nonfinite"]["action"] == action
    assert len(set(record["nonfinite"]["rows"])) == 8
    assert result(run)["nonfinite"] == {"skipped_steps": int(action == "skip"), "rollbacks": int(action == "rollback")}
    straight, found = losses(made("ddp")), losses(run)
    assert list(found) == [1, 2, 4] and [found[1], found[2]] == [straight[1], straight[2]]
    assert found[4] != straight[4] and found[4] == pytest.approx(losses(made("ddp skip"))[4], rel=1e-6)
    rates = [line["learning_rate"] for line in metrics(run) if "loss" in line]
    assert rates == pytest.approx([1e-2, 7.5e-3, 2.5e-3])
    for key, tensor in weights(made("ddp skip")).items():
        torch.testing.assert_close(weights(run)[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", BEFORE)
def test_going_back_takes_weights_and_moments_of_the_checkpoint(made: Callable[[str], Path], engine: str) -> None:
    """The last of four steps is lost, and the newest checkpoint is of the second: what is saved at the end is that one's."""
    run = made(f"{engine} back")
    assert codes(run) == [0, 0]
    (record,) = [line for line in metrics(run) if "nonfinite" in line]
    assert record["step"] == 4 and record["nonfinite"]["back_to"].endswith("checkpoint-2")
    old, new = (run / f"checkpoints/checkpoint-{step}" for step in (2, 4))
    shares = engine in ("full zero2", "full zero3")  # moments are in DeepSpeed's own files then
    for name in ("adapter_model.safetensors", *(() if shares else ("moments.safetensors",))):
        before, after = load_file(old / name), load_file(new / name)
        assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before), name
    assert all(tensor.equal(weights(run)[key]) for key, tensor in load_file(old / "adapter_model.safetensors").items())
    rates = [json.loads((path / "scheduler.json").read_text())["learning_rates"][0] for path in (old, new)]
    assert rates == pytest.approx([5e-3, 0.0])  # they go on


@pytest.mark.parametrize("engine", ["ddp", "zero0", "zero2"])
def test_what_one_process_finds_ends_both(made: Callable[[str], Path], engine: str) -> None:
    said = made("said").read_text(encoding="utf-8")
    assert said.count("it cannot be skipped, as DeepSpeed without a gradient norm has applied it") >= 1
    run = made(f"{engine} stop")
    assert codes(run) == [2, 2] and not (run / "adapter").exists()
    (record,) = [line for line in metrics(run) if "nonfinite" in line]
    assert record["step"] == 3 and record["nonfinite"]["rows"] == made_rows(made)


def made_rows(made: Callable[[str], Path]) -> list[int]:
    """The rows of the third step, of both processes and both batches."""
    (record,) = [line for line in metrics(made("ddp skip")) if "nonfinite" in line]
    return record["nonfinite"]["rows"]


def test_what_the_first_process_learns_of_the_folder_ends_both(made: Callable[[str], Path]) -> None:
    run = made("ddp taken")
    assert codes(run) == [2, 2] and list(losses(run)) == [1]
    assert not list((run / "checkpoints").glob("*")) and json.loads((run / "lease.json").read_text())["host"] == "node7"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [("SIGKILL", 0), ("SIGKILL", 1), ("hang", 1)])
def test_a_process_that_dies_or_hangs_ends_the_job(
    kind: str, rank: int, tmp_path: Path, tiny_models: dict[str, Path], root: Path
) -> None:
    """A dead one is noticed by the launcher, a hanging one by the time limit of the others; nobody holds the folder then."""
    path, run = str(recipe(tmp_path, tiny_models["bert"], root)), tmp_path / "run"
    arguments = ["--config", path, f"output={run}", "training.save_every=1", "training.timeout_minutes=0.2"]
    done = launch([{"name": "run", "arguments": arguments, "fault": [kind, rank, 2]}], tmp_path, root, limit=300)
    assert done.returncode != 0
    if kind == "hang":
        assert "imed out" in done.stderr
    assert flaw(run / "checkpoints/checkpoint-2") is None and not (run / "adapter").exists()
    lease = Lease(run)
    lease.take()
    lease.release()


@pytest.mark.slow
def test_a_slow_load_is_waited_for_and_a_hanging_one_is_not(
    tmp_path: Path, tiny_models: dict[str, Path], root: Path
) -> None:
    path = str(recipe(tmp_path, tiny_models["bert"], root))
    slow, hung = tmp_path / "slow", tmp_path / "hung"
    cells = [
        {"name": "slow", "fault": ["load", 1, 20], "arguments": ["--config", path, f"output={slow}"]},
        {"name": "hung", "fault": ["load", 1, 15], "arguments": ["--config", path, f"output={hung}"], "loading": 5},
    ]
    for cell in cells:
        cell["arguments"].append("training.timeout_minutes=0.2")
    done = launch(cells, tmp_path, root, limit=300)
    assert (tmp_path / "slow.code0").read_text() == "0" and (slow / "adapter").is_dir()
    assert (tmp_path / "hung.code0").read_text() == "2" and not hung.exists()
    assert "not every process has loaded the base after 0:00:05" in done.stdout + done.stderr
