"""`merged_linear` and `separate_linear` against fp64 autograd of the plain formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_world import exact, factors, gradients, normal, relative, sinter, stored_weight
from torch import Tensor, nn

from curvelora.activations import Activation
from curvelora.kernels import curves, dropout
from curvelora.kernels.dropout import mask_reference, new_seed
from curvelora.kernels.merged_linear import merged_linear
from curvelora.kernels.nf4 import codes_of
from curvelora.kernels.separate_linear import separate_linear
from curvelora.layers.dense_delta import DeltaMap, map_fields

# bf16's own: W or dW, G, M and every result are rounded once each, 1.7e-3 in the norm; measured: 5e-3 at most
BOUND = 8e-3
LORA = DeltaMap(Activation("identity"), 0.25)


def inputs(device: torch.device, d_out: int, d_in: int, rank: int, *leading: int) -> dict[str, Tensor]:
    """x, A, B and grad, with an update as large as the base."""
    A, B = factors(device, d_out, d_in, rank, 1e-2)
    x = normal(device, *leading, d_in)
    return {"x": x, "A": A, "B": B, "grad": normal(device, *leading, d_out, seed=3)}


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == (torch.float32 if name in "AB" else torch.bfloat16), name
        assert relative(found[name], value) < BOUND, (name, relative(found[name], value))


def check_merged(layer: nn.Module, f: DeltaMap, given: dict[str, Tensor]) -> None:
    base, bias = codes_of(layer), layer.bias
    found = gradients(lambda x, A, B: merged_linear(x, A, B, bias, base, f), **given)
    compare(found, exact(stored_weight(layer), bias, f, **given))


def check_separate(layer: nn.Module, base: list[Tensor], W0: Tensor, f: DeltaMap, given: dict[str, Tensor]) -> None:
    found = gradients(lambda x, A, B: separate_linear(x, A, B, layer.bias, base, f), **given)
    compare(found, exact(W0, layer.bias, f, **given))


@pytest.mark.parametrize(
    ("name", "inside"), [*((name, False) for name in curves.NAMES), ("sinter", True), ("identity", True)]
)
def test_every_f_on_both_paths(nf4: Callable[..., nn.Module], device: torch.device, name: str, inside: bool) -> None:
    layer, f = nf4(40, 64), DeltaMap(Activation(name, 2e-2, 1e4 if name == "sinter" else 30.0), 0.25, inside)
    given = inputs(device, 40, 64, 8, 48)
    check_merged(layer, f, given)
    W0 = stored_weight(layer).bfloat16()
    check_separate(layer, [W0], W0, f, given)


@pytest.mark.parametrize(("rank", "nested"), [(1, True), (8, False), (17, True), (64, False), (128, True)])
def test_every_rank(nf4: Callable[..., nn.Module], device: torch.device, rank: int, nested: bool) -> None:
    """With an odd number of outputs."""
    layer, given = nf4(77, 128, nested=nested, bias=True), inputs(device, 77, 128, rank, 48)
    check_merged(layer, sinter(2e-2), given)
    for f in (LORA,) if nested else (LORA, sinter(2e-2)):
        check_separate(layer, codes_of(layer), stored_weight(layer), f, given)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_stored_as_other_types(nf4: Callable[..., nn.Module], device: torch.device, storage: torch.dtype) -> None:
    check_merged(nf4(40, 64, storage=storage), sinter(2e-2), inputs(device, 40, 64, 8, 48))


@pytest.mark.parametrize("leading", [(1,), (3, 17), (2, 3, 5)])
def test_leading_dimensions(nf4: Callable[..., nn.Module], device: torch.device, leading: tuple[int, ...]) -> None:
    layer, given = nf4(40, 64, bias=True), inputs(device, 40, 64, 8, *leading)
    check_merged(layer, sinter(2e-2), given)
    check_separate(layer, codes_of(layer), stored_weight(layer), sinter(2e-2), given)


def test_bases_of_plain_linear_layers_may_have_any_width(device: torch.device) -> None:
    layer = nn.Linear(75, 33, device=device, dtype=torch.bfloat16).requires_grad_(False)
    check_separate(layer, [layer.weight], layer.weight, sinter(2e-2), inputs(device, 33, 75, 8, 48))


@pytest.mark.parametrize("f", [sinter(2e-2), LORA], ids=["sinter", "identity"])
@pytest.mark.parametrize("base", ["nf4", "bf16"])
@pytest.mark.parametrize("as_operator", [False, True])
def test_dropout_is_the_mask_s(
    nf4: Callable[..., nn.Module],
    device: torch.device,
    base: str,
    f: DeltaMap,
    as_operator: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the adapter's input alone; the same mask in both passes, which the seed decides, in three bands of rows.

    The operator is what a compiled layer calls, and one whose input needs no gradient.
    """
    monkeypatch.setattr(dropout, "BAND", 1)
    layer, given = nf4(40, 64, bias=True), inputs(device, 40, 64, 8, 3, 50)
    W0 = stored_weight(layer) if base == "nf4" else stored_weight(layer).bfloat16()
    stored = codes_of(layer) if base == "nf4" else [W0]
    torch.manual_seed(7)
    operator = torch.ops.curvelora.separate_linear
    found = gradients(
        lambda x, A, B: (
            operator(x, new_seed(device), A, B, layer.bias, stored, 0.3, *map_fields(f))
            if as_operator
            else separate_linear(x, A, B, layer.bias, stored, f, 0.3)
        ),
        **given,
    )
    torch.manual_seed(7)
    mask = mask_reference(given["x"].shape, new_seed(device), 0.3)
    assert 0.6 < (mask != 0).float().mean() < 0.8
    compare(found, exact(W0, layer.bias, f, mask=mask, **given))


