"""What the evaluation tests share: no network at all, and one small run that was really trained."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)  # tiny models gain nothing from threads, and one thread makes runs repeatable bit for bit


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Any attempt to look up or reach another machine fails the test, in whatever thread; gives the addresses that were asked.

    This machine may be talked to: processes that share work meet there. Child processes have HF_HUB_OFFLINE.
    """
    asked: list[Any] = []

    def guard(owner: Any, name: str, place: int) -> None:
        ask = getattr(owner, name)

        def guarded(*arguments: Any, **named: Any) -> Any:
            address = arguments[place]
            if not is_here(address):
                asked.append(address)
                pytest.fail(f"the network was asked: {address}")
            return ask(*arguments, **named)

        monkeypatch.setattr(owner, name, guarded)

    for name in ("connect", "connect_ex", "sendto"):
        guard(socket.socket, name, -1)
    for name in ("getaddrinfo", "gethostbyname"):
        guard(socket, name, 0)
    yield asked
    assert not asked, f"the network was asked: {asked}"


def is_here(address: Any) -> bool:
    """Whether an address, or a host's name, is this machine's own; so is a path, and no host at all."""
    host = address[0] if isinstance(address, tuple) else address
    if not isinstance(address, tuple) and isinstance(host, str) and host.startswith("/"):
        return True
    return host in (None, "", b"", "localhost", "127.0.0.1", "::1", socket.gethostname())


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --data-dir with a few rows of some named tasks."""
    from named_tasks import write_data

    return write_data(tmp_path_factory.mktemp("task_data"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """The tiny Llama, but loud: its answers depend on what it is asked."""
    folder = Path(shutil.copytree(tiny_models["llama"], tmp_path_factory.mktemp("loud") / "llama"))
    louder = {n: x * 8 if x.ndim > 1 else x for n, x in load_file(folder / "model.safetensors").items()}
    save_file(louder, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> tuple[Any, Any]:
    """The same, loaded: (model, tokenizer). Nobody may change it."""
    from curvelora_eval.models import load_base, load_processor
    from curvelora_eval.spec import ModelSpec, TaskSpec
    from curvelora_eval.tasks import make_task

    spec, task = ModelSpec(path=str(llama_folder), dtype="float32"), make_task(TaskSpec(kind="causal_lm"))
    return load_base(spec, task), load_processor(spec, task)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> dict[str, Path]:
    """Adapters for it: LoRA and LoRAN merge exactly, RanLoRA does not."""
    from peft import LoraConfig

    from curvelora import LoranConfig, RanloraConfig
    from named_tasks import save_adapter

    targets = ["q_proj", "v_proj"]
    configs = {
        "lora": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=targets, task_type="CAUSAL_LM"),
        "loran": LoranConfig(r=4, alpha=8, dropout=0.3, target_modules=targets),
        "ranlora": RanloraConfig(r=4, alpha=8, target_modules=targets),
    }
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(folder / name / "adapter", llama_folder, config) for name, config in configs.items()}


@pytest.fixture
def evaluate(tmp_path: Path, llama_folder: Path, task_data: Path) -> Callable[..., Path]:
    """`evaluate(*arguments)` -> the results' folder; the tiny Llama in fp32, with batches of 3."""

    from curvelora import cli

    def run(*arguments: Any, code: int = 0, out: Path | None = None) -> Path:
        out = out or tmp_path / "scores"
        given = ["--model", llama_folder, "--dtype", "float32", "--data-dir", task_data, "--batch-size", 3, *arguments]
        assert cli.main(["eval", "--out", str(out), *map(str, given)]) == code
        return out

    return run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], root: Path) -> Path:
    """The folder of a run of the training command: a tiny, loud BERT with LoRAN on real sentences, scored on unseen ones."""
    from curvelora_training.finetune import main

    folder = tmp_path_factory.mktemp("trained")
    base = Path(shutil.copytree(tiny_models["bert"], folder / "base"))
    # random weights of std 0.02 give every sentence nearly the same features; a louder base has something to learn from
    loud = {n: x * 5 if x.ndim > 1 else x for n, x in load_file(base / "model.safetensors").items()}
    save_file(loud, base / "model.safetensors", metadata={"format": "pt"})
    recipe = {
        "output": str(folder / "run"),
        "name": "LoRAN on sentences",
        "model": {"path": str(base), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 32},
        "data": {
            "train": {"path": str(root / "tests/data/sst2_sentences_train.tsv"), "limit": 128},
            "test": {"path": str(root / "tests/data/sst2_sentences_unseen.tsv"), "limit": 60},
        },
        "adapter": {"method": "loran", "r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["query", "value"]},
        "training": {"learning_rate": 1e-2, "batch_size": 8, "epochs": 4, "log_every": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["--config", str(path)]) == 0
    return folder / "run"
