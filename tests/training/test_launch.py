"""The launchers run the same module unchanged, on two CPU processes; that the engine asked for is in use is read back.

One launched run costs some 20 seconds, mostly imports, so each launcher has one run and everything is asserted on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from runs import metrics, result

BIN = Path(sys.executable).parent
MODULE = ["-m", "curvelora_training.finetune", "--config"]
# launcher -> (command before the recipe, what follows it, engine, ZeRO stage)
LAUNCHERS: dict[str, tuple[list[str], list[str], str, int | None]] = {
    "torchrun": (["torchrun", "--standalone", "--nproc-per-node", "2", *MODULE], [], "DistributedDataParallel", None),
    "torchrun with ZeRO-2": (
        ["torchrun", "--standalone", "--nproc-per-node", "2", *MODULE],
        ["training.deepspeed=ds_configs/zero2.json"],
        "DeepSpeedEngine",
        2,
    ),
    "accelerate": (
        [
            "accelerate",
            "launch",
            "--config_file",
            "ds_configs/accelerate_ddp.yaml",
            "--main_process_port",
            "0",
            *MODULE,
        ],
        [],
        "DistributedDataParallel",
        None,
    ),
    "accelerate with ZeRO-2": (
        [
            "accelerate",
            "launch",
            "--config_file",
            "ds_configs/accelerate_zero2.yaml",
            "--main_process_port",
            "0",
            *MODULE,
        ],
        [],
        "DeepSpeedEngine",
        2,
    ),
    "deepspeed": (
        ["deepspeed", "--num_gpus", "2", "--module", "curvelora_training.finetune", "--config"],
        [],
        "DeepSpeedEngine",
        2,
    ),
}


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """One thread a process, and the virtual environment's own commands first."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
    }


@pytest.fixture
def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """32 rows, four steps of 8 rows over both processes, no dropout."""
    recipe["data"] = {"train": recipe["data"]["train"] | {"limit": 32}}
    recipe["adapter"]["dropout"] = 0.0
    recipe["training"] |= {"batch_size": 4, "log_every": 1}
    return recipe


@pytest.fixture
def straight(
    small: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], tmp_path: Path
) -> list[float]:
    """The losses of one process on the same global batches of eight rows."""
    folder = finetune(write(small), "training.batch_size=8", f"output={tmp_path / 'straight'}")
    return [line["loss"] for line in metrics(folder)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(
    launcher: str,
    small: dict[str, Any],
    straight: list[float],
    write: Callable[..., Path],
    root: Path,
    environment: dict[str, str],
) -> None:
    command, overrides, engine, stage = LAUNCHERS[launcher]
    program = str(BIN / command[0])
    done = subprocess.run(
        [program, *command[1:], str(write(small)), *overrides],
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
    assert run["engine"] == {"engine": engine, "zero_stage": stage, "processes": 2, "device": "cpu"}
    assert run["steps"] == 4
    assert run["examples"] == 32
    losses = [line["loss"] for line in metrics(folder)]
    assert losses == pytest.approx(straight, rel=1e-5)
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert all(tensor.numel() > 0 for tensor in weights.values())
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if name.endswith("loran_B"))


def test_deepspeed_without_a_launcher_is_refused(
    small: dict[str, Any], write: Callable[..., Path], capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    from curvelora_training.finetune import main

    assert main(["--config", str(write(small)), f"training.deepspeed={root / 'ds_configs/zero2.json'}"]) == 2
    assert "needs a launcher" in capsys.readouterr().err
