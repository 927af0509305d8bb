"""The launchers run the same module unchanged, on two CPU processes; that the engine asked for is in use is read back.

One launched run costs some 20 seconds, mostly imports, so each launcher has one run, with one of the methods, and everything
is asserted on it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from run_files import metrics, result

BIN = Path(sys.executable).parent
MODULE = ["-m", "curvelora_training.finetune", "--config"]
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", *MODULE]
ACCELERATE = ["accelerate", "launch", "--main_process_port", "0", "--config_file"]
QUANTISED = ["model.dtype=bfloat16", "model.quantization=nf4"]
DDP, ZERO_2 = ("DistributedDataParallel", None), ("DeepSpeedEngine", 2)
# name -> (command before the recipe, overrides, (engine, ZeRO stage))
LAUNCHERS: dict[str, tuple[list[str], list[str], tuple[str, int | None]]] = {
    "torchrun": (TORCHRUN, QUANTISED, DDP),
    "torchrun with ZeRO-2": (
        TORCHRUN,
        ["training.deepspeed=ds_configs/zero2.json", "adapter.method=ranlora", *QUANTISED],
        ZERO_2,
    ),
    "accelerate": ([*ACCELERATE, "ds_configs/accelerate_ddp.yaml", *MODULE], ["adapter.method=ranlora"], DDP),
    "accelerate with ZeRO-2": (
        [*ACCELERATE, "ds_configs/accelerate_zero2.yaml", *MODULE],
        ["adapter.method=aurora"],
        ZERO_2,
    ),
    "accelerate with FSDP2": (
        [*ACCELERATE, "ds_configs/accelerate_fsdp2.yaml", *MODULE],
        ["model.dtype=bfloat16"],
        ("FSDP2", None),
    ),
    "accelerate with ZeRO-1": ([*ACCELERATE, "ds_configs/accelerate_zero1.yaml", *MODULE], [], ("DeepSpeedEngine", 1)),
    "accelerate with ZeRO-3": ([*ACCELERATE, "ds_configs/accelerate_zero3.yaml", *MODULE], [], ("DeepSpeedEngine", 3)),
    "deepspeed": (
        ["deepspeed", "--num_gpus", "2", "--module", "curvelora_training.finetune", "--config"],
        [],
        ZERO_2,
    ),
}
SLOW = ("accelerate with ZeRO-1", "accelerate with ZeRO-3")
# the tiny BERT's positions are a quarter of it, and stay whole with FSDP2
SHARES = {"accelerate with FSDP2": 0.636, "accelerate with ZeRO-3": 0.5}


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """One thread a process, and the virtual environment's own commands first."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
    }


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """32 rows, four steps of 8 rows over both processes, no dropout."""
    # 32 validation rows too: the trainer weighs a short last batch otherwise when several processes share it
    train, validation = (recipe["data"][name] | {"limit": 32} for name in ("train", "test"))
    recipe["data"] = {"train": train, "validation": validation}
    recipe["adapter"]["dropout"] = 0.0
    recipe["training"] |= {"batch_size": 4, "eval_batch_size": 4, "log_every": 1}
    return recipe


@pytest.mark.parametrize("launcher", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in LAUNCHERS])
def test_launchers(
    launcher: str,
    small: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    root: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """The engine is in use, and the losses are those of one process on the same global batches of eight rows."""
    command, overrides, (engine, stage) = LAUNCHERS[launcher]
    if launcher == "deepspeed":  # it takes a fixed port, which the README's commands may have while this runs
        command = [command[0], "--master_port", free_port(), *command[1:]]
    path = write(small)
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:], str(path), *overrides],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = Path(small["output"])
    run = result(folder)
    kernels = {name: run["engine"].pop(name) for name in ("fused_layers", "unfused_layers")}
    assert kernels["fused_layers"] == 0 and sum(kernels["unfused_layers"].values()) == 4  # on a CPU, or gathered by hooks
    assert run["engine"] == {
        "engine": engine,
        "base_gathered_by": "blocks" if stage == 3 else None,
        "zero_stage": stage,
        "processes": 2,
        "device": "cpu",
        "trainable_dtype": "float32",
        "frozen_dtype": "bfloat16, uint8"
        if QUANTISED[1] in overrides
        else "bfloat16"
        if overrides[:1] == QUANTISED[:1]
        else "float32",
        "share_of_base": pytest.approx(SHARES.get(launcher, 1.0), abs=0.01),
    }
    assert (run["steps"], run["examples"]) == (4, 32)
    own = [o for o in overrides if not o.startswith("training.")]
    straight = finetune(path, *own, "training.batch_size=8", f"output={tmp_path / 'straight'}")
    # with other batch shapes a bf16 product rounds otherwise
    tolerance = 5e-3 if "model.dtype=bfloat16" in own else 1e-5
    for kind in ("loss", "eval_loss"):
        losses, wanted = ([line[kind] for line in metrics(f) if kind in line] for f in (folder, straight))
        assert losses == pytest.approx(wanted, rel=tolerance)
        assert len(losses) == (4 if kind == "loss" else 1)
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.numel() > 0 for tensor in weights.values())
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if name.endswith("_B"))


