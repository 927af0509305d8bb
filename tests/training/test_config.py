"""Recipes: form errors are sentences, all of them come at once, and what is read back equals what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from curvelora.errors import UserError
from curvelora_training.config import RecipeError, load_recipe, parse_recipe


def test_a_good_recipe_becomes_typed(recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    loaded = load_recipe(write(recipe))
    assert loaded.training.learning_rate == 1e-3
    assert loaded.training.max_grad_norm == 1.0
    assert loaded.data.train.limit == 96
    assert loaded.peft_config().r == 4


def test_a_bare_path_is_a_data_spec(recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    loaded = load_recipe(write(recipe, **{"data.train": "rows.csv"}))
    assert loaded.data.train.path == "rows.csv"
    assert load_recipe(write(recipe, **{"data.train": "rows.csv"}), ["data.train.limit=7"]).data.train.limit == 7


@pytest.mark.parametrize(("text", "value"), [("5e-5", 5e-5), ("1E-3", 1e-3), ("2.5e-4", 2.5e-4), ("3", 3.0)])
def test_scientific_notation_is_a_number(
    recipe: dict[str, Any], write: Callable[..., Path], text: str, value: float
) -> None:
    # YAML 1.1 reads 5e-5 as a word
    loaded = load_recipe(write(recipe), [f"adapter.amplitude={text}", f"training.learning_rate={text}"])
    assert loaded.peft_config().amplitude == value
    assert loaded.training.learning_rate == value


def test_overrides_replace_and_add(recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    loaded = load_recipe(write(recipe), ["adapter.r=2", "training.head_learning_rate=0.01", "seed=7", "name=a = b"])
    assert (loaded.adapter["r"], loaded.training.head_learning_rate, loaded.seed, loaded.name) == (2, 0.01, 7, "a = b")


def test_the_resolved_recipe_reads_back_equal(recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    loaded = load_recipe(write(recipe))
    assert parse_recipe(yaml.safe_load(loaded.as_yaml()), "again") == loaded


# what is changed in the recipe -> what the message must contain
FORM_ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"training.learning_rte": 1e-3}, ["training.learning_rte", "unknown key", "did you mean 'learning_rate'"]),
    ({"trainig": {}}, ["trainig", "did you mean 'training'"]),
    ({"data.train": {"path": "x", "pth": "x"}}, ["data.train.pth", "did you mean 'path'"]),
    ({"training.batch_size": "many"}, ["training.batch_size", "valid integer", "'many'"]),
    ({"training.batch_size": 0}, ["training.batch_size", "greater than or equal to 1"]),
    ({"training.learning_rate": -1}, ["training.learning_rate", "greater than 0"]),
    ({"model.quantization": "int3"}, ["model.quantization", "'none', 'nf4' or 'int8'", "'int3'"]),
    ({"task.kind": "causal"}, ["task.kind", "causal_lm"]),
    ({"model": None}, ["model is missing"]),
    ({"adapter.method": "lorann"}, ["adapter.method", "did you mean 'loran'"]),
    ({"adapter.method": None}, ["adapter.method is missing"]),
    ({"adapter.ampltude": 1e-3}, ["adapter.ampltude", "did you mean 'amplitude'"]),
    ({"adapter.r": 0}, ["rank must be", "not 0"]),
    ({"adapter.r": "big"}, ["adapter.r", "valid integer", "'big'"]),
    ({"adapter.r": True}, ["adapter.r", "valid integer", "True"]),
    ({"training.epochs": True}, ["training.epochs", "valid number", "True"]),
    ({"adapter.dropout": 1.5}, ["dropout", "below 1", "1.5"]),
    ({"adapter.activation": "sintr"}, ["unknown activation 'sintr'", "did you mean 'sinter'"]),
    ({"adapter.scale_position": "in"}, ["scale_position", "outside, inside"]),
]


@pytest.mark.parametrize(("changes", "parts"), FORM_ERRORS, ids=[" ".join(c) for c, _ in FORM_ERRORS])
def test_form_errors(
    recipe: dict[str, Any], write: Callable[..., Path], changes: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(recipe, **changes))
    assert len(caught.value.problems) == 1
    for part in parts:
        assert part in str(caught.value)


def test_all_form_errors_come_at_once(recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    changes = {"training.epochs": "x", "adapter.r": 0, "adapter.alhpa": 1, "model.dtype": "float8", "sead": 1}
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(recipe, **changes))
    text = str(caught.value)
    assert "has 5 errors" in text
    for part in ("training.epochs", "rank must be", "adapter.alhpa", "model.dtype", "did you mean 'seed'"):
        assert part in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: [1", "no valid YAML"),
        ("- 1\n- 2", "must be a mapping"),
        ("!!python/object/apply:os.getcwd []", "no valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=part):
        load_recipe(path)


def test_a_malformed_override(recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="key=value"):
        load_recipe(write(recipe), ["adapter.r"])
    with pytest.raises(UserError, match="single value"):
        load_recipe(write(recipe), ["output.r=1"])


def test_errors_of_form_and_of_content_come_together(
    recipe: dict[str, Any], write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown key does not hide a missing file, an impossible combination or a target that matches nothing."""
    from curvelora_training.finetune import main

    changes = {
        "training.foo": 1,
        "data.test": "nowhere.tsv",
        "adapter": {"method": "qlora", "target_modules": ["nothing"]},
    }
    assert main(["--config", str(write(recipe, **changes))]) == 2
    message = capsys.readouterr().err
    for part in (
        "training.foo: unknown key",
        "nowhere.tsv does not exist",
        "set model.quantization=nf4",
        "match no module",
    ):
        assert part in message


def test_overrides_may_stand_anywhere(
    recipe: dict[str, Any], write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from curvelora_training.finetune import main

    assert main(["training.epochs=1", "--config", str(write(recipe)), "seed=3", "--dry-run", "adapter.r=2"]) == 0
    printed = capsys.readouterr().out
    assert "seed: 3" in printed and "\n  r: 2\n" in printed


def test_pefts_own_names_are_known(recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    adapter = {"method": "lora", "r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["query"]}
    config = load_recipe(write(recipe, adapter=adapter)).peft_config()
    assert (config.lora_alpha, config.lora_dropout) == (32, 0.1)


def test_rank_patterns_are_held_against_the_layers(
    recipe: dict[str, Any], write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from curvelora_training.finetune import main

    for method in ("lora", "loran"):
        adapter = {"method": method, "r": 4, "rank_pattern": {"query": 500}, "target_modules": ["query"]}
        assert main(["--config", str(write(recipe, adapter=adapter)), "--dry-run"]) == 2
        message = capsys.readouterr().err
        assert "500 is above min(d_in, d_out)=64" in message.replace("r=", "")
