"""Both requirement files resolve: pip's dry run, nothing is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


def dry_run(root: Path, file: str) -> subprocess.CompletedProcess[str]:
    """`pip install --dry-run -r file` in this environment; flash-attn's metadata is asked for without its CUDA build."""
    environment = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation", "-r", file]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.network
@pytest.mark.parametrize("file", ["requirements.txt", "requirements-cuda.txt"])
def test_the_file_resolves(root: Path, file: str) -> None:
    done = dry_run(root, file)
    if done.returncode != 0 and any(
        sign in done.stderr for sign in ("Failed to establish", "Max retries", "ConnectionError")
    ):
        pytest.skip(f"no package index can be reached from here, so {file} cannot be resolved")
    assert done.returncode == 0, done.stderr[-2000:]


def test_requirements_cover_the_stack(root: Path) -> None:
    names = {
        line.split("==")[0]
        for line in (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    stack = {"deepspeed", "accelerate", "torch", "transformers", "bitsandbytes", "datasets", "evaluate", "peft"}
    assert stack <= names
    cuda = (root / "requirements-cuda.txt").read_text(encoding="utf-8")
    assert "flash-attn==" in cuda
    assert not any(name in names for name in ("flash-attn", "liger-kernel"))


def test_what_is_installed_is_what_is_pinned(root: Path) -> None:
    """The suite speaks for the pinned versions only if it runs on them; in an environment of the user's own it need not."""
    if Path(sys.prefix).resolve() != (root / ".venv").resolve():
        pytest.skip("this is not the environment that `make` builds, so other versions are no mistake")
    pins = [
        line.split(";")[0].strip().split("==")
        for line in (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    ]
    assert {name: version(name).partition("+")[0] for name, _ in pins} == dict(pins)
