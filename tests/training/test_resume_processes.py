"""Runs on two processes that were stopped and resumed: on two again bit for bit, on another number with the same steps.

On CPU processes; on GPUs where there are two.

One launch makes all of them (`fault_cells.py`). 26 rows in steps of 8, so that an epoch ends with a step that is filled up;
two epochs of four steps, a checkpoint every two, accumulation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from os import environ
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from curvelora_training.checkpoint import flaw, read_manifest
from curvelora_training.finetune import main
from run_files import metrics, result

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
LORAN = {"method": "loran", "r": 4, "alpha": 8, "amplitude": 0.02, "target_modules": ["query", "value"], "dropout": 0.1}
SCHEDULED = LORAN | {"amplitude_schedule": {"kind": "anneal", "share": 1.0}}
ADALORA = {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1}
ADALORA |= {"target_modules": ["query", "value"]}


def zero(stage: str) -> str:
    return f"training.deepspeed=ds_configs/zero{stage}.json"


# name -> what it has beside the recipe; all are stopped after step 6, in the middle of the second epoch
EXACT: dict[str, list[str]] = {
    "DDP": ["training.group_by_length=true"],
    "ZeRO-1": [zero("1")],
    "ZeRO-2": [zero("2"), f"adapter={json.dumps(SCHEDULED)}"],
    "ZeRO-3": [zero("3")],
    "full ZeRO-2": [zero("2"), "adapter={method: full}"],
    "FSDP2": [],
}
SLOW: dict[str, list[str]] = {
    "DDP adalora": [f"adapter={json.dumps(ADALORA)}"],
    "ZeRO-2 offload": [zero("2_offload")],
    "ZeRO-3 offload": [zero("3_offload")],
    "ZeRO-3 parameters": [zero("3_offload_params")],
    "ZeRO-2 bf16": [zero("2"), "model.dtype=bfloat16"],
    "ZeRO-3 nf4": [zero("3"), "model.dtype=bfloat16", "model.quantization=nf4"],
    "full ZeRO-3": [zero("3"), "adapter={method: full}"],
    "full DDP": ["adapter={method: full}"],
    "DDP paged": ["training.optimizer=paged_adamw_32bit"],
    # tensors of fewer than 4096 entries, as adapters here have, keep 32 bits
    "full 8bit": ["training.optimizer=adamw_8bit", "adapter={method: full}"],
}
# stopped on one process after step 2, resumed on two
ONTO_TWO = {"onto DDP": [], "onto ZeRO-2": [zero("2")], "onto ZeRO-3": [zero("3")], "FSDP2 onto": []}
ON_GPUS = torch.cuda.device_count() > 1
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
NO_DROPOUT = "adapter.dropout=0.0"
ALONE = ["training.batch_size=4", NO_DROPOUT]  # x accumulation 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], root: Path) -> Callable[[str], Path]:
    """`made("ZeRO-1")` -> the folder of the run, beside `ZeRO-1 resumed`; all of a group are made at the first call."""
    folder = tmp_path_factory.mktemp("processes")
    rows = {"path": str(root / "tests/data/sst2_sentences_train.tsv"), "limit": 26}
    recipe = {
        "output": str(folder / "unused"),
        "model": {"path": str(tiny_models["bert"]), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 32},
        "data": {"train": rows},
        "adapter": LORAN,
        "training": {"learning_rate": 1e-3, "epochs": 2, "batch_size": 2, "accumulation": 2, "log_every": 1}
        | {"save_every": 2, "keep_checkpoints": 9, "weight_decay": 0.1},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    done: set[bool] = set()

    def make(core: bool) -> None:
        cells: list[dict[str, Any]] = []

        def add(name: str, overrides: list[str], *stopped: str | int) -> None:
            arguments = ["--config", str(path), *overrides, f"output={folder / name}"]
            cell = {"name": name, "arguments": arguments, "environment": FSDP if name.startswith("FSDP2") else {}}
            cells.append(cell if not stopped else cell | {"from": stopped, "arguments": [*arguments, "--resume"]})

        for name, more in (EXACT if core else SLOW).items():
            add(name, more)
            add(f"{name} resumed", more, str(folder / name), 6)
        if core:
            assert main(["--config", str(path), *ALONE, f"output={folder / 'one'}"]) == 0
            for name, more in ONTO_TWO.items():
                add(name, [*more, *ALONE], str(folder / "one"), 2)
            add("other engine", ["adapter={method: full}"], str(folder / "full ZeRO-2"), 6)
        (folder / "cells.json").write_text(json.dumps(cells), encoding="utf-8")
        launched = subprocess.run(
            [*TORCHRUN, str(root / "tests/training/fault_cells.py"), str(folder / "cells.json")],
            cwd=root,
            env=environ | {"OMP_NUM_THREADS": "1"} | ({} if ON_GPUS else {"DS_ACCELERATOR": "cpu"}),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert launched.returncode == 0, launched.stdout[-3000:] + launched.stderr[-3000:]
        (folder / f"printed {core}").write_text(launched.stdout + launched.stderr, encoding="utf-8")

    def made(name: str) -> Path:
        core = name not in SLOW
        if core not in done:
            done.add(core)  # also where it fails: once is enough
            make(core)
        return folder / name

    return made


def check_engine(run: Path, name: str) -> None:
    """That of the name, on two processes."""
    used, stage = result(run)["engine"], name.partition("ZeRO-")[2][:1]
    plain = "FSDP2" if name.startswith("FSDP2") else "DistributedDataParallel"
    wanted = ("DeepSpeedEngine", int(stage)) if stage else (plain, None)
    assert (used["engine"], used["zero_stage"], used["processes"]) == (*wanted, 2)


def codes(run: Path) -> list[int]:
    """Both processes' exit codes."""
    return [int(run.with_name(f"{run.name}.code{rank}").read_text()) for rank in (0, 1)]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


