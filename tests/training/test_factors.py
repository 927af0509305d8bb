"""Adapters that start from the weight, through a recipe: of the revision that it names, and of the checkpoint as it is stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from curvelora.svd import singular_triplets
from run_files import result

QUERY = "bert.encoder.layer.0.attention.self.query"
RANLORA = {"method": "ranlora", "r": 2, "target_modules": ["query"]}


@pytest.fixture
def hub(tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Revision -> snapshot of the model me/tiny in a hub cache of its own: "main", and "v2" with other weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, snapshots = tmp_path / "hub/models--me--tiny", {}
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        snapshots[name] = repository / "snapshots" / commit
        shutil.copytree(tiny_models["bert"], snapshots[name])
        (repository / "refs" / name).write_text(commit)
    tensors = load_file(snapshots["v2"] / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    changed = {n: t + 0.1 * t.std() * torch.randn(t.shape, generator=noise) for n, t in tensors.items() if "query" in n}
    save_file(tensors | changed, snapshots["v2"] / "model.safetensors", metadata={"format": "pt"})
    return snapshots


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_factors_are_those_of_the_revision(
    hub: dict[str, Path], recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable, quantization: str
) -> None:
    model = {"path": "me/tiny", "revision": "v2", "dtype": "float32", "quantization": quantization}
    folder = finetune(write(recipe, **{"model": model, "adapter": RANLORA, "training.max_steps": 0}))
    stored = load_file(folder / "adapter/adapter_model.safetensors")
    name = next(n for n in stored if n.endswith("layer.0.attention.self.query.ranlora_A0"))
    found = stored[name.replace("A0", "B0")] @ stored[name]
    distance = {}
    for revision, snapshot in hub.items():
        weight = next(
            t
            for n, t in load_file(snapshot / "model.safetensors").items()
            if n in (f"{QUERY}.weight", f"{QUERY.removeprefix('bert.')}.weight")
        )
        removed = singular_triplets(weight, 2, "last").product()
        distance[revision] = ((found - removed).norm() / removed.norm()).item()
    assert distance["v2"] < 1e-5 and distance["main"] > 0.1


def test_a_checkpoint_that_is_quantised_itself_is_called_so(
    tiny_models: dict[str, Path], recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable, tmp_path: Path
) -> None:
    """`model.quantization: none` leaves it as it is stored."""
    from transformers import AutoTokenizer, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"])
    AutoModelForSequenceClassification.from_pretrained(
        tiny_models["bert"], quantization_config=settings, device_map={"": "cpu"}, num_labels=2
    ).save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tiny_models["bert"]).save_pretrained(tmp_path / "packed")
    changes = {"model.path": str(tmp_path / "packed"), "training.max_steps": 0}
    folder = finetune(write(recipe, **changes))
    assert result(folder)["quantization"] == "nf4"
    assert "quantisation nf4" in (folder / "adapter/README.md").read_text(encoding="utf-8")
