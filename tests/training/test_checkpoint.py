"""The files of a checkpoint: every damage is found, what is not whole is named and passed over, what was saved before stays."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR

from curvelora.errors import UserError
from curvelora_training import checkpoint as format_module
from curvelora_training import checkpointing
from curvelora_training.checkpoint import (
    MANIFEST,
    delete_beyond,
    flaw,
    found_in,
    newest_whole,
    read_manifest,
    seal,
    step_of,
    sweep,
    temporary_for,
)
from curvelora_training.finetune import main
from curvelora_training.moments import gather_moments, restore_moments
from curvelora_training.rng import read_rng, rng_state, set_rng_state, write_rng
from run_files import metrics, result

FLIPS = 24  # bytes a file, beside its first and last


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], root: Path) -> Path:
    """A checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = {
        "output": str(folder / "run"),
        "model": {"path": str(tiny_models["bert"]), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 32},
        "data": {"train": {"path": str(root / "tests/data/sst2_sentences_train.tsv"), "limit": 16}},
        "adapter": {"method": "loran", "r": 2, "target_modules": ["query"]},
        "training": {"max_steps": 2, "batch_size": 8},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    assert main(["--config", str(folder / "recipe.json")]) == 0
    return folder / "run/checkpoints/checkpoint-2"


def small(folder: Path, step: int, **facts: Any) -> Path:
    """A checkpoint with two little files."""
    final = folder / f"checkpoint-{step}"
    temporary = temporary_for(final)
    (temporary / "rng").mkdir(parents=True)
    (temporary / "a.json").write_text(f"{{}} {step}", encoding="utf-8")
    (temporary / "rng/b.bin").write_bytes(bytes(range(256)))
    seal(temporary, final, facts)
    return final


def test_what_a_checkpoint_has(whole: Path) -> None:
    names = {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()}
    needed = {"adapter_model.safetensors", "adapter_config.json", "moments.safetensors", "scheduler.json"}
    needed |= {"trainer_state.json", "rng/rank-00000.safetensors", MANIFEST}
    assert needed <= names
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl"))]
    assert flaw(whole) is None
    manifest = read_manifest(whole)
    assert set(manifest["files"]) == names - {MANIFEST}
    facts = {"step": 2, "processes": 1, "batch_size": 8, "accumulation": 1, "global_batch": 8, "shares": None}
    assert {key: manifest[key] for key in facts} == facts
    moments = load_file(whole / "moments.safetensors")
    parameters = {key.partition(":")[2] for key in moments}
    assert {key.partition(":")[0] for key in moments} == {"exp_avg", "exp_avg_sq", "step"}
    assert len(moments) == 3 * len(parameters) and any(name.endswith("loran_A.default") for name in parameters)
    assert all(tensor.item() == 2 for key, tensor in moments.items() if key.startswith("step:"))
    assert all(tensor.abs().max() > 0 for key, tensor in moments.items() if key.startswith("exp_avg_sq:"))


def test_every_damage_is_found(whole: Path, tmp_path: Path) -> None:
    """Each region of each file with a bit turned, or the file cut there, lengthened, emptied or gone; also the manifest's own."""
    copy, draw = tmp_path / "checkpoint-2", random.Random(0)
    shutil.copytree(whole, copy)
    checked = 0
    for file in sorted(p for p in copy.rglob("*") if p.is_file()):
        content = file.read_bytes()
        edges = [round(i * len(content) / FLIPS) for i in range(FLIPS + 1)]
        places = {0, len(content) - 1} | {draw.randrange(low, high) for low, high in pairwise(edges) if low < high}
        damaged = [
            content[:p] + bytes([content[p] ^ (1 << draw.randrange(8))]) + content[p + 1 :] for p in sorted(places)
        ]
        damaged += [content[:p] for p in sorted(places)] + [content + b"\0", content[1:]]
        for bad in damaged:
            file.write_bytes(bad)
            assert (why := flaw(copy)) is not None, file
            assert file.name in why
            checked += 1
        file.unlink()
        assert file.name in flaw(copy)
        file.write_bytes(content)
        assert flaw(copy) is None
    assert checked > 7 * FLIPS
    (copy / "foreign.json").write_text("{}", encoding="utf-8")
    assert flaw(copy) == "foreign.json is not in its manifest"


def test_one_without_a_manifest_is_an_older_versions(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/optimizer.pt").write_bytes(b"x")
    assert flaw(tmp_path / "checkpoint-5") == f"{MANIFEST} cannot be read (No such file or directory)"


def test_the_newest_whole_one_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 20, 100):  # by number, not by name
        small(tmp_path, step)
    (tmp_path / "checkpoint-100/a.json").write_text("{} 101", encoding="utf-8")
    (tmp_path / "checkpoint-20/rng/b.bin").unlink()
    (tmp_path / "checkpoint-x").mkdir()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-5"
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{tmp_path}/checkpoint-100 is not whole and is passed over: a.json was changed: its sha256 is another than when it was "
        "written; it is damaged-checkpoint-100 now",
        f"{tmp_path}/checkpoint-20 is not whole and is passed over: rng/b.bin is missing; it is damaged-checkpoint-20 now",
    ]
    assert [step_of(p) for p in found_in(tmp_path)] == [5]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 8, 16):
        small(tmp_path, step)
    delete_beyond(tmp_path, 2, {2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-16", "checkpoint-2", "checkpoint-8"]
    delete_beyond(tmp_path, 1, {None})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-16"]


def test_stopped_at_any_point_of_writing_one_of_the_two_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at each call to the disk while a checkpoint is replaced, then the sweep of the next start."""

    class Killed(BaseException):
        pass

    calls = ("fsync", "replace")
    for stop in range(100):
        folder = tmp_path / str(stop)
        small(folder, 1)
        small(folder, 2, age="old")
        left = stop

        def interrupting(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return original(*arguments)

            return call

        with monkeypatch.context() as patched:
            for name in calls:
                patched.setattr(format_module.os, name, interrupting(getattr(os, name)))
            try:
                small(folder, 2, age="new")
                ended = True
            except Killed:
                ended = False
        sweep(folder)
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]
        assert flaw(folder / "checkpoint-1") is None and flaw(folder / "checkpoint-2") is None
        assert read_manifest(folder / "checkpoint-2")["age"] in (("new",) if ended else ("old", "new"))
        if ended:
            break
    assert 5 < stop < 99


def test_random_numbers_go_on(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.standard_normal(1)  # each keeps the second of a pair
    write_rng(tmp_path / "rng", [rng_state(), rng_state()])

    def draw() -> list[Any]:
        own = [random.gauss(0, 1), random.random(), *np.random.standard_normal(3).tolist()]
        return [*own, *torch.randn(3).tolist(), torch.randperm(9).tolist()]

    wanted = draw()
    for rank in (0, 1, 2, 3):  # more processes than wrote it
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        set_rng_state(read_rng(tmp_path / "rng", rank, 2))
        assert draw() == wanted


def test_other_processes_are_seen_before_a_model_is_loaded(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On three: refused; and a recipe with other batches whose steps have as many rows is taken."""
    from curvelora_training.prepare import load_and_prepare

    path = write(recipe, **{"training.max_steps": 2, "training.save_every": 1})
    folder = finetune(path)
    (folder / "result.json").unlink()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="8 rows, which 3 processes cannot share in equal parts: start 2 or 4"):
        load_and_prepare(path, [], resume=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    spec = load_and_prepare(path, [], resume=True).recipe.training
    assert (spec.batch_size, spec.accumulation) == (2, 1)
    spec = load_and_prepare(path, ["training.batch_size=1", "training.accumulation=2"], resume=True).recipe.training
    assert (spec.batch_size, spec.accumulation) == (1, 2)
    with pytest.raises(UserError, match=r"training\.batch_size was 8 and is 4"):
        load_and_prepare(path, ["training.batch_size=4"], resume=True)


def test_what_changes_no_update_may_change(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path]
) -> None:
    folder = finetune(write(recipe, **{"training.max_steps": 2, "training.save_every": 1}))
    kept = (folder / "config.yaml").read_bytes()
    (folder / "result.json").unlink()
    changes = {"name": "again", "training.keep_checkpoints": 1, "training.eval_batch_size": 4}
    finetune(write(recipe, **{"training.max_steps": 2, "training.save_every": 1}, **changes), "--resume")
    assert (folder / "config.yaml").read_bytes() == kept and result(folder)["name"] == "again"
    (folder / "result.json").unlink()
    assert (
        main(["--config", str(write(recipe, **{"training.max_steps": 3, "training.save_every": 1})), "--resume"]) == 2
    )


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """`losses([0.7, 0.6])`: what the next evaluations find."""
    from curvelora_training.trainer import AdapterTrainer

    original = AdapterTrainer.evaluation_loop

    def find(values: list[float]) -> None:
        left = iter(values)

        def loop(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            output.metrics["eval_loss"] = next(left)
            return output

        monkeypatch.setattr(AdapterTrainer, "evaluation_loop", loop)

    return find


def test_the_best_checkpoint_is_kept(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    losses: Callable[[list[float]], None],
    tmp_path: Path,
) -> None:
    """Found between two regular checkpoints, which roll on without it; resumed, the run still knows it."""
    changes = {"training.save_every": 4, "training.evaluate_every": 3, "training.keep_checkpoints": 1}
    changes |= {"training.keep_best": True, "data.validation": recipe["data"]["test"], "training.log_every": 100}
    path = write(recipe, **changes)
    losses([0.7, 0.6, float("nan"), 0.65])  # after 3, 6, 9 and 12 steps
    folder = finetune(path)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-12"}
    assert result(folder)["best_checkpoint"] == {"step": 6, "eval_loss": 0.6}
    # every checkpoint has a line of its own, so that the means of losses begin anew where a resumed run does
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 3, 4, 6, 8, 9, 12]

    for name in ("result.json", "checkpoints/checkpoint-12"):
        (folder / name).rename(folder / f"{Path(name).name}.away")
    losses([0.61, 0.65])
    again = finetune(path, "--resume")
    assert {p.name for p in (again / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-12"}
    assert result(again)["best_checkpoint"] == {"step": 6, "eval_loss": 0.6}
    for name in ("adapter_model.safetensors", "moments.safetensors"):
        assert (again / "checkpoints/checkpoint-12" / name).read_bytes() == (
            folder / "checkpoint-12.away" / name
        ).read_bytes()


def test_the_best_needs_rows_to_compare_by(
    recipe: dict[str, Any], write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write(recipe, **{"training.keep_best": True}))]) == 2
    assert "training.keep_best needs validation rows to compare by: name data.validation" in capsys.readouterr().err


def rewritten(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """A checkpoint with a manifest that fits, but with other tensors than the run needs."""
    temporary = temporary_for(folder)
    facts = {key: value for key, value in read_manifest(folder).items() if key not in ("files", "schema")}
    folder.rename(temporary)
    (temporary / MANIFEST).unlink()
    save_file(change(load_file(temporary / name)), temporary / name)
    seal(temporary, folder, facts)


def test_a_checkpoint_of_another_model_is_refused(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is left at zero in silence: neither a moment nor a weight."""
    path = write(recipe, **{"training.max_steps": 2, "training.save_every": 1, "training.keep_checkpoints": 1})
    folder = finetune(path)
    (folder / "result.json").unlink()
    newest = folder / "checkpoints/checkpoint-2"
    name = next(
        key.partition(":")[2] for key in load_file(newest / "moments.safetensors") if key.startswith("exp_avg:")
    )
    rewritten(newest, "moments.safetensors", lambda held: {k: v for k, v in held.items() if not k.endswith(name)})
    assert main(["--config", str(path), "--resume"]) == 2
    assert f"cannot be continued from: its optimiser has nothing for {name}, which trains" in capsys.readouterr().err
    rewritten(newest, "moments.safetensors", lambda held: held | {"exp_avg:foreign": torch.zeros(1)})
    assert main(["--config", str(path), "--resume"]) == 2
    assert "its optimiser has foreign, which does not train here" in capsys.readouterr().err
    rewritten(newest, "adapter_model.safetensors", lambda held: dict(list(held.items())[1:]))
    assert main(["--config", str(path), "--resume"]) == 2
    assert "which trains here" in capsys.readouterr().err


def test_an_engine_that_does_not_take_a_moment_is_caught(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(recipe, **{"training.max_steps": 2, "training.save_every": 1})
    folder = finetune(path)
    (folder / "result.json").unlink()
    original = torch.optim.AdamW.load_state_dict

    def forgetful(self: Any, held: dict[str, Any]) -> None:
        original(self, held)
        for state in self.state.values():
            state["exp_avg"].zero_()

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", forgetful)
    assert main(["--config", str(path), "--resume"]) == 2
    assert "the engine did not take the checkpoint's exp_avg:" in capsys.readouterr().err


def test_a_parameter_without_gradients_has_no_moments_and_needs_none() -> None:
    """As a part of the base that no output depends on; one that is left out of the file is an error all the same."""

    def trainer(steps: int) -> SimpleNamespace:
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "unused": torch.nn.Linear(2, 2)})
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(steps):
            model["used"](torch.ones(1, 3)).sum().backward()
            optimizer.step()
        unwrap = SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
        return SimpleNamespace(model=model, model_wrapped=model, optimizer=optimizer, accelerator=unwrap)

    held = gather_moments(trainer(2))
    assert gather_moments(trainer(2), keep=False) == {}  # as on the processes that do not write
    assert {key for key in held if "unused" in key} == {"none:unused.weight", "none:unused.bias"}
    fresh = trainer(0)
    restore_moments(fresh, held)
    assert all(tensor.equal(held[key]) for key, tensor in gather_moments(fresh).items())
    assert fresh.optimizer.state[fresh.model["used"].weight]["step"].item() == 2
    with pytest.raises(UserError, match=r"has nothing for unused\.bias"):
        restore_moments(trainer(0), {key: tensor for key, tensor in held.items() if not key.endswith("unused.bias")})


def test_learning_rates_are_those_of_the_next_step(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's schedulers set them at their next step only, which comes after the first update."""
    path = write(recipe, **{"training.save_every": 6, "training.head_learning_rate": 5e-3})
    folder = finetune(path)
    straight = {line["step"]: line["learning_rate"] for line in metrics(folder)}
    for name in ("result.json", "checkpoints/checkpoint-12"):
        (folder / name).rename(folder / f"{Path(name).name}.away")
    seen = []
    original = checkpointing._restore_scheduler

    def watch(trainer: Any, record: dict[str, Any]) -> None:
        original(trainer, record)
        assert isinstance(trainer.lr_scheduler, LambdaLR)
        seen.extend(group["lr"] for group in trainer.optimizer.param_groups)

    monkeypatch.setattr(checkpointing, "_restore_scheduler", watch)
    finetune(path, "--resume")
    assert sorted(set(seen)) == [5e-4, 2.5e-3]  # half of the way is done
    assert {line["step"]: line["learning_rate"] for line in metrics(folder)} == straight
