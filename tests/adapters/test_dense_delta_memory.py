"""Weight-space layer: what it keeps. Naive autograd holds four or five d_out x d_in tensors a layer, 20 GB at 7B."""

from __future__ import annotations

import pytest
import torch
from inside_operators import InsideOperators
from torch.multiprocessing.reductions import StorageWeakRef

from curvelora.layers import dense_delta

D_IN, D_OUT, R = 96, 80, 3


class Tensors(InsideOperators):
    """Remembers every tensor that an operation makes: a weak reference to its storage, its dtype and its entries."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, torch.dtype, int]] = []

    def see(self, func, args, result):
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.made.append((StorageWeakRef(tensor.untyped_storage()), tensor.dtype, tensor.numel()))

    def alive(self, entries: int) -> int:
        """How many tensors of exactly this many entries still have their memory."""
        return sum(not storage.expired() for storage, _, n in self.made if n == entries)


def test_the_graph_saves_x_A_and_B_and_nothing_else_of_the_adapter(loran_layer):
    layer = loran_layer(D_IN, D_OUT, r=R)
    x = torch.randn(2, 5, D_IN, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    base = layer.base_layer.weight.data_ptr()
    large = [t for t in saved if t.numel() >= D_OUT * D_IN]
    assert all(t.data_ptr() == base for t in large), [tuple(t.shape) for t in large]
    of_adapter = sorted(t.data_ptr() for t in saved if t.data_ptr() != base)
    assert of_adapter == sorted(t.data_ptr() for t in (x, *layer.factors("default")))


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_of_the_size_of_the_weight_outlives_a_pass(loran_layer, autocast):
    layer = loran_layer(D_IN, D_OUT, r=R)
    x = torch.randn(2, 5, D_IN, requires_grad=True)
    with Tensors() as tensors:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            adapter = layer.adapter_output("default", x)
        assert any(n == D_OUT * D_IN for _, _, n in tensors.made)  # dW was formed, so there was something to drop
        assert tensors.alive(D_OUT * D_IN) == 0, "after the forward pass"
        adapter.sum().backward()
    assert tensors.alive(D_OUT * D_IN) == 0, "after the backward pass"
    assert x.grad is not None


def test_fp32_temporaries_are_no_larger_than_a_block(loran_layer, monkeypatch):
    """Under bf16 autocast the only tensor of the size of the weight is dW itself, in bf16."""
    monkeypatch.setattr(dense_delta, "BLOCK_ENTRIES", 1024)
    layer = loran_layer(D_IN, D_OUT, r=R)
    x = torch.randn(4, D_IN, requires_grad=True)
    with Tensors() as tensors:
        with torch.autocast("cpu", torch.bfloat16):
            adapter = layer.adapter_output("default", x)
        adapter.float().sum().backward()
    assert max(n for _, dtype, n in tensors.made if dtype == torch.float32) <= 1024
    assert {dtype for _, dtype, n in tensors.made if n == D_OUT * D_IN} == {torch.bfloat16}


def test_the_dispatch_mode_sees_a_tensor_that_is_kept():
    """The control of the two tests above: a saved dW is found."""
    A, B = torch.randn(R, D_IN, requires_grad=True), torch.randn(D_OUT, R, requires_grad=True)
    x = torch.randn(4, D_IN, requires_grad=True)
    with Tensors() as tensors:
        y = x @ torch.tanh(B @ A).T
        assert tensors.alive(D_OUT * D_IN) > 0
    del y
    assert tensors.alive(D_OUT * D_IN) == 0
