"""`curvelora matrix`: that it finds what is wrong, stops in time, goes on, and refuses bad options (its cells: test_zero.py)."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from curvelora.cli import run_module
from curvelora.errors import UserError
from curvelora_training.matrix import command, matrix, worker
from curvelora_training.matrix.cells import ALONE, REFUSALS, Cell, all_cells, launched_cells, refusal
from curvelora_training.matrix.compare import compare
from curvelora_training.matrix.launch import tail, watch
from curvelora_training.matrix.matrix import open_matrix
from curvelora_training.matrix.page import page
from curvelora_training.prepare import load_and_prepare

CELL = Cell("classifier", "fp32", "loran", "zero3")
ENGINE = {
    "engine": "DeepSpeedEngine",
    "zero_stage": 3,
    "processes": 2,
    "device": "cpu",
    "trainable_dtype": "float32",
    "frozen_dtype": "float32",
    "share_of_base": 0.5,
}


def write_run(folder: Path, **changes: Any) -> Path:
    """A run folder with what is compared: two losses, an evaluation, a score, one tensor."""
    parts = {"engine": ENGINE, "losses": [0.7, 0.6], "eval": 0.65, "shift": 0.5, "score": 0.8}
    parts |= {"tensors": {"A": torch.ones(4)}} | changes
    (folder / "adapter").mkdir(parents=True)
    lines = [{"step": i, "loss": loss} for i, loss in enumerate(parts["losses"], 1)] + [
        {"step": 2, "eval_loss": parts["eval"]}
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"engine": parts["engine"], "start_shift": {"relative": parts["shift"]}}
    (folder / "result.json").write_text(json.dumps(result))
    evaluation = {"primary_metric": "accuracy", "metrics": {"accuracy": {"value": parts["score"]}}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    save_file(parts["tensors"], folder / "adapter/adapter_model.safetensors")
    return folder


def test_a_start_shift_is_compared_to_the_rounding_of_outputs(tmp_path: Path) -> None:
    alone = write_run(tmp_path / "alone", shift=8.37e-6)
    measured, wrong = compare(CELL, write_run(tmp_path / "rounded", shift=8.40e-6), alone, 2)
    assert not wrong and measured["start_shift"] == pytest.approx(3e-4, rel=1e-6)
    assert "start_shift" in compare(CELL, write_run(tmp_path / "other", shift=9e-6), alone, 2)[1][0]
    half = dataclasses.replace(CELL, base="bf16")
    alone = write_run(tmp_path / "half", shift=3.68e-3)
    for shift, differs in ((3.70e-3, False), (4e-3, True)):
        wrong = compare(half, write_run(tmp_path / f"half_{shift}", shift=shift), alone, 2)[1]
        assert any("start_shift" in text for text in wrong) == differs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"losses": [0.7, 0.60002]}, "loss differs by 3.3e-05"),
        ({"losses": [0.7, None]}, "loss differs by inf"),
        ({"losses": [0.7]}, "1 values of loss, and one process has 2"),
        ({"eval": 0.66}, "eval_loss differs by"),
        ({"shift": 0.6}, "start_shift differs by 0.2"),
        ({"score": 0.9}, "score differs by"),
        ({"tensors": {"A": torch.full((4,), 1.001)}}, "largest_entry differs by"),
        ({"tensors": {"A": torch.full((4,), float("nan"))}}, "largest_entry differs by inf"),
        ({"tensors": {"A": torch.ones(3)}}, "has no A of the shape (4,)"),
        ({"tensors": {"B": torch.ones(4)}}, "has no A of the shape (4,)"),
        ({"engine": ENGINE | {"zero_stage": 2}}, "zero_stage is 2, not 3"),
        ({"engine": ENGINE | {"engine": "DistributedDataParallel"}}, "engine is 'DistributedDataParallel'"),
        ({"engine": ENGINE | {"processes": 1}}, "processes is 1, not 2"),
        ({"engine": ENGINE | {"frozen_dtype": "bfloat16"}}, "frozen_dtype is 'bfloat16'"),
        ({"engine": ENGINE | {"trainable_dtype": "bfloat16"}}, "trainable_dtype is 'bfloat16'"),
        ({"engine": ENGINE | {"share_of_base": 1.0}}, "share_of_base is 1.000, not 0.550"),
    ],
)
def test_what_is_not_as_with_one_process_is_found(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    alone, run = write_run(tmp_path / "alone"), write_run(tmp_path / "run", **changes)
    _, wrong = compare(CELL, run, alone, 2)
    assert bool(wrong) is bool(said) and said in "; ".join(wrong)


@pytest.fixture
def small(tmp_path: Path, root: Path) -> matrix.Matrix:
    return open_matrix(tmp_path / "m", 2, root / "ds_configs", ["classifier"])[0]


def test_every_refusal_is_before_anything_is_loaded(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell for each: its words come while the recipe is checked, where no weight is there. None is listed in vain."""
    made = open_matrix(tmp_path / "m", 2, root / "ds_configs", ["classifier", "lm"])[0]
    methods = ["qlora", "adalora", "delora", "full", "bitfit", "linear_probing", "lora", "dora"]
    cells = all_cells(["classifier", "lm"], ["fp32", "bf16", "nf4", "int8"], methods, ["ddp", "zero3", "fsdp2"])
    first = {}
    for cell in cells:
        if (rule := refusal(cell)) is not None:
            first.setdefault(rule, cell)
    assert len(first) == len(REFUSALS)
    for rule, cell in first.items():
        for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in cell.environment.items():
            monkeypatch.setenv(name, value)
        overrides = cell.overrides(str(made.configs), 2, made.targets[cell.task])
        with pytest.raises(UserError) as caught:
            load_and_prepare(made.recipes[cell.task], [*overrides, f"output={tmp_path / 'run'}"])
        assert rule.said in str(caught.value), cell.name


