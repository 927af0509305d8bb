"""The job script without SLURM (`step_stubs.py`): signals that reach one process of each node, and what comes of an attempt."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from step_stubs import Attempt


@pytest.mark.parametrize(
    ("where", "number", "ends"),
    [
        ("script", signal.SIGUSR1, (75, "requeued")),
        ("step", signal.SIGUSR1, (75, "requeued")),
        ("step", signal.SIGTERM, (75, "requeued")),
        ("step", signal.SIGINT, (130, "failed")),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_to_the_shell_of_a_step_reaches_training(
    tmp_path: Path, where: str, number: signal.Signals, ends: tuple[int, str]
) -> None:
    """And not the launchers, which would die of it; the exit code is kept."""
    attempt = Attempt(tmp_path, "listen", nodes=2)
    attempt.listens(4)
    if where == "script":
        attempt.process.send_signal(number)
    else:
        attempt.signal_tasks(number)
    assert attempt.ends() == ends, attempt.said
    assert {path.name for path in attempt.run.glob("launcher-*")} == {"launcher-0", "launcher-1"}
    assert attempt.asked("requeue") == (ends[1] == "requeued")
    options = (attempt.run / "srun").read_text().split()
    assert {"--wait=0", "--cpu-bind=none", "--kill-on-bad-exit=1"} <= set(options)


def test_a_signal_while_the_first_process_scores_is_no_crash(tmp_path: Path) -> None:
    """The others have said 0 by then, here and on the other node."""
    attempt = Attempt(tmp_path, "score", nodes=2)
    attempt.listens(1)
    attempt.process.send_signal(signal.SIGUSR1)
    assert attempt.ends() == (75, "requeued")


@pytest.mark.parametrize(("plan", "ends"), [("0", (0, "done")), ("2", (2, "failed")), ("1", (1, "requeued"))])
def test_exit_codes(tmp_path: Path, plan: str, ends: tuple[int, str]) -> None:
    assert Attempt(tmp_path, plan).ends() == ends


@pytest.mark.parametrize(("restart", "ends"), [(0, (2, "failed")), (1, (1, "requeued"))])
def test_preflight_ends_a_job_at_its_first_start_only(tmp_path: Path, restart: int, ends: tuple[int, str]) -> None:
    """What it refuses later may pass, and is bounded as crashes are."""
    attempt = Attempt(tmp_path, "0", restart, PREFLIGHT="1", REFUSES="2")
    assert attempt.ends() == ends
    assert not list((attempt.run / "logs").glob("*rank*"))  # no training
    assert "preflight of 0" in attempt.said and "--timeout 600" in attempt.said
    assert "preflight of 1" in attempt.log("node0.log") and "preflight of 1" not in attempt.log("preflight.log")
    assert attempt.asked("requeue") == restart
    for _ in range(2 * restart):
        ends = Attempt(tmp_path, "0", restart, PREFLIGHT="1", REFUSES="2").ends()
    assert ends == ((1, "gave_up") if restart else (2, "failed"))


def test_a_controller_that_is_slow_to_answer_is_asked_again(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "75", BUSY="3")
    assert attempt.ends() == (75, "requeued")
    assert (attempt.asked("show"), attempt.asked("requeue")) == (4, 4)


def test_one_that_never_answers_ends_the_attempt(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "75", BUSY="100")
    assert attempt.ends() == (75, "ended_by_slurm")
    assert (attempt.asked("show"), attempt.asked("requeue")) == (5, 0)


@pytest.mark.parametrize(("why", "ends"), [("ended_by_slurm", (75, "requeued")), ("requeued", (1, "gave_up"))])
def test_the_bound_counts_what_the_script_asked_for(tmp_path: Path, why: str, ends: tuple[int, str]) -> None:
    """Not preemptions, and not what another job of the folder did."""
    lines = [{"event": "end", "job": "77", "why": why}] * 21 + [{"event": "end", "job": "78", "why": "requeued"}] * 21
    (tmp_path / "run/launch").mkdir(parents=True)
    (tmp_path / "run/launch/attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attempt = Attempt(tmp_path, "75", restart=21)
    assert attempt.ends() == ends
