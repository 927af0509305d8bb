"""Shares of spline inputs beyond the grid: a case that is counted by hand, and what does not count."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from curvelora import AuroraConfig, LoranConfig
from curvelora.grid_monitor import GridMonitor
from curvelora.methods.aurora import AuroraLayer


@pytest.fixture
def layer() -> AuroraLayer:
    """z = x: A is the identity on two inputs."""
    layer = AuroraLayer(nn.Linear(2, 3), "layer")
    layer.add_adapter("default", AuroraConfig(r=2, dropout=0.0))
    layer.aurora_A["default"].data.copy_(torch.eye(2))
    return layer


def test_shares_by_hand(layer):
    monitor = GridMonitor(layer)
    assert monitor.take() is None
    layer(torch.tensor([[0.5, -0.99], [1.01, -1.5]]))  # two of four beyond +-1
    layer(torch.tensor([[2.19, -2.21], [5.0, 0.0]]))  # three beyond +-1, two of them beyond +-2.2
    assert monitor.take() == {"beyond_grid": 5 / 8, "beyond_support": 2 / 8}
    assert monitor.take() is None  # counted anew


def test_another_adapter_on_the_layer_does_not_count(layer):
    layer.add_adapter("other", AuroraConfig(r=2, dropout=0.0))
    monitor = GridMonitor(layer)
    layer.set_adapter("other")
    layer(torch.full((1, 2), 9.0))
    assert monitor.take() is None
    layer.set_adapter(["default", "other"])
    layer(torch.tensor([[9.0, 0.0]]))
    assert monitor.take() == {"beyond_grid": 1 / 2, "beyond_support": 1 / 2}


def test_evaluation_does_not_count(layer):
    monitor = GridMonitor(layer)
    layer.eval()(torch.full((1, 2), 9.0))
    assert monitor.take() is None


def test_a_compiled_layer_counts_without_starting_again(layer):
    monitor, x = GridMonitor(layer), torch.tensor([[0.5, -1.5]])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(3):  # of logging, with passes in between
            for _ in range(4):
                compiled(x).sum().backward()
            assert monitor.take() == {"beyond_grid": 1 / 2, "beyond_support": 0}


def test_it_changes_no_number(layer):
    x = torch.randn(4, 2)
    before = layer(x)
    GridMonitor(layer)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    "config", [LoranConfig(r=2, dropout=0.0), AuroraConfig(learnable=False)], ids=["loran", "w/o L"]
)
def test_without_a_spline_there_is_nothing_to_count(llama, token_ids, config):
    config.target_modules = {"q_proj"}
    model = get_peft_model(llama(), config).train()
    monitor = GridMonitor(model)
    model(token_ids)
    assert monitor.take() is None
