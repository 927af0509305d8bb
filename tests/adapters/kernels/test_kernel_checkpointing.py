"""Gradient checkpointing, torch.compile and copies around the fused products."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from kernel_world import FusedProducts, factors, nf4_layer, normal, relative, sinter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvelora.kernels.merged_linear import merged_linear
from curvelora.kernels.nf4 import codes_of
from curvelora.kernels.separate_linear import separate_linear


class Chain(nn.Module):
    """Two fused layers with a function between them, the last one ending the block as Llama's down_proj does."""

    def __init__(self, device: torch.device, path: str) -> None:
        super().__init__()
        self.path, self.layers = path, [nf4_layer(device, 96, 64), nf4_layer(device, 64, 128)]
        pairs = factors(device, 96, 64, 8, 1e-2), factors(device, 64, 128, 8, 1e-2)
        self.A, self.B = (nn.ParameterList([pair[i] for pair in pairs]) for i in (0, 1))

    def fused(self, i: int, x: Tensor) -> Tensor:
        """Layer i of x."""
        base = codes_of(self.layers[i])
        if self.path == "merged":
            return merged_linear(x, self.A[i], self.B[i], None, base, sinter(2e-2))
        return separate_linear(x, self.A[i], self.B[i], None, base, sinter(2e-2))

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, 64) -> (tokens, 64)."""
        return self.fused(1, torch.cat([torch.tanh(self.fused(0, x)), x[:, :32]], 1))


def run(function: Callable[[Tensor], Tensor], model: Chain, x: Tensor) -> dict[str, Tensor]:
    """{"y", "x", parameter: gradient}."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.fixture(params=["merged", "separate"])
def chain(request: pytest.FixtureRequest, device: torch.device) -> Chain:
    """On each path."""
    return Chain(device, request.param)


def test_checkpointing_does_not_make_the_last_product_again(chain: Chain, device: torch.device) -> None:
    """`Held`: of two products only the first is made again, and gradients are those without checkpointing, bit for bit."""
    x = normal(device, 16, 64)
    wanted = run(chain, chain, x)
    with FusedProducts() as products:
        found = run(lambda x: checkpoint(chain, x, use_reentrant=False), chain, x)
    assert products.count == 2 + 1
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_reentrant_checkpointing_gives_the_same(chain: Chain, device: torch.device) -> None:
    x = normal(device, 16, 64)
    wanted = run(chain, chain, x)
    found = run(lambda x: checkpoint(chain, x, use_reentrant=True), chain, x)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def as_large_as_a_weight() -> set[int]:
    """Where tensors with as many entries as the first layer's weight are."""
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.numel() >= 96 * 64]
    return {t.untyped_storage().data_ptr() for t in tensors}


def test_what_autograd_keeps_is_x(chain: Chain, device: torch.device) -> None:
    """No d_out x d_in matrix, nor in a node of the graph; parameters and the workspace are there anyway."""
    x, kept = normal(device, 16, 64).requires_grad_(), []
    chain.fused(0, x)
    before = as_large_as_a_weight()
    assert before, "the workspace is seen"
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = chain.fused(0, x)
    assert y.requires_grad and as_large_as_a_weight() <= before
    assert [t.untyped_storage().data_ptr() for t in kept] == [x.untyped_storage().data_ptr()]


def test_a_graph_that_is_kept_can_be_walked_twice(chain: Chain, device: torch.device) -> None:
    y = chain(normal(device, 16, 64)).float().square().sum()
    parameters = list(chain.parameters())
    first = torch.autograd.grad(y, parameters, retain_graph=True)
    second = torch.autograd.grad(y, parameters)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, parameters)


@pytest.mark.parametrize("before", [pytest.param("whole", marks=pytest.mark.slow), "factors", "broken off"])
def test_one_input_of_two_layers_in_several_passes(
    chain: Chain, device: torch.device, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is summed for a shared input is of one backward pass, whatever another one did before; kept graphs and new ones."""
    x = normal(device, 16, 64).requires_grad_()

    def loss() -> Tensor:
        return chain.fused(0, x).float().square().sum() + chain.fused(0, x).float().sum()

    (wanted,) = torch.autograd.grad(loss(), x)
    kept = loss()
    if before == "broken off":
        with monkeypatch.context() as patch:
            patch.setattr("curvelora.kernels.held.Held.backward", lambda ctx, grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                torch.autograd.grad(kept, x, retain_graph=True)
    else:
        torch.autograd.grad(kept, x if before == "whole" else chain.A[0], retain_graph=True)
    assert torch.equal(torch.autograd.grad(kept, x)[0], wanted)
    assert torch.equal(torch.autograd.grad(loss(), x)[0], wanted)


def test_a_changed_input_is_noticed(chain: Chain, device: torch.device) -> None:
    """As by any function of PyTorch's: x written to between the passes would give wrong gradients."""
    x = normal(device, 16, 64)
    y = chain.fused(0, x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


def test_so_is_one_that_changed_after_a_pass_for_the_factors(chain: Chain, device: torch.device) -> None:
    """Such a pass ends before the input's own gradient, and what it unpacked must not serve the next one."""
    x = normal(device, 16, 64).requires_grad_() * 1
    loss = chain.fused(0, x).float().sum()
    torch.autograd.grad(loss, chain.A[0], retain_graph=True)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(loss, chain.A[0])


def test_compiled_it_gives_the_same(chain: Chain, device: torch.device) -> None:
    """One graph, with each layer an operator of its own."""
    x = normal(device, 16, 64)
    wanted = run(chain, chain, x)
    torch._dynamo.reset()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    found = run(compiled, chain, x)
    assert all(relative(found[name], value) < 1e-6 for name, value in wanted.items())
