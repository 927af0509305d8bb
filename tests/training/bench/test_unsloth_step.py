"""Unsloth as a rival of `bench step`: its checkpoint and its record, with transformers and PEFT in Unsloth's place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from curvelora.layers.base_weight import keep_4bit_layout
from curvelora_training.bench import unsloth_ground
from curvelora_training.bench.random_base import random_model
from curvelora_training.bench.shapes import shape_config
from curvelora_training.bench.unsloth_step import main

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def shape(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(SHAPE | {"tie_word_embeddings": request.param}), encoding="utf-8")
    return str(path)


def test_the_checkpoint_is_the_random_model(shape: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    unsloth_ground.write_checkpoint(shape, folder, torch.device("cpu"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    keep_4bit_layout(loaded)
    wanted = random_model(shape_config(shape), "nf4", torch.device("cpu"))
    found_state = loaded.model.layers[0].mlp.down_proj.weight.quant_state
    assert found_state.quant_type == "nf4" and found_state.nested
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, wanted(ids).logits)


class Rival:
    """What is asked of Unsloth, done by transformers and PEFT."""

    asked: dict[str, Any]

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> tuple[Any, None]:
        cls.asked = {"load": options}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=options["dtype"], local_files_only=True)
        for layer in model.model.layers:
            layer.self_attn.apply_qkv = fused_qkv
        return model, None

    @classmethod
    def get_peft_model(cls, model: Any, **options: Any) -> Any:
        cls.asked["adapt"] = options
        names = ("r", "lora_alpha", "lora_dropout", "target_modules")
        return peft.get_peft_model(model, peft.LoraConfig(**{name: options[name] for name in names}))

    @classmethod
    def for_training(cls, model: Any, use_gradient_checkpointing: object) -> Any:
        cls.asked["train"] = use_gradient_checkpointing
        return model


def fused_qkv() -> None:
    """Stands for a kernel."""


@pytest.mark.parametrize(("flags", "checkpointing"), [([], True), (["--own-checkpointing"], "unsloth")])
def test_its_record_is_that_of_bench_step(
    shape: str, flags: list[str], checkpointing: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=Rival))
    monkeypatch.setattr(unsloth_ground, "version", lambda name: f"{name} 1")
    out = tmp_path / "record.json"
    counts = ["--batch-size=2", "--length=16", "--rank=4", "--rounds=1", "--timed=2", "--warm-up-steps=0"]
    assert main(["--model", shape, *counts, *flags, "--out", str(out)]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    (arm,) = record["arms"].values()
    assert [*record["arms"]] == ["unsloth"] and record["tokens_per_step"] == 32 and len(arm["raw_step_seconds"]) == 2
    assert arm["unsloth_patches"] == {"fused_qkv": 2} and arm["unsloth"] == "unsloth 1"
    assert arm["std_BA"] == pytest.approx(1e-2, rel=0.1)
    assert arm["trainable_parameters"] == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert Rival.asked["train"] == checkpointing
    shared = {"use_gradient_checkpointing": checkpointing, "max_seq_length": 16}
    assert Rival.asked["load"].items() >= {**shared, "load_in_4bit": True, "dtype": torch.bfloat16}.items()
    assert (
        Rival.asked["adapt"].items()
        >= {**shared, "r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none"}.items()
    )


def test_without_unsloth(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", None)
    assert main(["--model", "llama2-7b"]) == 2
    assert "pip install unsloth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "llama2-7b", "--base", "bf16"], "--base nf4"),
        (["--model", "llama2-7b", "--no-checkpointing", "--own-checkpointing"], "leave out --no-checkpointing"),
        (["--rounds", "0"], "--rounds and --timed"),
    ],
)
def test_what_cannot_be_measured(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=Rival))
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_under_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=Rival))
    monkeypatch.setattr(unsloth_ground, "world_size", lambda: 2)
    assert main(["--model", "llama2-7b"]) == 2
    assert "without a launcher" in capsys.readouterr().err
