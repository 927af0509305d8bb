"""Comparing outputs that were kept: the numbers themselves, what counts as a position, and what is not finite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from curvelora import output_change


class Echo(nn.Module):
    """Returns the logits that it is given, after a change."""

    def __init__(self, change: float = 0.0, encoder_decoder: bool = False) -> None:
        super().__init__()
        self.change, self.config = change, SimpleNamespace(is_encoder_decoder=encoder_decoder)

    def forward(self, logits: torch.Tensor, labels: Any = None, attention_mask: Any = None) -> SimpleNamespace:
        return SimpleNamespace(logits=logits + self.change, loss=None)


def compared(batches: list[dict[str, Any]], change: float, **options: Any) -> output_change.OutputChange:
    comparison = output_change.Comparison()
    kept = list(output_change.outputs(Echo(**options), batches))
    for before, after in zip(kept, output_change.outputs(Echo(change, **options), batches), strict=True):
        comparison.add(before, after)
    return comparison.result()


def test_kept_outputs_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [{"logits": torch.randn(5, 7)}, {"logits": torch.randn(3, 7)}]
    found = compared(batches, 0.5)
    monkeypatch.setattr(output_change, "BLOCK", 15)  # two rows of seven
    assert compared(batches, 0.5).as_dict() == pytest.approx(found.as_dict())
    norm = torch.cat([batch["logits"] for batch in batches]).norm().item()
    assert found.relative == pytest.approx(0.5 * 56**0.5 / norm, rel=1e-5) and found.positions == 8
    assert found.largest == pytest.approx(0.5, rel=1e-5) and found.agreement == 1.0


def test_the_padding_of_an_encoder_decoder_is_that_of_its_labels() -> None:
    """Its attention mask is of the input, even where that is as long as the labels."""
    mask, labels = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[4, 5, -100, -100]])
    batch = {"logits": torch.randn(1, 4, 6), "attention_mask": mask, "labels": labels}
    assert compared([batch], 1.0, encoder_decoder=True).positions == 2
    assert compared([batch], 1.0).positions == 3


def test_a_nan_is_never_hidden() -> None:
    found = compared([{"logits": torch.ones(2, 3)}, {"logits": torch.full((2, 3), float("nan"))}], 1.0)
    assert found.largest != found.largest and found.relative != found.relative
