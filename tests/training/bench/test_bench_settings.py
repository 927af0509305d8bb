"""What a comparison runs on: every bad option is said at once, before any weight is loaded."""

from __future__ import annotations

import argparse
import json

import pytest
import yaml
from transformers import AutoModelForCausalLM, OPTConfig

from curvelora.errors import UserError
from curvelora_training.bench import settings as module
from curvelora_training.bench.arms import parse_arms
from curvelora_training.bench.settings import LINEARS, LabSettings, parse_seeds, settings_from
from liger_stub import install


@pytest.fixture
def settle(monkeypatch):
    """`settle("--model", ..., arms="qlora,lora")` -> the settings; weights cannot be loaded meanwhile."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)

    def parse(*argv, arms="qlora,loran:sinter", out=None):
        parser = argparse.ArgumentParser()
        module.add_model_arguments(parser)
        module.add_training_arguments(parser)
        parser.add_argument("--jobs", type=int, default=1)
        args = parser.parse_intermixed_args([str(a) for a in argv])
        return settings_from(args, lambda: parse_arms(arms), out)

    return parse


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("42", [42]), ("42-46", [42, 43, 44, 45, 46]), ("1,3,5-7", [1, 3, 5, 6, 7]), (" 2, 2-3 ", [2, 3]), ("0", [0])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["a", "1-", "-1", "5-3", "1,,2", "1.5", "²", "1-2-3", str(2**31)])
def test_what_is_no_seed(text):
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_defaults_on_a_shape_and_on_a_checkpoint(settle, tiny_models):
    shape, weights = settle("--model", "llama2-7b"), settle("--model", tiny_models["llama"], "--rank", 32)
    assert (shape.random, shape.length, shape.checkpointing, shape.base) == (True, 2048, True, "nf4")
    assert (weights.random, weights.length, weights.checkpointing) == (False, 128, False)
    assert shape.target_modules == weights.target_modules == list(LINEARS)
    assert (shape.rank, shape.alpha, shape.seeds, shape.steps, shape.baseline) == (64, 16, [42], 100, "qlora")
    assert shape.title.lower() == "qlora and its rivals on llama2-7b"
    assert shape.options() == {"r": 64, "alpha": 16, "dropout": 0.0, "target_modules": list(LINEARS)}


def test_the_command_line_wins(settle, tiny_models):
    found = settle(
        "--model", tiny_models["llama"], "--base", "fp32", "--batch-size", 2, "--length", 16, "--rank", 4, "--alpha", 8,
        "--dropout", 0.1, "--targets", "q_proj,v_proj", "--checkpointing", "--steps", 7, "--seeds", "1-2",
        "--learning-rate", 1e-3, "--max-grad-norm", 0, "--warmup", 3, "--schedule", "constant",
    )  # fmt: skip
    expected = {
        "base": "fp32", "batch_size": 2, "length": 16, "rank": 4, "alpha": 8, "dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"], "checkpointing": True, "steps": 7, "seeds": [1, 2],
        "learning_rate": 1e-3, "max_grad_norm": 0, "warmup": 3, "schedule": "constant",
    }  # fmt: skip
    assert {key: getattr(found, key) for key in expected} == expected


def test_every_bad_option_in_one_message(settle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as caught:
        settle(
            "--model", "llama2-7c", "--batch-size", 0, "--length", 0, "--rank", 0, "--alpha", "nan", "--dropout", 1,
            "--steps", -1, "--seeds", "5-3", "--learning-rate", "inf", "--max-grad-norm", -1, "--warmup", "nan",
            "--data", tmp_path / "missing.txt", "--jobs", 0, "section.key=1",
            arms="full,qlora", out=tmp_path / "file",
        )  # fmt: skip
    for part in (
        "--batch-size must be at least 1", "--length must be at least 1", "--rank must be at least 1",
        "--alpha must be positive, not nan", "--dropout is a share", "--steps must not be negative", "--seeds '5-3'",
        "--learning-rate must be positive, not inf", "--max-grad-norm must not be negative", "--warmup must not be negative",
        "missing.txt cannot be read", "--jobs must be at least 1", "needs --config", "first arm", "is a file",
        "did you mean 'llama2-7b'",
    ):  # fmt: skip
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model is missing"),
        (["--model", "nowhere"], "there is no such shape or folder"),
        (["--model", "./nowhere/else"], "holds no model"),
        (["--model", "nowhere.json"], "no model config"),
        (["--model", "llama-1b", "--data", __file__], "random weights"),
        (["--model", "llama2-7b", "--targets", "q_proj,query"], "--targets query: this model's linear modules are"),
        (["--model", "llama3-70b", "--rank", "2000"], "rank 2000 is above 1024"),
    ],
)
def test_models_that_do_not_fit(settle, arguments, said):
    with pytest.raises(UserError) as caught:
        settle(*arguments)
    assert said in str(caught.value)


def test_ranks_are_checked_against_the_layers_that_are_adapted(settle, tiny_models):
    with pytest.raises(
        UserError, match=r"arms .*loran:sinter.*: rank 40 is above 32, which is all that .*k_proj allows"
    ):
        settle("--model", tiny_models["llama"], "--rank", 40)
    assert settle("--model", tiny_models["llama"], "--rank", 40, "--targets", "q_proj").rank == 40


def test_a_config_file_is_a_shape_with_its_own_modules(settle, config, tmp_path):
    config().save_pretrained(tmp_path / "llama")
    found = settle("--model", tmp_path / "llama" / "config.json", "--rank", 4)
    assert found.random and found.target_modules == list(LINEARS)
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    OPTConfig(word_embed_proj_dim=64, **sizes).save_pretrained(tmp_path / "opt")
    found = settle("--model", tmp_path / "opt" / "config.json", "--rank", 4)
    assert set(found.target_modules) <= {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def test_a_recipe_gives_model_task_and_rates(settle, recipe, write):
    path = write(recipe, **{"training.max_steps": 6, "training.warmup": 0.1, "training.head_learning_rate": 0.01})
    found = settle("--config", path)
    assert (found.model, found.base, found.recipe) == (recipe["model"]["path"], "fp32", str(path))
    assert (found.rank, found.alpha, found.dropout, found.target_modules) == (4, 8, 0.1, ["query", "value"])
    assert (found.steps, found.batch_size, found.length, found.warmup, found.schedule) == (6, 8, 32, 0.1, "linear")
    assert (found.learning_rate, found.head_learning_rate, found.max_grad_norm) == (1e-3, 0.01, 1.0)
    changed = settle("--config", path, "training.learning_rate=0.5", "--rank", 2)
    assert (changed.learning_rate, changed.rank, changed.overrides) == (0.5, 2, ["training.learning_rate=0.5"])


def test_a_recipe_s_default_targets_are_its_model_s(settle, recipe, write, tiny_models):
    without = {"adapter.target_modules": None}
    assert settle("--config", write(recipe, **without)).target_modules == ["query", "value"]
    llama = {"model.path": str(tiny_models["llama"]), "task.kind": "causal_lm", "task.columns": {"text": "sentence"}}
    assert settle("--config", write(recipe, **without, **llama)).target_modules == list(LINEARS)


def test_a_schedule_that_the_lab_has_not_is_refused(settle, recipe, write):
    path = write(recipe, **{"training.schedule": "cosine", "training.warmup": 0.1})
    with pytest.raises(UserError, match="schedule cosine"):
        settle("--config", path)
    assert settle("--config", path, "--schedule", "constant").schedule == "constant"
    path = write(recipe, **{"training.schedule": "constant_with_warmup", "training.warmup": 0.1})
    assert (settle("--config", path).schedule, settle("--config", path).warmup) == ("constant", 0.1)
    path = write(recipe, **{"training.schedule": "constant", "training.warmup": 0.1})
    assert (settle("--config", path).schedule, settle("--config", path).warmup) == ("constant", 0.0)


def test_a_bad_recipe_and_bad_options_in_one_message(settle, recipe, write):
    with pytest.raises(UserError) as caught:
        settle("--config", write(recipe, **{"training.batch_size": 0, "adapter.rr": 1}), "--steps", -1)
    for part in ("training.batch_size", "adapter.rr", "--steps must not be negative"):
        assert part in str(caught.value)
    assert "--model" not in str(caught.value)


def test_settings_survive_json(settle, tiny_models, tmp_path):
    arms = "qlora,loran:sinter-large@fp32,full"
    found = settle("--model", tiny_models["llama"], "--rank", 4, "--seeds", "1-3", arms=arms)
    path = tmp_path / "lab.json"
    path.write_text(json.dumps(found.as_dict()), encoding="utf-8")
    assert LabSettings.read(path) == found and LabSettings.read(path).arms[1].fp32


def test_a_record_from_before_there_were_switches_is_read(settle, tiny_models, tmp_path):
    found = settle("--model", tiny_models["llama"], "--rank", 4, arms="qlora@fp32").as_dict()
    for arm in found["arms"]:
        for key in ("eager", "liger", "keep"):
            del arm[key]
    del found["reentrant"]
    (tmp_path / "lab.json").write_text(json.dumps(found), encoding="utf-8")
    assert LabSettings.read(tmp_path / "lab.json").arms == parse_arms("qlora@fp32")


def test_switches_that_cannot_work_are_refused_before_anything_loads(settle, tiny_models, monkeypatch, tmp_path):
    model = ["--model", tiny_models["llama"], "--rank", 4]
    with pytest.raises(UserError, match="arm 'lora@keep=2': products are kept under --checkpointing only"):
        settle(*model, arms="qlora,lora@keep=2")
    with pytest.raises(UserError, match="--reentrant is a kind of checkpointing"):
        settle(*model, "--reentrant")
    assert settle(*model, "--checkpointing", "--reentrant", arms="qlora@keep=2").reentrant
    monkeypatch.setattr("curvelora_training.liger.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="arm 'qlora@liger': liger-kernel is not installed: pip install liger-kernel"):
        settle(*model, arms="qlora@liger,lora@liger")
    monkeypatch.undo()
    install(tmp_path, monkeypatch)
    assert settle(*model, arms="qlora@liger").arms[0].liger


def test_the_command_of_the_goals_says_what_the_page_says(settle, root, monkeypatch, tmp_path):
    install(tmp_path, monkeypatch)
    page = (root / "docs/sinter_lab.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith("curvelora bench step --model llama2-7b --base"))
    words = line.split()[3:]
    arms, std = (words.pop(words.index(name) + 1) for name in ("--arms", "--std"))
    found = settle(*(word for word in words if word not in ("--arms", "--std")), arms=arms)
    assert (found.base, found.rank, found.batch_size, found.length, found.dropout) == ("nf4", 64, 4, 2048, 0.0)
    assert found.checkpointing and found.target_modules == list(LINEARS) and float(std) == 1e-2
    assert found.arms[0].method == "qlora" and found.arms[0].eager


@pytest.mark.parametrize("content", ["", "[]", '{"steps": 3}', '{"model": "llama-1b", "unknown": 1}'])
def test_damaged_settings_are_refused(tmp_path, content):
    (tmp_path / "lab.json").write_text(content)
    with pytest.raises(UserError, match="no settings of a comparison"):
        LabSettings.read(tmp_path / "lab.json")


def test_shipped_recipes_can_be_compared(root):
    for path in sorted((root / "training/recipes").glob("*.yaml")):
        assert yaml.safe_load(path.read_text())["training"].get("schedule", "linear") != "cosine", path
