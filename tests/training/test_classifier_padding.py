"""A classifier on a decoder reads a row's last token, never its padding: in training and in evaluation, batched as alone."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import curvelora_training.run as run
from curvelora import cli
from curvelora.loading import load_adapter
from curvelora_eval.models import load_base, load_processor
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import make_task
from run_files import result

CPU = torch.device("cpu")


@pytest.fixture
def decoder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny Llama, loud, as Llama-3-Instruct is: several ends of text, and a padding token in its tokenizer alone."""
    folder = Path(shutil.copytree(tiny_models["llama"], tmp_path / "decoder"))
    louder = {n: x * 5 if x.ndim > 1 else x for n, x in load_file(folder / "model.safetensors").items()}
    save_file(louder, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, eos_token_id=[2, 5], pad_token_id=None)
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize("pad", [None, 7])
def test_a_padded_batch_has_the_logits_of_each_row_alone(decoder: Path, pad: int | None) -> None:
    """Whatever the checkpoint's config says, batches are padded with the tokenizer's token."""
    change(decoder, pad_token_id=pad)
    spec = ModelSpec(path=str(decoder), dtype="float32")
    task = make_task(TaskSpec(kind="sequence_classification", labels=["0", "1"]))
    torch.manual_seed(0)
    model, tokenizer = load_base(spec, task, CPU, trained=["score"]).eval(), load_processor(spec, task)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    model.score.weight.data *= 20
    texts = ["bad", "a long and rather winding sentence about nothing in particular", "it works"]
    with torch.no_grad():
        batched = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert torch.allclose(batched, alone, atol=1e-4) and alone.std() > 0.1


def test_a_text_model_without_a_head_has_one_padding_token(decoder: Path) -> None:
    task = make_task(TaskSpec(kind="causal_lm"))
    assert load_base(ModelSpec(path=str(decoder), dtype="float32"), task, CPU).config.pad_token_id == 2


def test_training_and_evaluation_agree(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    decoder: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every batch of the training is compared with its rows alone, and the scores after it with plain PyTorch."""
    apart: list[float] = []
    padded: list[bool] = []

    def compare(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        if len(kwargs["input_ids"]) == 1 or not module.training:
            return
        with torch.no_grad():
            rows = [
                ids[mask.bool()][None] for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
            ]
            alone = torch.cat([module(input_ids=row).logits for row in rows])
        padded.append(not kwargs["attention_mask"].all())
        apart.append((output.logits - alone).abs().max().item())

    load = run.load_base

    def loaded(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        model.register_forward_hook(compare, with_kwargs=True)
        return model

    monkeypatch.setattr(run, "load_base", loaded)
    adapter = {"method": "loran", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    folder = finetune(write(recipe, **{"model.path": str(decoder), "adapter": adapter, "training.learning_rate": 1e-2}))
    assert sum(padded) > 5 and max(apart) < 1e-3

    unseen = root / "tests/data/sst2_sentences_unseen.tsv"
    base = AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=2).eval()
    model, words = load_adapter(base, folder / "adapter").eval(), AutoTokenizer.from_pretrained(decoder)
    with unseen.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[:40]
    wanted = []
    for row in rows:
        with torch.no_grad():
            logits = model(**words(row["sentence"], truncation=True, max_length=32, return_tensors="pt")).logits
        wanted.append(int(logits.argmax()))
    assert set(wanted) == {0, 1}
    given = [
        "eval",
        "--adapter",
        str(folder / "adapter"),
        "--data",
        str(unseen),
        "--limit",
        "40",
        "--out",
        str(tmp_path / "e"),
    ]
    assert cli.main(given) == 0
    lines = (tmp_path / "e/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == wanted
    right = sum(int(row["label"]) == guess for row, guess in zip(rows, wanted, strict=True)) / 40
    assert result(folder, "evaluation.json")["metrics"]["accuracy"]["value"] == pytest.approx(right)
