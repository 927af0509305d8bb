"""What the files of a run say is what happened: rows, dtype, device, settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from curvelora.layers import dense_delta
from run_files import metrics, result


def test_rows_are_counted_not_computed(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path]
) -> None:
    """The last batch of an epoch is filled up: 20 rows in batches of 8, twice."""
    recipe["data"]["train"]["limit"] = 20
    folder = finetune(write(recipe, **{"training.epochs": 2}))
    assert (result(folder)["examples"], result(folder)["steps"]) == (48, 6)


def test_the_recipe_decides_the_precision(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`accelerate launch` sets ACCELERATE_MIXED_PRECISION, which transformers would follow behind an fp32 recipe's back."""
    seen = set()
    original = dense_delta.dense_delta_product
    monkeypatch.setattr(dense_delta, "dense_delta_product", lambda x, *rest: (seen.add(x.dtype), original(x, *rest))[1])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    finetune(write(recipe))
    assert seen == {torch.float32}
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


def test_one_process_uses_one_gpu(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host with two GPUs and no launcher the trainer would double the batch and wrap the model in DataParallel."""
    original = TrainingArguments.__post_init__

    def pretend_two_gpus(self: TrainingArguments) -> None:
        original(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", pretend_two_gpus)
    folder = finetune(write(recipe))
    assert (result(folder)["steps"], result(folder)["examples"]) == (12, 96)


@pytest.mark.parametrize("method", ["loran", "lora"])
def test_the_resolved_recipe_has_the_methods_defaults(
    method: str, recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], tmp_path: Path
) -> None:
    """A run must say which amplitude it had, also where the recipe did not; and the resolved recipe runs again."""
    folder = finetune(write(recipe, adapter={"method": method, "r": 4, "target_modules": ["query"]}))
    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["adapter"]
    assert stored["target_modules"] == ["query"]
    wanted = {"amplitude": 5e-5, "frequency": 1e4, "activation": "sinter", "dropout": 0.2, "alpha": 16}
    for key, value in (wanted if method == "loran" else {"alpha": 8, "dropout": 0.0}).items():
        assert stored[key] == value
        assert result(folder)["settings"][key] == value
    again = finetune(folder / "config.yaml", f"output={tmp_path / 'again'}")
    keep = ("step", "loss", "grad_norm")
    assert [[line[k] for k in keep] for line in metrics(folder)] == [[line[k] for k in keep] for line in metrics(again)]


def test_class_labels_are_read_by_name() -> None:
    """Stored integers count in the data set's own list: with folders `1 2 3`, or a test set without the first class."""
    from datasets import ClassLabel, Dataset, Features, Value

    from curvelora_eval.spec import TaskSpec
    from curvelora_eval.tasks import make_task

    def rows(names: list[str], stored: list[int]) -> Dataset:
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"text": ["x"] * len(stored), "label": stored}, features=features)

    numbered = make_task(TaskSpec(kind="sequence_classification"))
    numbered.learn_labels(rows(["1", "2", "3"], [0, 0, 1, 1, 2, 2]))
    assert numbered.label_indices(rows(["1", "2", "3"], [0, 0, 1, 1, 2, 2]), "rows") == [0, 0, 1, 1, 2, 2]
    animals = make_task(TaskSpec(kind="sequence_classification", labels=["cat", "dog", "fox"]))
    assert animals.label_indices(rows(["dog", "fox"], [0, 1]), "test") == [1, 2]
    renamed = make_task(TaskSpec(kind="sequence_classification", labels=["negative", "positive"]))
    assert renamed.label_indices(rows(["neg", "pos"], [0, 1]), "rows") == [0, 1]
    with pytest.raises(ValueError, match="'wolf'"):
        animals.label_indices(rows(["dog", "wolf"], [0, 1]), "test")
