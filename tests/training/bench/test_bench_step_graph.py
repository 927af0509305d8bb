"""A recorded step gives what the plain step gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig

from curvelora_training.bench.arms import named_arm
from curvelora_training.bench.ground import Ground, build_ground
from curvelora_training.bench.random_base import random_model
from curvelora_training.bench.settings import LabSettings
from curvelora_training.bench.step_graph import _without_mask, of_fixed_length, record_step, start_trial

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ARMS = ("qlora", "loran:sinter", "loran:sinter-large", "ranlora", "aurora", "loran:sinter@fp32", "full")


@pytest.fixture
def ground(tmp_path: Path) -> Callable[..., Ground]:
    """(device, dropout) -> what arms stand on: a tiny Llama with random NF4 weights."""
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(CONFIG | {"model_type": "llama"}))

    def make(device: str, dropout: float = 0.0) -> Ground:
        options = {"steps": 6, "batch_size": 2, "length": 16, "rank": 8, "dropout": dropout, "learning_rate": 1e-2}
        targets, arms = ["q_proj", "down_proj"], [named_arm(name) for name in ARMS]
        settings = LabSettings(model=str(shape), target_modules=targets, arms=arms, **options)
        return build_ground(settings, torch.device(device))

    return make


def test_padding_to_a_fixed_length_leaves_the_loss_as_it_is() -> None:
    base = random_model(LlamaConfig(**CONFIG), "fp32", torch.device("cpu"))
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    mask[1, 6:], labels[1, 6:], labels[:, :2] = 0, -100, -100
    own = base(input_ids=ids, labels=labels, attention_mask=mask).loss
    fixed = of_fixed_length({"input_ids": ids, "labels": labels, "attention_mask": mask}, 16, 0)
    assert fixed.keys() == {"input_ids", "labels"} and fixed["input_ids"].shape == (2, 16)
    assert base(**fixed).loss.item() == pytest.approx(own.item(), rel=1e-6)


def test_a_recorded_step_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it records, transformers builds one unless there is a cache: another kernel than the plain step's."""
    base = random_model(LlamaConfig(**CONFIG, use_cache=False), "fp32", torch.device("cpu"))
    ids, masks = torch.zeros(2, 9, dtype=torch.long), []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: masks.append(k["attn_mask"]) or attention(*a, **k)
    )
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    base(input_ids=ids)
    assert all(mask is not None for mask in masks) and len(masks) == 2
    masks.clear()
    with _without_mask(base.config):
        base(input_ids=ids)
    assert masks == [None, None] and base.config.use_cache is False


def test_a_cpu_records_nothing(ground: Callable[..., Ground]) -> None:
    trial, prepare = start_trial(ground("cpu"), named_arm("qlora"), 0)
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    assert trial.graph is None and prepare(batch) is batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ARMS)
def test_recorded_steps_equal_plain_ones(ground: Callable[..., Ground], name: str) -> None:
    made = ground("cuda:0")
    plain, recorded = made.trial(named_arm(name), 0), made.trial(named_arm(name), 0)
    record_step(recorded, made.source.batch(0, 0), observe=True)
    for step in range(6):
        batch = made.source.batch(0, step)
        one, other = plain.step(batch, observe=True), recorded.step(batch, observe=True)
        assert other["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-5)
        assert other["grad_norm"].item() == pytest.approx(one["grad_norm"].item(), rel=2e-2)
        for kind, value in one["update_ratio"].items():
            assert other["update_ratio"][kind].item() == pytest.approx(value.item(), rel=5e-2)
    for mine, theirs in zip(plain.named.values(), recorded.named.values(), strict=True):
        assert F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_dropout_differs_from_step_to_step_when_it_is_recorded(ground: Callable[..., Ground]) -> None:
    made = ground("cuda:0", dropout=0.5)
    made.settings.learning_rate = 1e-12
    trial, _ = start_trial(made, named_arm("ranlora"), 0)
    assert trial.graph is not None
    batch = made.source.batch(0, 0)
    losses = [trial.step(batch)["loss"].item() for _ in range(4)]
    assert len(set(losses)) == 4
