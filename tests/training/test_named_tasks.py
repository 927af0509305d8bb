"""Recipes that name a task instead of a file: the rows' wording, the classes' order, errors, and runs that train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.data import fingerprint, load_rows, rows_fingerprint
from curvelora_eval.spec import DataSpec, TaskSpec
from curvelora_eval.tasks import make_task
from curvelora_training.config import RecipeError, load_recipe
from curvelora_training.fetch.gather import gather, make_plan
from curvelora_training.prepare import prepare


@pytest.fixture(scope="module")
def samples(root: Path) -> str:
    return str(root / "tests/data/benchmarks")


def test_a_causal_model_trains_on_a_named_task(
    recipe: dict[str, Any], samples: str, tiny_models: dict[str, Path], write: Callable[..., Path], finetune: Callable
) -> None:
    folder = finetune(
        write(
            recipe
            | {
                "model": {"path": str(tiny_models["llama"]), "dtype": "float32"},
                "task": {"kind": "causal_lm", "max_length": 128, "loss_on_prompt": True},
                "data": {
                    "train": {"path": samples, "task": "boolq", "split": "train", "template": "clean"},
                    "test": {"path": samples, "task": "boolq", "split": "test", "template": "clean", "limit": 4},
                },
                "adapter": {"method": "lora", "r": 2, "target_modules": ["q_proj"]},
            }
        )
    )
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["dataset"]["sha256"] == fingerprint(Path(samples) / "commonsense/boolq/test.json")
    assert result["dataset"]["rows"] == 4 and result["metrics"]["perplexity"]["value"] > 1


def test_a_head_trains_on_a_named_task_with_its_classes_in_order(
    recipe: dict[str, Any], samples: str, write: Callable[..., Path], finetune: Callable
) -> None:
    """By the alphabet, equivalent would be class 0, and F1 would be about the wrong one."""
    data = {
        "train": {"path": samples, "task": "mrpc"},
        "test": {"path": samples, "task": "mrpc", "split": "validation"},
    }
    task = {"kind": "sequence_classification", "max_length": 32}
    folder = finetune(write(recipe | {"data": data, "task": task}))
    stored = json.loads((folder / "adapter" / "task.json").read_text())
    assert stored["task"]["labels"] == ["not_equivalent", "equivalent"]
    references = [json.loads(line)["reference"] for line in (folder / "predictions.jsonl").open()]
    rows = benchmarks.load(benchmarks.get("mrpc"), Path(samples)).rows
    assert references == [benchmarks.get("mrpc").protocol().reference(row) for row in rows]


def test_rows_have_the_wording_of_the_original_s_training_side(samples: str) -> None:
    protocol = benchmarks.get("boolq").protocol()
    loaded = benchmarks.load(benchmarks.get("boolq"), Path(samples), "train").rows
    for template in protocol.templates:
        rows = load_rows(DataSpec(path=samples, task="boolq", template=template))
        assert [(row["prompt"], row["completion"]) for row in rows] == [
            protocol.training_text(r, template) for r in loaded
        ]
    assert load_rows(DataSpec(path=samples, task="boolq"))[0]["prompt"].count(" " * 16) == 5  # legacy is the first


def test_prompt_and_completion_can_be_encoded_as_one_text(samples: str, tiny_models: dict[str, Path]) -> None:
    """As LLM-Adapters did: one string, all of it in the loss."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    rows = load_rows(DataSpec(path=samples, task="boolq", limit=3))
    task = make_task(TaskSpec(kind="causal_lm", columns={"text": "{prompt}{completion}"}, max_length=4096))
    task.check(rows, "rows")
    encoded = task.encode(rows, tokenizer)
    for row, features in zip(rows, encoded, strict=True):
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        assert features["input_ids"] == features["labels"] == whole


@pytest.mark.parametrize("task", ["commonsense170k", "metamathqa", "gsm8k", "samsum", "mrpc", "stsb", "tinystories"])
def test_every_kind_of_training_rows_fits_its_task_kind(task: str, samples: str) -> None:
    kind = {"mrpc": "sequence_classification", "stsb": "regression"}.get(task, "causal_lm")
    split = "validation" if task == "tinystories" else "train"
    rows = load_rows(DataSpec(path=samples, task=task, split=split))
    made = make_task(TaskSpec(kind=kind))
    if kind == "sequence_classification":
        made.learn_labels(rows)
    made.check(rows, task)
    assert len(rows) == len(benchmarks.load(benchmarks.get(task), Path(samples), split).rows)


def test_another_protocol_s_wording(samples: str) -> None:
    row = load_rows(DataSpec(path=samples, task="gsm8k", protocol="metamath"))[0]
    assert row["prompt"].endswith("### Response:") and "\nThe answer is: " in row["completion"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "bolq"}, "no task 'bolq'; did you mean 'boolq'"),
        ({"task": "boolq", "split": "dev"}, "boolq has no split 'dev'"),
        ({"task": "boolq", "template": "legasy"}, "did you mean 'legacy'"),
        ({"task": "boolq", "protocol": "loglikelihood"}, "only scores, and has no training rows: take llm-adapters"),
        ({"task": "boolq", "rename": {"a": "b"}}, "rename has no meaning for a named task"),
        ({"task": "cola", "split": "test"}, "3 of 3 rows have no answer"),
        (
            {"task": "boolq", "split": "dev", "template": "x", "rename": {"a": "b"}},
            "rename.*no split 'dev'.*no template 'x'",
        ),
        ({"template": "clean"}, "template belongs to a named task"),
    ],
)
def test_bad_settings_are_said(settings: dict[str, Any], said: str, samples: str) -> None:
    with pytest.raises(UserError, match=said):
        load_rows(DataSpec(path=samples, **settings))


def test_a_recipe_s_errors_come_together(recipe: dict[str, Any], samples: str, write: Callable[..., Path]) -> None:
    data = {"train": {"path": samples, "task": "mrcp"}, "test": {"path": samples, "task": "mrpc"}}
    with pytest.raises(RecipeError) as error:
        prepare(load_recipe(write(recipe | {"data": data})))
    assert "did you mean 'mrpc'" in str(error.value)
    assert "data.test names the task mrpc without a split" in str(error.value)


def test_only_the_task_s_own_file_is_fingerprinted(samples: str) -> None:
    spec = DataSpec(path=samples, task="mrpc", split="validation")
    assert rows_fingerprint(spec) == fingerprint(Path(samples) / "mrpc/dev.tsv")
    assert rows_fingerprint(DataSpec(path="hub", task="mrpc")) is None


def test_fetching_takes_the_task_s_file_and_not_the_whole_data_folder(
    recipe: dict[str, Any], samples: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    data = {"train": {"path": samples, "task": "mrpc"}, "validation": {"path": samples, "task": "mrpc", "split": "dev"}}
    fetched = load_recipe(write(recipe | {"data": data}))
    record = gather(make_plan(fetched), tmp_path / "fetched", "mine", copy=True)
    assert {name for name in record["files"] if "data/" in name} == {
        "data/train/benchmarks/mrpc/train.tsv",
        "data/validation/benchmarks/mrpc/dev.tsv",
    }
    there = str(tmp_path / "fetched" / record["overrides"]["data.validation.path"])
    assert len(load_rows(DataSpec(path=there, task="mrpc", split="validation"))) == 10
    data["train"]["path"] = "hub"
    with pytest.raises(UserError, match="data.train: task mrpc is read from the hub by its own definition"):
        make_plan(load_recipe(write(recipe | {"data": data})))