def test_every_configuration_is_run(root: Path) -> None:
    """By a launch here, or by a cell of test_zero."""
    from test_zero import CELLS

    named = " ".join(part for command, overrides, _ in LAUNCHERS.values() for part in (*command, *overrides))
    files = {path.name for path in (root / "ds_configs").glob("*.*") if path.suffix != ".md"}
    assert len(files) > 10
    assert {f for f in files if f"ds_configs/{f}" not in named} <= {f"{cell.engine}.json" for cell in CELLS}


def test_deepspeed_without_a_launcher_is_refused(
    small: dict[str, Any], write: Callable[..., Path], capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    from curvelora_training.finetune import main

    assert main(["--config", str(write(small)), f"training.deepspeed={root / 'ds_configs/zero2.json'}"]) == 2
    assert "needs a launcher" in capsys.readouterr().err


# launcher -> what the script executes for two processes, before the recipe; ports and temporary folders are any
PYTHON = ["python", *MODULE]
SCRIPTED = {
    "torchrun": [
        *["torchrun", "--nnodes", "1", "--nproc-per-node", "2", "--node-rank", "0", "--max-restarts", "0"],
        *["--master-addr", "127.0.0.1", "--master-port", "ANY", "--rdzv-id", "ANY", "--rdzv-conf", "timeout=600"],
        *["--no-python", *PYTHON],
    ],
    "accelerate": [
        *["accelerate", "launch", "--config_file", "ANY/ds_configs/accelerate_ddp.yaml", "--num_machines", "1"],
        *[
            "--num_processes",
            "2",
            "--machine_rank",
            "0",
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            "ANY",
        ],
        *["--rdzv_backend", "static", "--rdzv_conf", "timeout=600", "--max_restarts", "0", "--no_python", *PYTHON],
    ],
    "deepspeed": [
        *["deepspeed", "--hostfile", "ANY/hostfile", "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"],
        *["--master_port", "ANY", "--no_local_rank", "--no_python", *PYTHON],
    ],
}


@pytest.fixture
def script(root: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`script("recipe.yaml", LAUNCHER="torchrun")` runs it with these variables, for two processes."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(root / "launch/local/finetune.sh"), *arguments],
            env=environment | {"PROCESSES": "2"} | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_what_the_local_launch_script_executes(
    script: Callable[..., subprocess.CompletedProcess[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    """Stand-ins print it. Without a recipe, or with a wrong launcher, it explains itself."""
    for name in SCRIPTED:
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@"\n', encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    for name, command in SCRIPTED.items():
        done = script("my recipe.yaml", "name=two words", "--dry-run", LAUNCHER=name, PATH=path)
        assert done.returncode == 0, done.stderr
        engine = ["training.deepspeed=ANY/ds_configs/zero2.json"] if name == "deepspeed" else []
        wanted = [*command, "my recipe.yaml", *engine, "name=two words", "--dry-run"]
        for found, word in zip(done.stdout.splitlines(), wanted, strict=True):
            start, any_, end = word.partition("ANY")
            assert found == word or (any_ and found.startswith(start) and found.endswith(end)), (found, word)
    counted = script("recipe.yaml", PROCESSES="", PATH=path).stdout.splitlines()
    assert counted[4] == str(torch.cuda.device_count() or 1)
    explained = script()
    assert explained.returncode == 2
    assert "LAUNCHER=torchrun|accelerate|deepspeed" in explained.stderr
    wrong = script("recipe.yaml", LAUNCHER="mpirun")
    assert wrong.returncode == 2
    assert "mpirun is none of" in wrong.stderr


@pytest.mark.parametrize(
    "launcher", ["torchrun", *(pytest.param(n, marks=pytest.mark.slow) for n in ("accelerate", "deepspeed"))]
)
def test_the_local_launch_script(
    launcher: str,
    small: dict[str, Any],
    write: Callable[..., Path],
    script: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Two processes check the recipe, one of them says so."""
    done = script(str(write(small)), "seed=7", "--dry-run", LAUNCHER=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("seed: 7") == 1
    assert done.stdout.count("\ntrains ") == 1
