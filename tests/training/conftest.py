"""Recipes for tests: plain data, written to a file, run in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from threads, and one thread makes runs repeatable bit for bit."""
    torch.set_num_threads(1)


@pytest.fixture
def recipe(tiny_models: dict[str, Path], root: Path, tmp_path: Path) -> dict[str, Any]:
    """A small classification recipe on real sentences: 96 rows, batches of 8, fp32."""
    return {
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_models["bert"]), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 32},
        "data": {
            "train": {"path": str(root / "tests/data/sst2_sentences_train.tsv"), "limit": 96},
            "test": {"path": str(root / "tests/data/sst2_sentences_unseen.tsv"), "limit": 40},
        },
        "adapter": {"method": "loran", "r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["query", "value"]},
        "training": {"learning_rate": 1e-3, "batch_size": 8, "epochs": 1, "log_every": 4},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(recipe, **{"training.epochs": 2})` -> the file; dotted keys replace values, None deletes a key."""

    def write_recipe(recipe: dict[str, Any], **changes: Any) -> Path:
        data = copy.deepcopy(recipe)
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            node = data
            for parent in parents:
                node = node.setdefault(parent, {})
            if value is None:
                node.pop(last, None)
            else:
                node[last] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        return path

    return write_recipe


@pytest.fixture
def finetune() -> Callable[..., Path]:
    """`finetune(recipe_file, "--resume", "seed=3")` runs in this process and returns the run folder; fails on a non-zero code."""

    def run(path: Path, *arguments: str) -> Path:
        from curvelora_training.finetune import main

        assert main(["--config", str(path), *arguments]) == 0
        overrides = dict(a.split("=", 1) for a in arguments if "=" in a)
        return Path(overrides.get("output", yaml.safe_load(path.read_text(encoding="utf-8"))["output"]))

    return run