def test_a_cell_that_takes_the_group_down_has_failed_and_the_others_go_on(
    small: matrix.Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [Cell("classifier", "fp32", method, ALONE) for method in ("loran", "lora", "dora")]
    begun: list[str] = []

    def fake(line: Callable[[str], None], log: Path) -> int | None:
        cells = json.loads((small.out / "jobs.json").read_text())["cells"]
        log.write_text("Traceback\nRuntimeError: it broke\n")
        for cell in cells:
            begun.append(cell["name"])
            line(worker.BEGINS + cell["name"])
            if ".lora." in cell["name"]:
                return 1
            line(worker.ENDS + cell["name"])
        return 0

    monkeypatch.setattr(matrix, "watch", lambda command, log, folder, limit, line: fake(line, log))
    for name in ("cells", "runs", "logs"):
        (small.out / name).mkdir()
    small._group(names, [sys.executable])
    assert begun == [cell.name for cell in names]
    assert "it broke" in small.record(names[1])["why"] and small.record(names[1])["status"] == "failed"
    # what it would be compared with is not there, which is a failure of the cell too
    dependent = Cell("classifier", "fp32", "lora", "ddp")
    small._finish(dependent)
    assert "it broke" in small.record(dependent)["why"]
    small.forget([dependent])
    assert small.record(dependent) is None and small.record(names[1]) is None


def test_what_hangs_is_ended(tmp_path: Path) -> None:
    heard: list[str] = []
    code = "import time\nprint('here', flush=True)\ntime.sleep(600)"
    started = time.monotonic()
    assert watch([sys.executable, "-c", code], tmp_path / "log", tmp_path, 3, heard.append) is None
    assert heard == ["here"] and time.monotonic() - started < 120
    assert (
        watch([sys.executable, "-c", "print('x'); raise SystemExit(5)"], tmp_path / "log", tmp_path, 60, heard.append)
        == 5
    )
    assert heard == ["here", "x"]


def test_a_failure_names_its_error_and_not_the_launchers(tmp_path: Path) -> None:
    own = ["[rank1]: Traceback", "[rank1]: RuntimeError: shapes differ", "torch.x.ChildFailedError: "]
    (tmp_path / "log").write_text("\n".join([*own, *["="] * 40]))
    assert tail(tmp_path / "log").splitlines()[-1] == "RuntimeError: shapes differ"


def call(*arguments: str) -> int:
    return run_module(command, "curvelora matrix", list(arguments))


def test_time_that_is_up_is_said_and_other_settings_are_refused(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [
        "--configs",
        str(root / "ds_configs"),
        "--methods",
        "loran",
        "--out",
        str(tmp_path / "m"),
        "--stages",
        "0,3",
    ]
    assert call(*start, "--time-limit", "1e-9") == command.NOT_FINISHED
    shown = capsys.readouterr().out
    # two tasks, three bases, two engines; five launchers and engines
    assert "17 cells, 0 of them are there already" in shown and "the same command goes on from here" in shown
    assert json.loads((tmp_path / "m/results.json").read_text())["cells"] == []
    with pytest.raises(UserError, match="processes was 2, now 4"):
        call(*start, "--time-limit", "1e-9", "--processes", "4")
    assert call(*start, "--time-limit", "1e-9", "--processes", "4", "--overwrite") == command.NOT_FINISHED


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "lorann"], "--methods: there is no 'lorann'; did you mean 'loran'"),
        (["--stages", "4"], "--stages: there is no '4'"),
        (["--bases", "fp8"], "--bases: there is no 'fp8'"),
        (["--processes", "1"], "--processes must be at least 2"),
        (["--time-limit", "0"], "--time-limit must be above 0"),
        (["--model", "nowhere"], "nowhere is no checkpoint folder"),
        (["--targets", "query"], "--targets is for --model"),
        (["--configs", "nowhere"], "holds no zero1.json"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path: Path, root: Path, options: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        call("--configs", str(root / "ds_configs"), "--out", str(tmp_path / "m"), *options)
    assert said in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_the_launchers_cells() -> None:
    found = launched_cells(CELL, ["accelerate", "deepspeed"], ["ddp", "zero2", "zero3_offload", "fsdp2"])
    assert [c.name for c in found] == [
        "accelerate.classifier.fp32.loran.ddp",
        "accelerate.classifier.fp32.loran.zero2",
        "accelerate.classifier.fp32.loran.fsdp2",
        "deepspeed.classifier.fp32.loran.zero2",
    ]


def test_the_page_shows_what_agrees_and_what_does_not(tmp_path: Path) -> None:
    def entry(method: str, status: str, loss: float, engine: str = "zero3") -> dict[str, Any]:
        cell = {"task": "classifier", "base": "fp32", "method": method, "engine": engine, "launcher": None}
        measured = {} if status == "refused" else {"measured": {"loss": loss, "eval_loss": 0.0}}
        return cell | {"status": status, "why": None} | measured

    cells = [entry("loran", "agrees", 0.0), entry("lora", "differs", 0.1), entry("delora", "refused", 0.0)]
    hardware = {"gpu": None, "gpus": 0, "cpu": "some CPU"}
    record = {
        "environment": {"hardware": hardware, "versions": {"torch": "2.13.0"}},
        "commits": ["abc"],
        "cells": cells,
    }
    record["settings"] = {"processes": 2, "model": None, "seed": 42}
    (tmp_path / "cpu.json").write_text(json.dumps(record))
    text = page(tmp_path)
    assert "| loran | 0 |\n| lora | **differs** 1.0e-01 |\n| delora | (1) |" in text
    assert "1. DeLoRA needs the norms of the weights" in text
    assert "1 agrees, 1 differs, 1 refused" in text and "## cpu: 2 processes, CPU (some CPU)" in text
