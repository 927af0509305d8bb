"""A small world in which things can be broken one at a time: a recipe, rows, models and adapters that are whole until told."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from curvelora import LoranConfig
from curvelora_eval.spec import ModelSpec, TaskSpec, write_task

WEIGHTS = "adapter_model.safetensors"


class World:
    """Builders below one temporary folder; each returns a path as text, as recipes and commands take it.

    Args:
        folder: everything is made in here.
        models: the tiny checkpoints.
        data: the folder with the sample rows.
    """

    def __init__(self, folder: Path, models: dict[str, Path], data: Path) -> None:
        self.folder, self.models, self.data = folder, models, data
        self.rows = str(data / "sst2_sentences_unseen.tsv")

    def path(self, name: str) -> str:
        """A path in here that nothing was made at."""
        return str(self.folder / name)

    def file(self, name: str, content: str | bytes) -> str:
        """A file with this content."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def recipe(self, changes: dict[str, Any]) -> str:
        """The file of a good recipe after `changes`: dotted key -> value."""
        recipe = {
            "output": self.path("run"),
            "model": {"path": str(self.models["bert"]), "dtype": "float32"},
            "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 16},
            "data": {
                "train": {"path": str(self.data / "sst2_sentences_train.tsv"), "limit": 32},
                "test": {"path": self.rows, "limit": 8},
            },
            "adapter": {"method": "loran", "r": 4, "alpha": 8, "target_modules": ["query", "value"]},
            "training": {"learning_rate": 1e-3, "batch_size": 8, "epochs": 1, "save_every": 2, "log_every": 1},
        }
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            node: Any = recipe
            for parent in parents:
                node = node[parent]
            node[last] = copy.deepcopy(value)
        return self.file("recipe.yaml", yaml.safe_dump(recipe))

    def model(self, name: str, damage: Callable[[Path], Any]) -> str:
        """A copy of a tiny checkpoint after `damage(folder)`."""
        folder = Path(shutil.copytree(self.models[name], self.folder / f"damaged-{name}"))
        damage(folder)
        return str(folder)

    def adapter(self, name: str = "bert", damage: Callable[[Path], Any] = lambda folder: None, **sizes: int) -> str:
        """A LoRAN adapter for a tiny checkpoint (bert may be of other `sizes`), with its task.json, after `damage`."""
        if name == "bert":
            config = BertConfig.from_pretrained(self.models["bert"], **sizes)
            model, targets, heads = BertForSequenceClassification(config), ["query", "value"], ["classifier"]
            task = TaskSpec(kind="sequence_classification", columns={"text": "sentence"}, labels=["0", "1"])
        else:
            model, targets, heads = AutoModelForCausalLM.from_pretrained(self.models[name]), ["q_proj", "v_proj"], None
            task = TaskSpec(kind="causal_lm", columns={"text": "sentence"})
        folder = self.folder / "adapter"
        config = LoranConfig(r=4, alpha=8, target_modules=targets, modules_to_save=heads)
        get_peft_model(model, config).save_pretrained(folder)
        write_task(folder, ModelSpec(path=str(self.models[name]), dtype="float32"), task)
        damage(folder)
        return str(folder)

    def files(self) -> dict[str, bytes]:
        """Every file below the folder with its content."""
        return {str(p): p.read_bytes() for p in sorted(self.folder.rglob("*")) if p.is_file()}


def check_message(error: str, parts: list[str]) -> None:
    """Exactly one message on stderr beside progress bars: one line, or a line for each error of a recipe."""
    first, *others = [line for line in error.split("\n") if line and "\r" not in line]
    assert first.startswith("error: ") and all(line.startswith("  - ") for line in others), error
    for part in parts:
        assert part in error
    assert "Traceback" not in error


def without(*patterns: str) -> Callable[[Path], None]:
    """Damage: delete these files."""

    def damage(folder: Path) -> None:
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return damage


def truncated(name: str) -> Callable[[Path], None]:
    """Damage: cut the file in the middle."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def pickled(name: str) -> Callable[[Path], Any]:
    """Damage: the weights under a pickle's name, and no safetensors; nothing may get as far as opening it."""
    return lambda folder: next(folder.glob("*.safetensors")).rename(folder / name)


def lacking(part: str) -> Callable[[Path], None]:
    """Damage: weights without the tensors whose name contains `part`."""

    def damage(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        kept = {name: tensor for name, tensor in load_file(path).items() if part not in name}
        save_file(kept, path, metadata={"format": "pt"})

    return damage


def edited(name: str, **values: Any) -> Callable[[Path], None]:
    """Damage: values of a JSON file replaced."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return damage
