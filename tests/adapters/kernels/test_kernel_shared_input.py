"""Layers that read the same tensor, as q, k and v do: one `Held`, one gradient summed inside of the products."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from kernel_world import factors, normal, relative, sinter, stored_weight
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvelora.kernels import held
from curvelora.kernels.merged_linear import merged_linear
from curvelora.kernels.nf4 import codes_of

BOUND = 8e-3  # bf16's own, as for one layer
SIZES = (96, 64, 130)
F = sinter(2e-2)


def loss_of(products: Iterable[Tensor], x: Tensor) -> Tensor:
    """Every output with another weight, and x itself, so that its gradient has a part that no layer makes."""
    return sum((number + 1) * y.double().square().mean() for number, y in enumerate(products)) + x.double().mean()


@pytest.mark.parametrize("mode", ["plain", "not reentrant", "reentrant"])
@pytest.mark.parametrize("frozen", [None, 1], ids=["all train", "one is frozen"])
def test_three_layers_on_one_tensor(
    nf4: Callable[..., nn.Module], device: torch.device, mode: str, frozen: int
) -> None:
    layers = [nf4(size, 128) for size in SIZES]
    given = [factors(device, size, 128, 8, 1e-2) for size in SIZES]
    pairs = [tuple(t.clone().requires_grad_(number != frozen) for t in pair) for number, pair in enumerate(given)]
    x = normal(device, 6, 128).requires_grad_()

    def block(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            merged_linear(x, *pair, None, codes_of(layer), F) for pair, layer in zip(pairs, layers, strict=True)
        )

    made = block(x) if mode == "plain" else checkpoint(block, x, use_reentrant=mode == "reentrant")
    loss_of(made, x).backward()
    assert held._last is None, "nothing is held after the backward pass"

    exact_x = x.detach().double().requires_grad_()
    exact_pairs = [tuple(t.double().requires_grad_() for t in pair) for pair in given]
    exact = [
        exact_x @ (stored_weight(layer) + F.value(B @ A)).T for (A, B), layer in zip(exact_pairs, layers, strict=True)
    ]
    loss_of(exact, exact_x).backward()
    assert relative(x.grad, exact_x.grad) < BOUND
    for number, (pair, wanted) in enumerate(zip(pairs, exact_pairs, strict=True)):
        for factor, exact_factor in zip(pair, wanted, strict=True):
            if number == frozen:
                assert factor.grad is None
            else:
                assert relative(factor.grad, exact_factor.grad) < BOUND


def test_the_sum_is_made_in_one_tensor(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    """Three gradients of x reach autograd as one: the hook of `Held`'s input sees a single tensor."""
    layers = [nf4(size, 128) for size in SIZES]
    x = normal(device, 6, 128).requires_grad_()
    made = [
        merged_linear(x, *(t.requires_grad_() for t in factors(device, size, 128, 8, 1e-2)), None, codes_of(layer), F)
        for size, layer in zip(SIZES, layers, strict=True)
    ]
    assert len({id(y.grad_fn.next_functions[0][0]) for y in made}) == 1
    node, seen = made[0].grad_fn.next_functions[0][0], []
    node.register_prehook(
        lambda grads: seen.append(node.pending is not None and grads[0].data_ptr() == node.pending.data_ptr())
    )
    sum(y.float().sum() for y in made).backward()
    assert seen == [True]


@pytest.mark.parametrize("history", ["a leaf", "a view", "in fp32", "a norm"])
def test_losses_may_be_walked_one_by_one(nf4: Callable[..., nn.Module], device: torch.device, history: str) -> None:
    """The first of two backward passes frees what was saved for all; plain layers save their input each."""
    layers, pairs = [nf4(size, 128) for size in SIZES], [factors(device, size, 128, 8, 1e-2) for size in SIZES]
    leaf = normal(device, 6, 128).to(torch.float32 if history == "in fp32" else torch.bfloat16).requires_grad_()
    x = {"a leaf": leaf, "a norm": nn.functional.layer_norm(leaf, (128,))}.get(history, leaf.view(6, 128))

    def products() -> list[Tensor]:
        train = [[t.detach().clone().requires_grad_() for t in pair] for pair in pairs]
        made = [merged_linear(x, *pair, None, codes_of(layer), F) for pair, layer in zip(train, layers, strict=True)]
        assert len({y.grad_fn.next_functions[0][0] for y in made}) == 1
        return made

    (wanted,) = torch.autograd.grad(sum(y.float().square().sum() for y in products()), x)
    made = products()
    found = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in made]
    assert relative(sum(found), wanted) < BOUND
    assert all(gradient.norm() > 0.1 * wanted.norm() for gradient in found)
    made = products()
    (all_at_once,) = torch.autograd.grad(sum(y.float().square().sum() for y in made), x, retain_graph=True)
    assert torch.equal(all_at_once, wanted)
    assert all(
        torch.equal(torch.autograd.grad(y.float().square().sum(), x)[0], g) for y, g in zip(made, found, strict=True)
    )
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(made[0].float().square().sum(), x)


