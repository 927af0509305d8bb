"""`curvelora merge` on bad input and on disks that fail: one message, nothing loaded in vain, nothing half written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from curvelora import cli
from curvelora_eval import merge
from world import WEIGHTS, World, check_message, edited, truncated, without


@pytest.fixture
def world(tmp_path: Path, tiny_models: dict[str, Path], root: Path) -> World:
    """With a base of its own, which can be damaged."""
    world = World(tmp_path, tiny_models, root / "tests/data")
    base = world.model("llama", lambda folder: None)
    return World(tmp_path, tiny_models | {"llama": Path(base)}, root / "tests/data")


def merged(world: World, *arguments: str) -> int:
    return cli.main(["merge", "--adapter", world.path("adapter"), "--out", world.path("merged"), *arguments])


def quantised(folder: Path) -> None:
    """Give the config of a checkpoint the mark of a quantised one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


# what is wrong -> (what is done to adapter, base and output folder; arguments; what the message must contain)
REFUSED: dict[str, tuple[Callable[[SimpleNamespace], Any], list[str], list[str]]] = {
    "output not empty": (lambda w: (w.out.mkdir(), (w.out / "mine.txt").touch()), [], ["merged is not empty"]),
    "output is a file": (lambda w: w.out.write_text("mine"), [], ["merged is a file"]),
    "no config": (lambda w: without("adapter_config.json")(w.adapter), [], ["there is no adapter_config.json"]),
    "adapter cut off": (lambda w: truncated(WEIGHTS)(w.adapter), [], [WEIGHTS, "truncated, damaged"]),
    "adapter gone": (lambda w: w.adapter.rename(w.adapter.with_name("other")), [], ["adapter is no folder"]),
    "base gone": (lambda w: without("config.json")(w.base), [], ["holds no model"]),
    "base quantised": (lambda w: quantised(w.base), [], ["is quantised itself", "--model"]),
    "no tokenizer": (lambda w: without("tokenizer*")(w.base), [], ["tokenizer"]),
    "no task": (lambda w: without("task.json")(w.adapter), [], ["has no task.json", "--model and --task"]),
    "unknown data": (lambda w: None, ["--data", "none.tsv"], ["none.tsv does not exist"]),
    "limit without data": (lambda w: None, ["--limit", "5"], ["--limit", "give --data"]),
    "batches of nothing": (lambda w: None, ["--batch-size", "0"], ["--batch-size must be at least 1"]),
    "no class names": (
        lambda w: None,
        ["--task", "sequence_classification"],
        ["class names are not known", "--labels"],
    ),
    "an adapter of another size": (
        lambda w: edited("adapter_config.json", r=8)(w.adapter),
        [],
        ["belongs to another model", "4 x 64 in the file and 8 x 64 in the model"],
    ),
    "no GPU": (lambda w: None, ["--device", "cuda"], ["needs a GPU"]),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_bad_input_is_refused_before_anything_is_loaded(
    wrong: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if wrong == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    damage, arguments, said = REFUSED[wrong]
    folder = Path(world.adapter("llama"))
    damage(SimpleNamespace(adapter=folder, base=world.models["llama"], out=Path(world.path("merged"))))
    before = world.files()
    for function in ("load_base", "load_adapter"):
        monkeypatch.setattr(merge, function, lambda *_, **__: pytest.fail("weights were loaded"))
    assert merged(world, *arguments) == 2
    check_message(capsys.readouterr().err, said)
    assert world.files() == before


def test_the_folder_one_is_in(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be replaced below the user's feet; one in it is fine."""
    world.adapter("llama")
    (world.folder / "here").mkdir()
    monkeypatch.chdir(world.folder / "here")
    assert merged(world, "--out", ".") == 2
    check_message(capsys.readouterr().err, ["the folder you are in", "name one in it"])
    assert merged(world, "--out", "deep/merged") == 0 and Path("deep/merged/merge.json").is_file()


# each is met once, with the folder that is being written among its arguments
STEPS = {
    "weights": (PreTrainedModel, "save_pretrained"),
    "merge.json": (Path, "replace"),
    "task.json": (Path, "write_text"),
    "last rename": (Path, "rename"),
}


@pytest.mark.parametrize(
    ("step", "exists"), [*((step, False) for step in STEPS), ("weights", True), ("task.json", True)]
)
def test_a_failure_while_writing_leaves_nothing(
    step: str, exists: bool, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.adapter("llama")
    out = Path(world.path("merged"))
    if exists:
        out.mkdir()
    before, reached = world.files(), []
    real = getattr(*STEPS[step])

    def fail(*arguments: Any, **options: Any) -> Any:
        if not any(".merged." in str(argument) for argument in arguments):
            return real(*arguments, **options)
        half = next(world.folder.glob(".merged.*"))
        (half / "half.safetensors").write_bytes(b"half")
        reached.append(half)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*STEPS[step], fail)
    assert merged(world) == 2
    check_message(capsys.readouterr().err, [f"{out}", "cannot be written (", "No space left on device"])
    assert len(reached) == 1
    assert world.files() == before and out.exists() == exists
    assert not list(world.folder.glob(".merged*"))
    monkeypatch.undo()
    assert merged(world) == 0  # and nothing stands in the way of another try


def test_stopping_while_writing_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: PreTrainedModel, folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    world.adapter("llama")
    before = world.files()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", stop)
    assert merged(world) == 130
    assert world.files() == before and not list(world.folder.glob(".merged*"))


def test_an_adapter_with_nan_is_not_merged(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(world.adapter("llama"))
    tensors = load_file(folder / WEIGHTS)
    for tensor in tensors.values():
        tensor[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    before = world.files()
    assert merged(world) == 2
    check_message(capsys.readouterr().err, ["NaN or infinite weights"])
    assert world.files() == before
