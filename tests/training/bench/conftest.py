"""Tiny bases with random weights for the lab: a Llama of two layers, drawn in a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from curvelora_training.bench.random_base import random_model

CPU = torch.device("cpu")


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of two layers with grouped-query attention; sizes divide by 64 so that NF4 applies."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**sizes | changes)


@pytest.fixture
def config() -> Callable[..., LlamaConfig]:
    """`config(hidden_size=128)` -> a tiny Llama's config."""
    return tiny_config


@pytest.fixture
def base() -> Callable[..., PreTrainedModel]:
    """`base("nf4")` -> the tiny Llama with random weights, frozen."""
    return lambda stored="fp32", **changes: random_model(tiny_config(**changes), stored, CPU)


@pytest.fixture
def options() -> dict[str, Any]:
    """What all arms share."""
    return {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    """Eight batches of random tokens, 2 x 12."""
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 128, (2, 12), generator=draw) for _ in range(8)]
    return [{"input_ids": i, "labels": i} for i in ids]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`cli("bench", "step", ...)` -> (exit code, stdout, stderr), in this process."""
    from curvelora.cli import main

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the packaged text, so that tokenising takes no time."""
    from curvelora_training.bench.sources import read_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text(None)[0][:24_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_models: dict[str, Path], short_text: Path) -> list[str]:
    """The options of a run that takes a fraction of a second."""
    sizes = ["--base", "fp32", "--rank", "4", "--length", "32", "--batch-size", "4", "--targets", "q_proj,down_proj"]
    return ["--model", str(tiny_models["llama"]), "--data", str(short_text), *sizes]


@pytest.fixture(scope="session")
def sweep_options(tiny_run: list[str]) -> list[str]:
    """A sweep of 2 x 2 cells with two seeds."""
    training = ["--steps", "3", "--seeds", "1-2", "--learning-rate", "1e-2"]
    return [*tiny_run, *training, "--amplitude", "1e-3,0.1", "--frequency", "10,1000"]


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory, sweep_options: list[str]) -> Path:
    """The folder of that sweep; copy it before anything is changed."""
    from curvelora.cli import main

    out = tmp_path_factory.mktemp("sweep") / "grid"
    torch.set_num_threads(1)
    assert main(["sweep", *sweep_options, "--out", str(out)]) == 0
    return out