def test_an_input_that_changed_between_such_losses_is_noticed(
    nf4: Callable[..., nn.Module], device: torch.device
) -> None:
    x, layer = normal(device, 6, 128).requires_grad_() * 1, nf4(96, 128)
    A, B = (t.requires_grad_() for t in factors(device, 96, 128, 8, 1e-2))
    first, second = (merged_linear(x, A, B, None, codes_of(layer), F).float().sum() for _ in range(2))
    torch.autograd.grad(first, x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(second, x)


@contextlib.contextmanager
def saved_by_autograd() -> Iterator[list[Tensor]]:
    """Inside, a list of what is saved for the backward pass."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield kept


def test_an_input_in_fp32_has_one_copy_in_bf16(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    """As behind norms in fp32, which PEFT's `prepare_model_for_kbit_training` leaves."""
    layers, pairs = [nf4(size, 128) for size in SIZES], [factors(device, size, 128, 8, 1e-2) for size in SIZES]
    narrow, found = normal(device, 6, 128), {}
    for dtype in (torch.bfloat16, torch.float32):
        leaf = narrow.clone().to(dtype).requires_grad_()
        x = leaf * 1
        train = [[t.detach().clone().requires_grad_() for t in pair] for pair in pairs]
        with saved_by_autograd() as kept:
            made = [
                merged_linear(x, *pair, None, codes_of(layer), F) for pair, layer in zip(train, layers, strict=True)
            ]
        assert [t.dtype for t in kept] == [torch.bfloat16]
        loss_of(made, x.new_zeros(1)).backward()
        assert leaf.grad.dtype == dtype
        found[dtype] = [leaf.grad, *(t.grad for pair in train for t in pair)]
    for wide, wanted in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        assert torch.equal(wide, wanted.to(wide.dtype))


def test_an_output_that_nobody_uses_keeps_nothing(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    """Of x, once the other layers' gradients are there and the output is gone."""
    layers, pairs = [nf4(size, 128) for size in SIZES], [factors(device, size, 128, 8, 1e-2) for size in SIZES]
    x = normal(device, 6, 128).requires_grad_() * 1
    train = [[t.requires_grad_() for t in pair] for pair in pairs]
    made = [merged_linear(x, *pair, None, codes_of(layer), F) for pair, layer in zip(train, layers, strict=True)]
    loss, alive = made[0].float().sum() + made[2].float().sum(), weakref.ref(x)
    loss.backward()
    del made, x
    assert alive() is None


def test_threads_share_nothing(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    """Their backward passes may be at the same time."""
    x, found = normal(device, 6, 128).requires_grad_() * 1, []
    thread = threading.Thread(target=lambda: found.append(held.held_input(x)))
    first = held.held_input(x)
    thread.start()
    thread.join()
    assert found[0] is not first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_layers_on_two_streams_share_nothing() -> None:
    """One would add to a sum that the other may not have written yet."""
    x = normal(torch.device("cuda", 0), 6, 128).requires_grad_() * 1
    first = held.held_input(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert held.held_input(x) is not first


def test_another_tensor_or_a_changed_one_is_not_taken_for_it(device: torch.device) -> None:
    x = normal(device, 6, 128).requires_grad_() * 1
    first = held.held_input(x)
    assert held.held_input(x) is first
    assert held.held_input(x * 1) is not first
    again = held.held_input(x)
    x.mul_(2)
    assert held.held_input(x) is not again
