"""The attempt fence: two attempts never write one run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from curvelora.errors import UserError
from curvelora_training import lease as lease_module
from curvelora_training import run as run_module
from curvelora_training.finetune import main
from curvelora_training.lease import STALE, Lease, describe_attempt, is_over
from run_files import result


def put(folder: Path, age: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A lease that another attempt, by default a live process of another machine, renewed `age` seconds ago."""
    holder = (
        describe_attempt() | {"host": "node7", "machine": "node7 boot pids", "pid": 4242, "slurm_job": "17"} | changes
    )
    folder.mkdir(exist_ok=True)
    (folder / "lease.json").write_text(json.dumps(holder))
    os.utime(folder / "lease.json", times=(time.time() - age,) * 2)
    return holder


def gone() -> dict[str, Any]:
    """A process of this machine that has ended."""
    code = "import json; from curvelora_training.lease import describe_attempt; print(json.dumps(describe_attempt()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_lease_is_exclusive_and_given_back(tmp_path: Path) -> None:
    first, second = Lease(tmp_path / "run"), Lease(tmp_path / "run")
    first.check_free()
    assert not (tmp_path / "run").exists()
    first.take()
    first.confirm()
    for refused in (second.check_free, second.take):
        with pytest.raises(UserError, match=rf"held by another attempt \(process {os.getpid()} on .*, since 20"):
            refused()
    second.release()  # what is not held is not given back
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lease.json"]
    first.release()
    assert list((tmp_path / "run").iterdir()) == []
    second.take()
    second.release()


@pytest.mark.parametrize("age", [0, STALE - 60])
def test_a_live_attempt_elsewhere_is_not_disturbed(tmp_path: Path, age: float) -> None:
    put(tmp_path / "run", age)
    before = (tmp_path / "run/lease.json").read_bytes()
    with pytest.raises(UserError) as caught:
        Lease(tmp_path / "run").take()
    said = str(caught.value)
    assert "process 4242 on node7, SLURM job 17, since 20" in said and "heard of" in said and "15 minutes" in said
    assert "wait for it, stop it, or name another output" in said and "\n" not in said
    assert (tmp_path / "run/lease.json").read_bytes() == before


@pytest.mark.parametrize("why", ["stale", "requeued", "gone", "another process of this number", "unreadable and stale"])
def test_a_dead_attempt_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    folder = tmp_path / "run"
    if why == "stale":
        put(folder, STALE + 60)
    elif why == "requeued":
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        put(folder, slurm_restart=0)
    elif why == "gone":
        put(folder, **gone())
    elif why == "unreadable and stale":
        put(folder)
        (folder / "lease.json").write_text("")
        os.utime(folder / "lease.json", times=(time.time() - STALE - 60,) * 2)
    else:
        me = describe_attempt()
        put(folder, **me | {"started": me["started"] - 3600})
    lease = Lease(folder)
    lease.check_free()
    lease.take()
    assert json.loads((folder / "lease.json").read_text())["token"] == lease.me["token"]
    assert [p.name for p in folder.iterdir()] == ["lease.json"]
    lease.release()


def test_who_is_over() -> None:
    me = describe_attempt() | {"slurm_job": "17", "slurm_restart": 2}
    other = me | {"machine": "node7 boot pids", "pid": 1}
    assert is_over(other | {"slurm_restart": 1}, me)
    assert not is_over(other | {"slurm_restart": 2}, me) and not is_over(other | {"slurm_restart": 3}, me)
    assert not is_over(other | {"slurm_restart": 1, "slurm_job": "18"}, me)
    assert not is_over(other | {"slurm_job": None}, me | {"slurm_job": None})
    assert not is_over(me, me) and is_over(me | {"started": me["started"] - 60}, me)
    assert not is_over({}, me)


def test_the_loser_finds_out_before_it_writes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    old, new = Lease(folder), Lease(folder)
    old.take()
    os.utime(folder / "lease.json", times=(time.time() - STALE - 60,) * 2)  # it slept
    new.take()
    with pytest.raises(
        UserError, match=r"was taken over by another attempt .*: this one stops and writes nothing more"
    ):
        old.confirm()
    old.release()
    new.confirm()
    assert json.loads((folder / "lease.json").read_text())["token"] == new.me["token"]
    new.release()


