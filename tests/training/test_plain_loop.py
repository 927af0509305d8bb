"""The trainer against a loop of PEFT and torch alone: the same loss at every step, and the same adapter and head at the end."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

from run_files import metrics

ROWS, BATCH, EPOCHS, WARM = 44, 8, 2, 3  # the last batch of an epoch is filled up from its start
RATE, HEAD_RATE = 2e-2, 5e-3


@pytest.mark.parametrize("kind", ["regression", "sequence_classification"])
def test_every_step_is_that_of_a_plain_loop(
    kind: str,
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    tiny_models: dict[str, Path],
    root: Path,
    tmp_path: Path,
) -> None:
    regression = kind == "regression"
    with (root / "tests/data/sst2_sentences_train.tsv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file, delimiter="\t"))[:ROWS]
    # scores far from 0, as STS-B's are, and other rows at every label
    rows = [(row["sentence"], len(row["sentence"]) % 11 / 2 if regression else int(row["label"])) for row in found]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows), encoding="utf-8")
    base = without_dropout(tiny_models["bert"], tmp_path / "base")
    changes: dict[str, Any] = {
        "model.path": str(base),
        "task": {"kind": kind, "max_length": 24},
        "data": {"train": str(data)},
        "adapter": {"method": "lora", "r": 4, "alpha": 8, "target_modules": ["query", "value"]},
        "training": {"learning_rate": RATE, "head_learning_rate": HEAD_RATE, "batch_size": BATCH, "epochs": EPOCHS}
        | {"schedule": "linear", "warmup": WARM, "group_by_length": True, "log_every": 1},
        "seed": 3,
    }
    start = finetune(write(recipe, **changes), "training.max_steps=0", f"output={tmp_path / 'start'}")
    run = finetune(write(recipe, **changes))

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1 if regression else 2)
    model = PeftModel.from_pretrained(model, start / "adapter", is_trainable=True)
    losses = plain_loop(model, AutoTokenizer.from_pretrained(base), rows)
    assert [line["loss"] for line in metrics(run) if "loss" in line] == pytest.approx(losses, rel=1e-4)

    ended = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1 if regression else 2), run / "adapter"
    ).state_dict()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(ended[name], weight.detach(), rtol=1e-3, atol=1e-5, msg=name)


def without_dropout(checkpoint: Path, copy: Path) -> Path:
    """The checkpoint with dropout off, for two loops draw other numbers."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.base_model.save_pretrained(copy)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(copy)
    return copy


def plain_loop(model: PeftModel, tokenizer: Any, rows: list[tuple[str, float]]) -> list[float]:
    """The loss of every step: AdamW at two rates without decay, warm-up and linear decay, the gradient's norm cut at 1."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if "classifier" in name]
    adapter = [p for name, p in trained.items() if "classifier" not in name]
    groups = [{"params": adapter, "lr": RATE}, {"params": head, "lr": HEAD_RATE}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    lengths = [len(ids) for ids in tokenizer([text for text, _ in rows], truncation=True, max_length=24)["input_ids"]]
    each = -(-ROWS // BATCH)
    total = EPOCHS * each
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: step / WARM if step < WARM else (total - step) / (total - WARM)
    )
    model.train()
    losses = []
    for epoch in range(EPOCHS):
        order = get_length_grouped_indices(lengths, BATCH, generator=torch.Generator().manual_seed(3 + epoch))
        order += order[: each * BATCH - ROWS]
        for first in range(0, each * BATCH, BATCH):
            texts, labels = zip(*(rows[i] for i in order[first : first + BATCH]), strict=True)
            inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=24, return_tensors="pt")
            loss = loss_of(model(**inputs).logits, torch.tensor(labels))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of row and label, or minus the mean of the label's log-probability."""
    if labels.dtype.is_floating_point:
        return (logits[:, 0] - labels).square().mean()
    return -logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()