def test_inputs_and_gradients_with_strides(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    layer, f = nf4(40, 64), sinter(2e-2)
    given, base = inputs(device, 40, 64, 8, 6, 7), codes_of(nf4(40, 64))
    strided = dict(given, x=given["x"].transpose(0, 1), grad=given["grad"].transpose(0, 1))
    assert not strided["x"].is_contiguous()
    check_merged(layer, f, strided)
    check_separate(layer, base, stored_weight(layer), f, strided)
    ones = dict(given, grad=torch.ones((), device=device, dtype=torch.bfloat16).expand(6, 7, 40))  # of y.sum()
    check_merged(layer, f, ones)
    check_separate(layer, base, stored_weight(layer), f, ones)


def test_no_rows_at_all(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    """An empty batch gives an empty output, and gradients of zero."""
    given, base, f = inputs(device, 40, 64, 8, 0), codes_of(nf4(40, 64)), sinter(2e-2)
    grad = given.pop("grad")
    calls = (
        lambda x, A, B: merged_linear(x, A, B, None, base, f),
        lambda x, A, B: separate_linear(x, A, B, None, base, f),
        lambda x, A, B: separate_linear(x, A, B, None, base, f, 0.5),
    )
    for function in calls:
        found = gradients(function, grad, **given)
        assert found["y"].shape == (0, 40) and found["x"].shape == (0, 64)
        assert not found["A"].any() and not found["B"].any()


@pytest.mark.parametrize("needed", ["", "x", "B", "xA", "xB"])
def test_gradients_that_nobody_needs_are_not_given(
    nf4: Callable[..., nn.Module], device: torch.device, needed: str
) -> None:
    """Frozen factors, an input without gradient, and every mixture; those given are the same numbers."""
    given, base, f = inputs(device, 40, 64, 8, 16), codes_of(nf4(40, 64)), sinter(2e-2)
    grad = given.pop("grad")
    calls = (
        lambda x, A, B: merged_linear(x, A, B, None, base, f),
        lambda x, A, B: separate_linear(x, A, B, None, base, f),
    )
    for function in calls:
        wanted = gradients(function, grad, **given)
        leaves = {name: value.clone().requires_grad_(name in needed) for name, value in given.items()}
        y = function(**leaves)
        assert torch.equal(y, wanted["y"])
        assert y.requires_grad == bool(needed)
        if y.requires_grad:
            y.backward(grad)
        for name, leaf in leaves.items():
            assert (leaf.grad is None) == (name not in needed)
            assert leaf.grad is None or torch.equal(leaf.grad, wanted[name])


def test_without_grad_mode_nothing_is_kept(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    given, base, f = inputs(device, 40, 64, 8, 16), codes_of(nf4(40, 64)), sinter(2e-2)
    A = given["A"].requires_grad_()
    wanted = merged_linear(given["x"], A, given["B"], None, base, f)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = merged_linear(given["x"], A, given["B"], None, base, f)
            apart = separate_linear(given["x"], A, given["B"], None, base, f)
        assert torch.equal(found, wanted) and not found.requires_grad and not apart.requires_grad


@pytest.mark.parametrize("needs_x", [False, True])
def test_a_second_derivative_is_refused(nf4: Callable[..., nn.Module], device: torch.device, needs_x: bool) -> None:
    given, base = inputs(device, 40, 64, 8, 16), codes_of(nf4(40, 64))
    A = given["A"].requires_grad_()
    given["x"].requires_grad_(needs_x)
    y = merged_linear(given["x"], A, given["B"], None, base, sinter(2e-2))

    def penalty() -> None:
        """Of the gradient of a linear loss, which needs none itself."""
        (first,) = torch.autograd.grad(y.float().sum(), A, create_graph=True)
        first.sum().backward()

    with pytest.raises(RuntimeError, match="second derivative" if needs_x else "no autograd formula"):
        penalty()


def test_results_do_not_live_in_the_workspace(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    """Two layers one after the other leave each other's outputs and gradients alone, and share one buffer."""
    from curvelora.kernels import workspace

    given, f = inputs(device, 40, 64, 8, 16), sinter(2e-2)
    grad = given.pop("grad")
    small, large = codes_of(nf4(40, 64)), codes_of(nf4(96, 128))
    first = gradients(lambda x, A, B: separate_linear(x, A, B, None, small, f), grad, **given)
    before = {name: value.clone() for name, value in first.items()}
    ((buffer, _),) = workspace._BUFFERS.values()
    other = inputs(device, 96, 128, 8, 16)
    gradients(lambda x, A, B: separate_linear(x, A, B, None, large, f), **other)
    gradients(lambda x, A, B: merged_linear(x, A, B, None, large, f), **other)
    assert all(torch.equal(first[name], value) for name, value in before.items())
    ((grown, _),) = workspace._BUFFERS.values()
    assert buffer.numel() == 40 * 64 and grown.numel() == 96 * 128
    assert workspace.workspace(40, 64, device).data_ptr() == grown.data_ptr()
    storages = {value.untyped_storage().data_ptr() for value in first.values()}
    assert not storages & {buffer.untyped_storage().data_ptr(), grown.untyped_storage().data_ptr()}
    workspace.release()
    assert not workspace._BUFFERS
