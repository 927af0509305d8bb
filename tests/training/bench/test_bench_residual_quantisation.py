"""The price of an untouched base on NF4: by hand for one layer, and what bad input says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from torch import nn
from transformers import BertConfig, BertModel

from curvelora_training.bench.residual_quantisation import main, measure


def test_one_layer_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(50, 8))  # the second has rows that are no whole blocks

    def through_nf4(weight: torch.Tensor) -> torch.Tensor:
        packed = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return functional.dequantize_4bit(packed[0], quant_state=packed[1])

    W = model[0].weight.detach()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    C = (U[:, :32] * S[:32]) @ Vt[:32]
    plain, rest = (through_nf4(W) - W).norm(), (through_nf4(W - C) + C - W).norm()
    found = measure(model, [32])
    assert found["layers"] == 1
    assert found["relative_error"] == pytest.approx((plain / W.norm()).item(), rel=1e-5)
    assert found["ratio"]["pissa"]["32"] == pytest.approx((rest / plain).item(), rel=1e-3)
    assert found["ratio"]["pissa"]["32"] < 0.8 < found["ratio"]["milora"]["32"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = BertConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    out = tmp_path / "new" / "record.json"
    assert main(["--model", str(tmp_path / "model"), "--ranks", "4", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["layers"] == 7 and record["model"] == "model" and set(record["ratio"]) == {"pissa", "milora", "olora"}
    assert main(["--model", str(tmp_path / "model"), "--ranks", "four", "--out", str(out)]) == 2
    assert "--ranks must be whole numbers" in capsys.readouterr().err