def test_of_many_attempts_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at a free folder, then eight at a dead attempt's, ten times."""
    monkeypatch.setattr(lease_module, "agree", lambda problem: _raise(problem))
    for turn in range(10):
        folder = tmp_path / str(turn)
        for age in (None, STALE + 60):
            if age is not None:
                put(folder, age)
            leases = [Lease(folder) for _ in range(8)]
            barrier = threading.Barrier(8)
            refused: list[UserError] = []

            def attempt(lease: Lease, barrier: threading.Barrier = barrier, refused: list[UserError] = refused) -> None:
                barrier.wait()
                try:
                    lease.take()
                except UserError as error:
                    refused.append(error)

            threads = [threading.Thread(target=attempt, args=(lease,)) for lease in leases]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            (winner,) = [lease for lease in leases if lease.held]
            assert len(refused) == 7
            winner.confirm()
            winner.release()
            assert list(folder.iterdir()) == []


def _raise(problem: UserError | None) -> None:
    if problem:
        raise problem


def test_it_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEWAL", 0.01)
    lease = Lease(tmp_path)
    lease.take()
    os.utime(lease.path, times=(1e9, 1e9))
    until = time.monotonic() + 60
    while lease.path.stat().st_mtime < 1e9 + 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert lease.path.stat().st_mtime > time.time() - 120
    put(tmp_path)  # another attempt's is not renewed
    os.utime(lease.path, times=(1e9, 1e9))
    time.sleep(0.2)
    assert lease.path.stat().st_mtime == 1e9
    lease.release()
    assert lease.path.exists()


class TakenOver(TrainerCallback):
    """Another attempt takes the folder over in the middle of the fifth step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            put(self.folder)


def test_a_run_that_was_taken_over_writes_nothing_more(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    original, folder = run_module.AdapterTrainer, Path(recipe["output"])
    path = write(recipe, **{"training.save_every": 2, "training.log_every": 2})
    with monkeypatch.context() as patched:
        patched.setattr(
            run_module,
            "AdapterTrainer",
            lambda *args, callbacks, **kwargs: original(*args, callbacks=[*callbacks, TakenOver(folder)], **kwargs),
        )
        assert main(["--config", str(path)]) == 2
    assert "was taken over by another attempt (process 4242 on node7" in capsys.readouterr().err
    assert max(int(p.name.rpartition("-")[2]) for p in (folder / "checkpoints").iterdir()) == 4
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4 and not (folder / "adapter").exists()
    # whoever holds it keeps it, with --resume and with --overwrite, and no weight is loaded before that is said
    monkeypatch.setattr(run_module, "load_processor", None)
    before = (folder / "metrics.jsonl").read_bytes()
    for option in ("--resume", "--overwrite"):
        assert main(["--config", str(path), option]) == 2
        assert "is held by another attempt" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("place", ["summary", "evaluate_rows"])
def test_a_run_that_was_taken_over_at_its_end_writes_no_result(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Before the adapter is saved, and while the test rows are scored."""
    folder, original = Path(recipe["output"]), getattr(run_module, place)

    def taken(*args: Any, **kwargs: Any) -> Any:
        put(folder)
        return original(*args, **kwargs)

    monkeypatch.setattr(run_module, place, taken)
    assert main(["--config", str(write(recipe))]) == 2
    assert (folder / "adapter").exists() is (place == "evaluate_rows")
    assert not any((folder / name).exists() for name in ("result.json", "evaluation.json", "predictions.jsonl"))
    assert json.loads((folder / "lease.json").read_text())["host"] == "node7"


def test_a_run_leaves_no_lease_behind(recipe: dict, write: Callable[..., Path], finetune: Callable[..., Path]) -> None:
    folder = finetune(write(recipe))
    assert result(folder)["status"] == "completed" and not list(folder.glob("*lease*")) + list(folder.glob(".lease*"))