@pytest.mark.parametrize("name", [*EXACT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_on_as_many_processes_it_is_the_straight_run(made: Callable[[str], Path], name: str) -> None:
    """Losses, weights, moments, learning rates and random numbers: the files of the last checkpoints are the same bytes."""
    straight = made(name)
    resumed = straight.with_name(f"{name} resumed")
    assert codes(straight) == codes(resumed) == [0, 0]
    check_engine(straight, name)
    check_engine(resumed, name)
    assert losses(resumed) == losses(straight) and len(losses(straight)) == 8
    for run in (straight, resumed):
        assert flaw(run / "checkpoints/checkpoint-8") is None
    wanted, found = (read_manifest(run / "checkpoints/checkpoint-8") for run in (straight, resumed))
    assert wanted["files"].keys() == found["files"].keys()
    assert (found["step"], found["processes"], found["global_batch"]) == (8, 2, 8)
    named = {"adapter_model.safetensors", "moments.safetensors", "scheduler.json", "rng/rank-00000.safetensors"}
    if found["shares"]:  # DeepSpeed's pickles have no one form
        named -= {"moments.safetensors"}
        assert any(file.endswith("optim_states.pt") for file in found["files"])
    for file in (*named, "rng/rank-00001.safetensors"):
        assert wanted["files"][file] == found["files"][file], file
    again, adapter = (load_file(run / "adapter/adapter_model.safetensors") for run in (straight, resumed))
    assert again.keys() == adapter.keys() and all(again[key].equal(adapter[key]) for key in again)
    # what was restored was something, and the two steps after it changed it
    if not found["shares"]:
        early, late = (load_file(straight / f"checkpoints/checkpoint-{n}/moments.safetensors") for n in (6, 8))
        assert early.keys() == late.keys()
        moving = [key for key in early if not key.startswith("step:") and not early[key].equal(late[key])]
        assert len(moving) > len(early) / 2


@pytest.mark.parametrize("name", ONTO_TWO)
def test_stopped_on_one_process_it_goes_on_on_two(made: Callable[[str], Path], name: str) -> None:
    run, one = made(name), made("one")
    assert codes(run) == [0, 0]
    check_engine(run, name)
    facts = read_manifest(run / "checkpoints/checkpoint-8")
    assert (facts["processes"], facts["batch_size"], facts["accumulation"], facts["global_batch"]) == (2, 4, 1, 8)
    check_agreement(run, one)
    printed = (run.parent / "printed True").read_text(encoding="utf-8")
    assert "with batches of 4 and accumulation 1 a step keeps its 8 rows" in printed
    assert f"resuming from {run / 'checkpoints/checkpoint-2'}, written by 1 process\n" in printed


@pytest.mark.parametrize("name", ["onto DDP", "onto ZeRO-3"])
def test_stopped_on_two_processes_it_goes_on_on_one(
    made: Callable[[str], Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From one to two and back again, with the recipe that the run began with."""
    source, one = made(name), made("one")
    run = source.with_name(f"{name} and back")
    shutil.copytree(source / "checkpoints/checkpoint-6", run / "checkpoints/checkpoint-6")
    shutil.copy(source / "config.yaml", run / "config.yaml")
    shutil.copy(source / "metrics.jsonl", run / "metrics.jsonl")
    recipe = str(source.with_name("recipe.json"))
    assert main(["--config", recipe, *ALONE, f"output={run}", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"resuming from {run / 'checkpoints/checkpoint-6'}, written by 2 processes\n" in printed
    facts = read_manifest(run / "checkpoints/checkpoint-8")
    assert (facts["processes"], facts["batch_size"], facts["accumulation"]) == (1, 4, 2)
    check_agreement(run, one)


def check_agreement(run: Path, one: Path) -> None:
    """All to the rounding of sums that are taken in another order."""
    assert losses(run) == pytest.approx(losses(one), rel=1e-5) and len(losses(run)) == 8
    for file in ("adapter/adapter_model.safetensors", "checkpoints/checkpoint-8/moments.safetensors"):
        found, wanted = load_file(run / file), load_file(one / file)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            apart = (found[key].double() - tensor.double()).abs().max().item()
            assert apart <= 1e-4 * tensor.double().abs().max().item(), key


def test_shares_are_for_as_many_processes(made: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    source = made("full ZeRO-2")
    said = f"{source / 'checkpoints/checkpoint-8'} is in shares, as DeepSpeed saves full fine-tuning: it resumes on 2"
    assert said in (source.parent / "printed True").read_text(encoding="utf-8")
    run = source.with_name("full on one")
    shutil.copytree(source / "checkpoints/checkpoint-6", run / "checkpoints/checkpoint-6")
    shutil.copy(source / "config.yaml", run / "config.yaml")
    recipe = str(source.with_name("recipe.json"))
    assert main(["--config", recipe, "adapter={method: full}", f"output={run}", "--resume"]) == 2
    assert "in shares of 2 processes, as DeepSpeed saves full fine-tuning, and 1 cannot" in capsys.readouterr().err
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml"]
    assert codes(source.with_name("other engine")) == [2, 2]
    printed = (source.parent / "printed True").read_text(encoding="utf-8")
    assert "it is in shares of ZeRO-2, which no other engine can read: take that one\n" in printed
