"""Several processes share the work; one that is killed ends the others, and any number goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from curvelora import cli
from named_tasks import read_lines
from run_files import result

PATIENCE = 120  # seconds; a process that takes longer hangs
PLACE = "lora/piqa-loglikelihood"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _process(rank: int, world: int, port: int, arguments: list[str], dies_at: int | None) -> None:
    """One forked process of an evaluation; `dies_at`: killed before its so-manieth batch."""
    from curvelora_eval.predict.choices import Choices

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    asked: list[int] = []
    ask = Choices.predict

    def predict(self: Choices, model: Any, units: list[int]) -> Any:
        if len(asked) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        asked.append(1)
        return ask(self, model, units)

    Choices.predict = predict
    code = cli.main(["eval", *arguments])
    os._exit(code)  # what pytest would do at the end of a process is not this one's


def run(world: int, arguments: list[str], dies: dict[int, int] | None = None) -> list[int]:
    """Exit codes of `world` processes, rank by rank (-9: killed)."""
    context, port = get_context("fork"), free_port()
    started = [
        context.Process(target=_process, args=(rank, world, port, arguments, (dies or {}).get(rank)))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
    stuck = [process for process in started if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "processes hang"
    return [process.exitcode for process in started]


@pytest.fixture
def arguments(llama_folder: Path, task_data: Path, adapters: dict[str, Path]) -> list[str]:
    given = ["--model", llama_folder, "--dtype", "float32", "--data-dir", task_data, "--batch-size", 2]
    given += ["--adapter", adapters["lora"], "--task", "piqa", "--protocol", "loglikelihood", "--batch-check", 2]
    return [str(argument) for argument in given]


def test_two_processes_and_one_that_dies(arguments: list[str], tmp_path: Path, capfd: Any) -> None:
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "one")]) == 0
    whole = (tmp_path / "one" / PLACE / "predictions.jsonl").read_bytes()
    out = ["--out", str(tmp_path / "two")]
    assert run(2, [*arguments, *out]) == [0, 0]
    assert (tmp_path / "two" / PLACE / "predictions.jsonl").read_bytes() == whole
    assert result(tmp_path / "two" / PLACE, "evaluation.json")["processes"] == 2
    assert (tmp_path / "two/summary.md").is_file()

    capfd.readouterr()
    out = ["--out", str(tmp_path / "killed")]
    assert run(2, [*arguments, *out], dies={1: 2}) == [2, -signal.SIGKILL]
    assert "another process of this evaluation has ended" in capfd.readouterr().err
    folder = tmp_path / "killed" / PLACE
    batches = [len(read_lines(folder / f"predictions.part-{rank}.jsonl")) - 1 for rank in range(2)]
    assert batches == [4, 2]
    assert cli.main(["eval", *arguments, *out]) == 0  # one process goes on where two were
    assert (folder / "predictions.jsonl").read_bytes() == whole
    assert result(folder, "evaluation.json")["resumed_batches"] == 6
    assert {p.name for p in folder.iterdir()} == {"evaluation.json", "predictions.jsonl"}


def test_bad_input_is_said_once(arguments: list[str], tmp_path: Path, capfd: Any) -> None:
    assert run(2, [*arguments, "--out", str(tmp_path / "two"), "--template", "none"]) == [2, 2]
    assert capfd.readouterr().err.count("has no template 'none'") == 1


@pytest.mark.slow
def test_killed_at_several_points(arguments: list[str], tmp_path: Path) -> None:
    """A real process, SIGKILL after so many batches, on and on until it ends by itself."""
    arguments = [*arguments, "--batch-size", "1"]
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / PLACE / "predictions.jsonl").read_bytes()
    folder = tmp_path / "killed" / PLACE
    journal = folder / "predictions.part-0.jsonl"
    command = [sys.executable, "-m", "curvelora.cli", "eval", *arguments, "--out", str(tmp_path / "killed")]
    killed = []
    for lines in (1, 3, 8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            if journal.is_file() and journal.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.001)
        process.kill()
        process.wait()
        process.stderr.close()
        killed.append(process.returncode)
    assert killed.count(-signal.SIGKILL) >= 2  # the others were done before the signal came
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "predictions.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_under_a_real_launcher(arguments: list[str], tmp_path: Path) -> None:
    """torchrun, as docs/evaluation.md writes it: two processes that share the work, and one sentence where they may not."""
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [*launch, "-m", "curvelora.cli", "eval"]
    given = [*command, *arguments, "--out", str(tmp_path / "two")]
    done = subprocess.run(given, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    found = [(tmp_path / name / PLACE / "predictions.jsonl").read_bytes() for name in ("one", "two")]
    assert found[0] == found[1]
    assert result(tmp_path / "two" / PLACE, "evaluation.json")["processes"] == 2

    own = ["--task", "causal_lm", "--data", "rows.jsonl", "--out", str(tmp_path / "own")]
    done = subprocess.run([*command, *own], capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode != 0 and "--data is scored by one process" in done.stderr
    assert not (tmp_path / "own").exists()
