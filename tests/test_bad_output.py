"""Disks that are full or read-only, for real: exit code 2, one message, and every file whole or absent.

A tiny tmpfs is mounted where that is permitted (as root, on Linux); /dev/full and /sys serve where it is not.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from curvelora import cli
from curvelora.loading import load_adapter
from curvelora_eval.files import temporary_for
from curvelora_training import checkpointing, finetune
from curvelora_training.checkpoint import flaw
from world import WEIGHTS, World, check_message

torch.set_num_threads(1)
linux = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full and /sys")


@pytest.fixture
def world(tmp_path: Path, tiny_models: dict[str, Path], root: Path) -> World:
    return World(tmp_path, tiny_models, root / "tests/data")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mount("size=64k")` -> a folder with a file system of its own; `mount("remount,ro")` changes its options."""
    folder = tmp_path / "mount"
    folder.mkdir()
    mounted = False

    def mount_tmpfs(options: str) -> Path:
        nonlocal mounted
        if shutil.which("mount") is None:
            pytest.skip("there is no `mount` here")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, timeout=30
        )
        if done.returncode != 0:
            pytest.skip("mounting is not permitted here; it needs root")
        mounted = True
        return folder

    yield mount_tmpfs
    if mounted:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


def train(world: World, *arguments: str) -> int:
    return finetune.main(["--config", world.recipe({}), *arguments])


def evaluate(world: World, out: Path | str) -> int:
    arguments = ["--adapter", world.adapter(), "--data", world.rows, "--limit", "8", "--out", str(out)]
    return cli.main(["eval", *arguments])


def check_whole(folder: Path) -> None:
    """Whatever stands in a run folder can be read to its end, and nothing temporary is left."""
    for file in folder.rglob("*"):
        assert not file.name.endswith(".tmp"), file
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        if file.suffix == ".safetensors":
            load_file(file)
    for checkpoint in (folder / "checkpoints").glob("*"):
        assert flaw(checkpoint) is None


# Sizes at which the disk ran full in one part of a run or the next: each library has its own exception for it. A run of four
# steps with a checkpoint every two writes about 250 KB.
@pytest.mark.parametrize("size", [4, 8, 12, 24, 48, 64, 80, 96, 128, 160, 192])
def test_a_full_disk_while_training(
    size: int, world: World, mount: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mount(f"size={size}k") / "run"
    assert train(world, f"output={folder}") == 2
    check_message(capsys.readouterr().err, ["No space left on device", str(folder)])
    check_whole(folder)
    assert not (folder / "adapter").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_to_resume_from(
    world: World, mount: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mount("size=128k") / "run"
    assert train(world, f"output={folder}") == 2
    check_message(capsys.readouterr().err, ["checkpoint-4 cannot be saved", "--resume"])
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["checkpoint-2"]
    mount("remount,size=8m")
    assert train(world, f"output={folder}", "--resume") == 0
    assert "resuming from" in capsys.readouterr().out
    base = AutoModelForSequenceClassification.from_pretrained(world.models["bert"], num_labels=2)
    load_adapter(base, folder / "adapter")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]  # 0 is the start


def test_a_disk_that_turns_read_only_leaves_the_earlier_checkpoint(
    world: World,
    mount: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As file systems do after an error: in the middle of the second checkpoint, of which the half stays there for then."""
    folder = mount("size=8m") / "run"
    original, calls = checkpointing.gather_moments, []

    def turn(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            mount("remount,ro")
        return original(*arguments)

    monkeypatch.setattr(checkpointing, "gather_moments", turn)
    assert train(world, f"output={folder}") == 2
    check_message(capsys.readouterr().err, ["checkpoint-4 cannot be saved", "Read-only file system", "--resume"])
    mount("remount,rw")
    (folder / "lease.json").unlink()  # it could not be given back; that this process is dead cannot be shown here
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"checkpoint-2", ".checkpoint-4.tmp"}
    assert train(world, f"output={folder}", "--resume") == 0
    assert f"resuming from {folder / 'checkpoints/checkpoint-2'}" in capsys.readouterr().out
    check_whole(folder)


# without steps there are no checkpoints, so that the adapter itself meets the full disk
@pytest.mark.parametrize("size", [12, 20, 32])
def test_a_full_disk_while_the_adapter_is_saved(
    size: int, world: World, mount: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mount(f"size={size}k") / "run"
    assert train(world, f"output={folder}", "training.max_steps=0") == 2
    check_message(capsys.readouterr().err, [f"{folder / 'adapter'} cannot be saved (No space left on device)"])
    check_whole(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "config.yaml", "environment.json"]


def test_a_full_disk_while_scores_are_written(
    world: World, mount: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = mount("size=8k")
    (out / "evaluation.json").write_text('{"earlier": true}')
    (out / "filler").write_bytes(b"x" * 4096)
    assert evaluate(world, out) == 2
    check_message(capsys.readouterr().err, ["No space left on device"])
    assert {p.name for p in out.iterdir()} == {"evaluation.json", "filler"}
    assert (out / "evaluation.json").read_text() == '{"earlier": true}'


def test_a_full_disk_while_a_report_is_written(
    world: World, mount: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    world.file("done/result.json", '{"schema": 1, "name": "a run"}')
    out = mount("size=8k")
    (out / "report.html").write_text("earlier")
    assert cli.main(["report", world.path("done"), "--out", str(out)]) == 2
    check_message(capsys.readouterr().err, ["No space left on device"])
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("report.html", "earlier")]


def test_a_read_only_disk(world: World, mount: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = mount("size=1m")
    mount("remount,ro")
    for command in (lambda: train(world, f"output={folder / 'run'}"), lambda: evaluate(world, folder / "scores")):
        assert command() == 2
        check_message(capsys.readouterr().err, ["cannot be written (Read-only file system)", "another output"])
    assert list(folder.iterdir()) == []


@linux
def test_a_folder_in_which_nothing_can_be_made(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (lambda: train(world, "output=/sys/kernel/run"), lambda: evaluate(world, "/sys/kernel/scores")):
        assert command() == 2
        check_message(capsys.readouterr().err, ["/sys/kernel", "cannot be written", "another output"])


@linux
def test_a_full_metrics_file(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(world.path("run"))
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    assert train(world, "--resume") == 2
    check_message(capsys.readouterr().err, ["metrics.jsonl cannot be written (No space left on device)"])
    check_whole(folder)


@linux
@pytest.mark.parametrize("name", ["evaluation.json", "predictions.jsonl"])
def test_a_full_disk_keeps_earlier_scores(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(world.path("scores"))
    out.mkdir()
    (out / name).write_text("earlier")
    # what is written first under a temporary name meets the full device
    temporary_for(out / name).symlink_to("/dev/full")
    assert evaluate(world, out) == 2
    check_message(
        capsys.readouterr().err, [f"{name} cannot be written (No space left on device)", "nothing was changed"]
    )
    assert (out / name).read_text() == "earlier"
    assert not list(out.glob(".*.tmp"))


def test_stopping_while_a_checkpoint_is_written_leaves_none(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        (half,) = Path(world.path("run/checkpoints")).iterdir()
        assert half.name == ".checkpoint-2.tmp" and (half / WEIGHTS).is_file()  # the first half is written
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointing, "gather_moments", stop)
    assert train(world) == 130
    assert "continue with --resume" in capsys.readouterr().err
    assert list(Path(world.path("run/checkpoints")).iterdir()) == []
