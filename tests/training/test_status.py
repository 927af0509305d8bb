"""`curvelora status`: a run folder that training wrote, at every moment of its life, whole and damaged."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from curvelora.cli import run_guarded, run_module
from curvelora_training.finetune import main
from curvelora_training.lease import STALE, describe_attempt
from curvelora_training.run_folder import RunFolder
from curvelora_training.status import command
from curvelora_training.status.judge import span, status_of

STEPS, EPOCHS = 24, 2
ELSEWHERE = {"token": "t", "host": "n7", "pid": 4711, "started": 1.0, "machine": "n7 boot", "slurm_job": "99"}
ELSEWHERE |= {"slurm_restart": 0, "since": "2026-11-28 14:00:00 +0000"}


@pytest.fixture(scope="module")
def trained(tiny_models: dict[str, Path], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps, 12 an epoch, with a checkpoint every 8."""
    folder = tmp_path_factory.mktemp("status")
    torch.set_num_threads(1)
    rows = str(root / "tests/data/sst2_sentences_train.tsv")
    recipe = {
        "output": str(folder / "run"),
        "model": {"path": str(tiny_models["bert"]), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 16},
        "data": {"train": {"path": rows, "limit": 96}, "validation": {"path": rows, "limit": 8}},
        "adapter": {"method": "loran", "r": 4, "alpha": 8, "target_modules": ["query"]},
        "training": {
            "learning_rate": 1e-3,
            "batch_size": 4,
            "accumulation": 2,
            "epochs": EPOCHS,
            "save_every": 8,
            "keep_checkpoints": 4,
        }
        | {"log_every": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["--config", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def unfinished(run: Path, step: int, age: float = 5.0) -> Path:
    """As the folder was after `step`, with the last line written so many seconds ago; nobody holds it."""
    for name in ("result.json", "evaluation.json", "predictions.jsonl"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "adapter")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    RunFolder(run).forget_after(step)
    aged(run / "metrics.jsonl", age)
    return run


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def held(run: Path, age: float = 5.0, **other: Any) -> Path:
    """As an attempt on another machine holds it."""
    (run / "lease.json").write_text(json.dumps(ELSEWHERE | other), encoding="utf-8")
    aged(run / "lease.json", age)
    return run


def attempts(run: Path, *events: dict[str, Any]) -> Path:
    (run / "launch").mkdir(exist_ok=True)
    (run / "launch/attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return run


def event(kind: str, ago: float, **other: Any) -> dict[str, Any]:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - ago))
    usual = {"job": "99", "restart": 0, "nodes": ["n7", "n8"], "launcher": "torchrun", "processes": 1}
    return {"event": kind, "time": when} | usual | other


def status(*arguments: str | Path) -> int:
    return run_guarded(lambda: run_module(command, "curvelora status", [str(argument) for argument in arguments]))


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and content."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run(trained: Path) -> None:
    before, found = listing(trained), status_of(trained)
    result = json.loads((trained / "result.json").read_text(encoding="utf-8"))
    assert listing(trained) == before
    assert (found["state"], found["step"], found["total_steps"], found["epoch"]) == ("finished", STEPS, STEPS, EPOCHS)
    assert found["loss"] == result["last_loss"] and found["checkpoint"]["step"] == STEPS
    assert found["attempts"] is None and found["holder"] is None and found["seconds_left"] is None
    assert found["notes"] == [] and found["damaged_checkpoints"] == {}


def test_a_run_that_trains(run: Path) -> None:
    found = status_of(held(unfinished(run, 18)))
    assert (found["state"], found["step"], found["total_steps"], found["epochs"]) == ("training", 18, STEPS, EPOCHS)
    assert found["epoch"] == pytest.approx(1.5) and found["checkpoint"]["step"] == 16
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    at = {line["step"]: line["seconds"] for line in lines if "loss" in line}
    assert found["steps_per_second"] == pytest.approx(17 / (at[18] - at[1]))
    assert found["steps_per_second_recent"] == pytest.approx(10 / (at[18] - at[8]))
    assert found["rows_per_second_recent"] == pytest.approx(8 * found["steps_per_second_recent"])
    wanted = max(0.0, 6 / found["steps_per_second_recent"] - found["log_age_seconds"])
    assert found["seconds_left"] == pytest.approx(wanted) and 4 < found["log_age_seconds"] < 60
    assert found["holder"]["host"] == "n7" and found["log_age_seconds"] < 60


def test_steps_of_the_whole_run_are_known_without_a_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    found = status_of(held(unfinished(run, 5)))
    assert found["total_steps"] == STEPS and found["checkpoint"] is None and found["rows_per_second_recent"] is None
    attempts(run, event("start", 60, processes=2))
    assert status_of(run)["rows_per_second_recent"] == pytest.approx(16 * found["steps_per_second_recent"])


def test_an_attempt_after_another_one_has_its_own_clock(run: Path) -> None:
    """`seconds` begins anew at a resume: rates are those within attempts."""
    stopped(run)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        for step, seconds in ((10, 1.0), (12, 3.0), (14, 5.0)):
            stream.write(json.dumps({"step": step, "seconds": seconds, "loss": 0.5, "epoch": step / 12}) + "\n")
    assert status_of(held(run))["steps_per_second_recent"] == 1.0
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        for step, seconds in ((14, 0.5), (16, 4.5)):  # of one that was killed and resumed
            stream.write(json.dumps({"step": step, "seconds": seconds, "loss": 0.5, "epoch": step / 12}) + "\n")
    assert status_of(run)["steps_per_second_recent"] == 0.5


LONG = 3 * 3600.0
HELD: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "training": (lambda run: held(unfinished(run, 10)), "training", ""),
    "starting": (lambda run: held(unfinished(run, 0)), "starting", ""),
    "scores of the unseen rows": (lambda run: held(unfinished(run, STEPS, LONG)), "evaluating", ""),
    "no line for long": (lambda run: held(unfinished(run, 10, LONG)), "stalled", "no log line for 3.0 h"),
    "lease is old": (
        lambda run: held(unfinished(run, 10), STALE - 60),
        "stalled",
        "the lease was not renewed for 14 min",
    ),
    "process is gone": (
        lambda run: held(unfinished(run, 10), **describe_attempt() | {"pid": 2**22 - 1, "started": 1.0}),
        "failed",
        "is gone without a word (killed?); --resume continues from step 8",
    ),
    "process is alive": (lambda run: held(unfinished(run, 10), **describe_attempt()), "training", ""),
    "lease half written": (lambda run: (held(unfinished(run, 10)) / "lease.json").write_text('{"tok'), "training", ""),
}


@pytest.mark.parametrize("name", HELD)
def test_states_of_a_run_that_is_held(run: Path, name: str) -> None:
    prepare, state, why = HELD[name]
    prepare(run)
    found = status_of(run)
    assert found["state"] == state and why in (found["why"] or ""), found


def test_validation_is_no_stall(run: Path) -> None:
    """After the last step of an epoch its validation loss follows, however long that takes."""
    held(unfinished(run, 12, LONG))
    assert status_of(run)["state"] == "stalled", "the validation loss is there"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert "eval_loss" in lines[-1]
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    aged(run / "metrics.jsonl", LONG)
    assert status_of(run)["state"] == "evaluating"


def stopped(run: Path) -> Path:
    unfinished(run, 8)
    RunFolder(run).log({"step": 8, "stopped": {"at": 8, "code": 75, "evaluation_left": False}})
    aged(run / "metrics.jsonl", 60)
    return run


START = event("start", 600)
LEFT: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "stopped": (stopped, "stopped", "with code 75; --resume continues from step 8"),
    "requeued": (
        lambda run: attempts(stopped(run), START, event("end", 0, code=75, why="requeued")),
        "requeued",
        "job 99 ended with code 75, and SLURM starts it again; --resume continues from step 8",
    ),
    "crashed and requeued": (
        lambda run: attempts(unfinished(run, 10), START, event("end", 0, code=1, why="requeued")),
        "requeued",
        "with code 1",
    ),
    "out of time": (
        lambda run: attempts(stopped(run), START, event("end", 0, code=75, why="ended_by_slurm")),
        "stopped",
        "with code 75; SLURM ended it",
    ),
    "gave up": (
        lambda run: attempts(stopped(run), START, event("end", 0, code=75, why="gave_up")),
        "stopped",
        "as often as allowed",
    ),
    "error": (
        lambda run: attempts(unfinished(run, 10, 60), START, event("end", 0, code=2, why="failed")),
        "failed",
        "job 99 ended with code 2 (failed): look at its logs; --resume continues from step 8",
    ),
    "error without a job": (
        lambda run: unfinished(run, 10),
        "failed",
        "ended without finishing and without being stopped",
    ),
    "before the first checkpoint": (lambda run: unfinished(run, 4), "failed", "--resume begins anew"),
    "model is loaded again": (lambda run: attempts(stopped(run), event("start", 0)), "starting", "job 99 began"),
    "nobody took the folder": (
        lambda run: (aged(stopped(run) / "metrics.jsonl", 2 * LONG), attempts(run, event("start", LONG))),
        "stalled",
        "job 99 began 3.0 h ago, and no process of it has taken the folder",
    ),
    "stopped while scoring": (
        lambda run: (run / "result.json").unlink(),
        "stopped",
        "before its scores; --resume continues from step 24",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_states_of_a_run_that_nobody_holds(run: Path, name: str) -> None:
    prepare, state, why = LEFT[name]
    prepare(run)
    found = status_of(run)
    assert found["state"] == state and why in found["why"], found


def test_a_run_that_was_only_submitted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run/launch").mkdir(parents=True)
    assert status(tmp_path / "run") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}: submitted: nothing of it has run yet\n"


def test_a_damaged_checkpoint_is_told_and_left_where_it_is(run: Path) -> None:
    unfinished(run, 18)
    adapter = run / "checkpoints/checkpoint-16/adapter_model.safetensors"
    raw = bytearray(adapter.read_bytes())
    raw[-1] ^= 1
    adapter.write_bytes(raw)
    (run / "checkpoints/.checkpoint-18.tmp").mkdir()
    before, found = listing(run), status_of(run)
    assert found["checkpoint"]["step"] == 8
    assert list(found["damaged_checkpoints"]) == ["checkpoint-16"]
    assert "adapter_model.safetensors was changed" in found["damaged_checkpoints"]["checkpoint-16"]
    assert listing(run) == before


def test_a_checkpoint_that_is_too_large_to_read_is_compared_by_size(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("curvelora_training.status.facts.HASHED", 1000)
    monkeypatch.setattr("curvelora_training.checkpoint._sha256", lambda file: pytest.fail("it was read"))
    assert status(run) == 0
    assert "of the sizes in its manifest (too large to read here)" in capsys.readouterr().out
    (run / "checkpoints/checkpoint-24/moments.safetensors").unlink()
    assert "moments.safetensors is missing" in status_of(run)["damaged_checkpoints"]["checkpoint-24"]


GARBAGE = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b'{"step": "x", "seconds": {}}',
    b'{"steps": "x", "training": 3}',
)
FILES = ("config.yaml", "result.json", "metrics.jsonl", "lease.json", "launch/attempts.jsonl")


@pytest.mark.parametrize("name", [*FILES, "checkpoints/checkpoint-8/manifest.json"])
def test_nothing_in_a_file_is_a_traceback(run: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    attempts(held(unfinished(run, 10)), event("start", 60))
    odd = b'{"step": 9, "seconds": NaN, "epoch": "one", "loss": null, "eval_loss": [], "stopped": 1, "nodes": 3, "event": 7}'
    for content in (*GARBAGE, odd, None):
        (run / name).unlink(missing_ok=True)
        if content is not None:
            (run / name).write_bytes(content)
        for option in ([], ["--json"], [run]):  # one, data, a table
            assert status(run, *option) == 0, content
        assert "Traceback" not in capsys.readouterr().err


def test_a_half_written_last_line_does_not_count(run: Path) -> None:
    held(unfinished(run, 10))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 12, "seconds": 1')
    assert status_of(run)["step"] == 10


def test_what_is_no_run_is_said_after_the_runs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert status(tmp_path / "empty", trained, tmp_path / "none", tmp_path / "file", trained.parent) == 2
    shown = capsys.readouterr()
    assert f"{trained}" in shown.out and "finished" in shown.out
    for part in (
        "empty is no run folder",
        "none does not exist",
        "file is a file",
        f"it holds 1 of them: name {trained.parent}/*",
    ):
        assert part in shown.err
    assert shown.err.startswith("error: ") and "Traceback" not in shown.err


def test_the_page_of_one_run(run: Path, capsys: pytest.CaptureFixture) -> None:
    attempts(
        held(unfinished(run, 18)), event("start", 700), event("end", 650, code=75, why="requeued"), event("start", 600)
    )
    assert status(run) == 0
    lines = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()[1:])
    assert lines["step"].strip() == "18 of 24, epoch 1.50 of 2"
    assert "step 16" in lines["checkpoint"] and "whole by its manifest" in lines["checkpoint"]
    assert lines["attempts"].strip().startswith("2; job 99 began") and "on n7, n8" in lines["attempts"]
    assert "process 4711 on n7, SLURM job 99" in lines["held by"] and "rows/s" in lines["speed"]


def test_watching_ends_when_nothing_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    held(unfinished(run, 10))
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            (run / "lease.json").unlink()

    monkeypatch.setattr("curvelora_training.status.command.time.sleep", sleep)
    assert status(run, "--watch", "7") == 0
    assert waited == [7, 7] and capsys.readouterr().out.count("18 of") == 0
    assert status(run, "--watch", "0") == 2


def test_spans_read_well() -> None:
    assert [span(s) for s in (0, 99, 100, 3599, 6000, 86400, 86400 * 3)] == [
        *("0 s", "99 s", "1.7 min", "60 min", "1.7 h", "24 h", "3.0 days"),
    ]
