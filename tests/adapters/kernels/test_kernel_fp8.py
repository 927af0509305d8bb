"""Products in FP8 for the part of the gradients beyond f'(0): the bound, when it is taken, and what it costs."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from kernel_world import (
    Small,
    agree,
    exact,
    factors,
    gradients,
    needs_fp8,
    nf4_layer,
    normal,
    relative,
    share,
    sinter,
    step,
)
from kernel_world import stored_weight as weight_of
from peft import get_peft_model
from test_kernel_accuracy import qlora_errors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvelora import LoranConfig, UserError
from curvelora.activations import Activation
from curvelora.kernels import factor_gradients as module
from curvelora.kernels import fp8_gate, fp8_record, use_kernels
from curvelora.kernels.factor_gradients import gradients_of_factors
from curvelora.kernels.fp8_gate import LIMIT, Taken, slope_beyond_zero_bound
from curvelora.kernels.merged_linear import merged_linear
from curvelora.kernels.nf4 import codes_of
from curvelora.kernels.separate_linear import separate_linear
from curvelora.layers.dense_delta import DeltaMap

D_OUT, D_IN, RANK, TOKENS = 160, 192, 16, 256
Record = Callable[[str, object], None]


class Always:
    """Allows FP8 whatever the factors are."""

    def granted(self) -> Taken:
        return Taken()


# --- when ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", [*fp8_gate._BEYOND, "relu", "identity"])
def test_the_bound_on_f_holds(name: str, inside: bool) -> None:
    """Against f' in fp64 on a dense grid, from far below where f bends to far above."""
    f = Activation(name, 2e-2, 1e4 if name == "sinter" else 30.0)
    delta_map = DeltaMap(f, 0.25, inside)
    for largest in (1e-4, 1e-3, 1e-2, 0.1, 1.0):
        u = torch.linspace(-largest, largest, 100_001, dtype=torch.float64)
        bound = slope_beyond_zero_bound(delta_map, largest)
        if name in ("relu", "identity"):
            assert math.isinf(bound)
            continue
        beyond = (f.slope(u * (0.25 if inside else 1)) - f.slope_at_zero).abs().max() / abs(f.slope_at_zero)
        assert beyond <= bound * (1 + 1e-6) and bound > 0


def model_of(device: torch.device, **options: object) -> nn.Module:
    """Two layers with Sinter at its published setting, told to take FP8."""
    settings = {"r": 8, "alpha": 16, "dropout": 0.0, "init_B_std": 0.02} | options
    torch.manual_seed(4)
    model = get_peft_model(Small(device), LoranConfig(target_modules=["up", "down"], **settings)).train()
    use_kernels(model, "fp8")
    return model


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products in FP8 have been made, and second readings: [products, readings]."""
    made = [0, 0]

    def counted(name: str, index: int) -> None:
        function = getattr(module, name)

        def call(*args: object) -> object:
            made[index] += 1
            return function(*args)

        monkeypatch.setattr(module, name, call)

    counted("fp8_product", 0)
    counted("second_readings", 1)
    return made


def set_largest(model: nn.Module, largest: float) -> None:
    """Scale every B so that |B_i| |A_j| is at most `largest`, and is that somewhere."""
    for layer in model.modules():
        if hasattr(layer, "loran_B"):
            A, B = layer.factors("default")
            with torch.no_grad():
                B *= largest / (A.norm(dim=0).max() * B.norm(dim=1).max())


@needs_fp8
def test_layers_take_it_up_to_the_limit(device: torch.device, products: list[int]) -> None:
    """The edge: Sinter's a (1 + w U) is the limit at U = 0.243; a thousandth below it acts, above it nothing does."""
    model, x = model_of(device), normal(device, 3, 16, 64)
    edge = (LIMIT / 5e-5 - 1) / 1e4
    assert edge == pytest.approx(0.243, abs=1e-3)
    for largest, times in ((0.999 * edge, 2), (1.001 * edge, 0), (1e-3, 2), (0.0, 2), (float("nan"), 0)):
        set_largest(model, largest)
        before = fp8_record(model)["fp8"]
        products[:] = [0, 0]
        step(model, x)
        after = fp8_record(model)["fp8"]
        assert products == [times, times], largest
        wanted = {"asked": 2, "allowed": times, "products": times}
        assert after == {key: before[key] + more for key, more in wanted.items()}
        if math.isnan(largest):
            break
    use_kernels(model, "auto")
    assert fp8_record(model) == {} and not model._forward_pre_hooks
    set_largest(model, 1e-3)
    step(model, x)
    assert products == [0, 0]


@needs_fp8
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_bounds_are_waited_for_in_the_backward_pass(device: torch.device, reentrant: bool | None) -> None:
    """Without checkpointing and with both kinds: a pass does not begin with them."""
    model, x = model_of(device), normal(device, 3, 16, 64).requires_grad_()
    set_largest(model, 1e-2)
    with torch.autocast(device.type, torch.bfloat16):
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
    assert fp8_record(model)["fp8"]["allowed"] == 0
    y.float().square().sum().backward()
    assert fp8_record(model)["fp8"]["allowed"] == 2 and fp8_record(model)["fp8"]["products"] == 2


@needs_fp8
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_bounds_wait_for_what_came_before_the_pass_and_for_nothing_after() -> None:
    """A write that the GPU has not come to when the pass begins counts; work that it has not come to later is not waited for."""
    model = model_of(torch.device("cuda", 0))
    set_largest(model, 1e-3)
    fp8_gate.look(model)
    look = fp8_gate._LOOKS[model.base_model.model.up]
    torch.cuda._sleep(1 << 32)  # two seconds or more
    behind = torch.cuda.current_stream().record_event()
    assert len(look.allowed()) == 2 and not behind.query()
    model.base_model.model.up.loran_B["default"].data.mul_(1e6)
    fp8_gate.look(model)
    assert len(fp8_gate._LOOKS[model.base_model.model.up].allowed()) == 1 and behind.query()


def test_an_adapter_that_is_gone_is_not_allowed(device: torch.device) -> None:
    """Deleted between a pass and the first question, by which nothing else suffers."""
    model = model_of(device)
    set_largest(model, 1e-3)
    fp8_gate.look(model)
    layer = model.base_model.model.up
    look = fp8_gate._LOOKS[layer]
    assert look is fp8_gate._LOOKS[model.base_model.model.down]
    model.delete_adapter("default")
    assert look.allowed() == {} and look.allowed() == {}


def test_layers_are_not_kept(device: torch.device) -> None:
    """Not by what is remembered of them, a lone layer either, whose list would be found by itself."""
    model = model_of(device)
    layer = model.base_model.model.up
    use_kernels(layer, "fp8")
    fp8_gate.look(layer)
    fp8_gate.look(model)
    held = [weakref.ref(layer), weakref.ref(model)]
    del layer, model
    gc.collect()
    assert [one() for one in held] == [None, None]


@needs_fp8
def test_a_bound_that_may_be_stale_is_not_used(device: torch.device, products: list[int]) -> None:
    """Factors that changed after the model was called, and a model inside of it that is called itself."""
    model, x = model_of(device), normal(device, 3, 16, 64)
    set_largest(model, 1e-2)
    inner = model.get_base_model()
    step(inner, x)
    assert products == [0, 0]
    step(model, x)
    assert products[0] == 2
    step(inner, x)  # nothing has changed since
    assert products[0] == 4
    set_largest(model, 1e-2)
    step(inner, x)
    assert products[0] == 4
    step(model, x)
    assert products[0] == 6
    torch.manual_seed(1)
    config = LoranConfig(target_modules=["up", "down"], r=8, alpha=16, dropout=0.0, init_B_std=100.0)
    model.add_adapter("large", config)
    model.set_adapter("large")
    for inside in (inner, model.eval(), model.train()):
        step(inside, x)
    assert products[0] == 6
    model.set_adapter("default")
    with torch.no_grad():
        model.base_model.model.up.loran_B["default"].data.mul_(1e6)  # as DeepSpeed writes
    step(model, x)
    assert products[0] == 7


@needs_fp8
@pytest.mark.parametrize("options", [{"activation": "identity"}, {"activation": "relu"}, {"amplitude": 2e-2}])
def test_where_it_must_not_act(device: torch.device, products: list[int], options: dict[str, object]) -> None:
    model = model_of(device, **options)
    set_largest(model, 1e-2)
    found = step(model, normal(device, 3, 16, 64))
    assert products == [0, 0] and fp8_record(model)["fp8"]["allowed"] == 0
    use_kernels(model, "auto")
    agree(step(model, normal(device, 3, 16, 64)), found, 1e-12)


@needs_fp8
def test_dropped_features_widen_the_bound(device: torch.device, products: list[int]) -> None:
    """What is kept of A is divided by 1 - p, so the edge is at half of it for p = 0.5."""
    edge = (LIMIT / 5e-5 - 1) / 1e4
    model, x = model_of(device, dropout=0.5, dropout_form="features"), normal(device, 3, 16, 64)
    for largest, times in ((0.6 * edge, 0), (0.49 * edge, 2)):
        set_largest(model, largest)
        step(model, x)
        assert products[0] == times


def test_only_training_asks(device: torch.device) -> None:
    model, x = model_of(device), normal(device, 3, 16, 64)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert fp8_record(model) == {"fp8": {"asked": 0, "allowed": 0, "products": 0}}


@needs_fp8
def test_what_acts_is_counted_and_not_what_may(device: torch.device, products: list[int]) -> None:
    """A first layer whose x needs no gradient has no fused backward pass, and fp32 has no kernels."""
    model = model_of(device)
    set_largest(model, 1e-2)
    x = normal(device, 3, 16, 64)
    with torch.autocast(device.type, torch.bfloat16):
        model(x).float().square().sum().backward()
    assert fp8_record(model)["fp8"] == {"asked": 2, "allowed": 2, "products": products[0]} and products[0] == 1


def test_where_there_is_no_fp8_it_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kernels_mode: Callable[[str], None]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(fp8_gate, "why_no_fp8", lambda device: "a GPU of capability 8.0 has no FP8")
        with pytest.raises(UserError, match=r"kernels fp8: a GPU of capability 8\.0 has no FP8: write auto"):
            model_of(device)
    kernels_mode("off")
    with pytest.raises(UserError, match=r"kernels fp8: CURVELORA_KERNELS=off leaves kernels out: write auto"):
        model_of(device)
    with pytest.raises(UserError, match="did you mean 'fp8'"):
        use_kernels(Small(device), "fp9")


def test_a_model_that_moved_where_there_is_none(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(device)
    set_largest(model, 1e-2)
    monkeypatch.setattr(fp8_gate, "why_no_fp8", lambda device: "a GPU of capability 8.0 has no FP8")
    step(model, normal(device, 3, 16, 64))
    assert fp8_record(model)["fp8"] == {"asked": 0, "allowed": 0, "products": 0}


def test_a_copy_of_the_model_goes_on_by_itself(device: torch.device) -> None:
    model, x = model_of(device), normal(device, 3, 16, 64)
    other = copy.deepcopy(model)
    step(other, x)
    assert fp8_record(other)["fp8"]["asked"] == 2 and fp8_record(model)["fp8"]["asked"] == 0


# --- what it costs ------------------------------------------------------------------------------------------------------


@needs_fp8
@pytest.mark.parametrize("path", ["merged", "separate"])
@pytest.mark.parametrize("std_u", [1e-3, 1e-2])
def test_f_s_own_part_is_right_to_ten_per_cent(
    device: torch.device, path: str, std_u: float, record_property: Record
) -> None:
    """At the published amplitude, of the layer: found 3.9 % at most; without f it would be 100 %."""
    layer = nf4_layer(device, D_OUT, D_IN)
    make = merged_linear if path == "merged" else separate_linear
    A, B = factors(device, D_OUT, D_IN, RANK, std_u)
    x, grad = normal(device, TOKENS, D_IN), normal(device, TOKENS, D_OUT, seed=2)
    arms = [
        gradients(
            lambda x, A, B, a=a: make(x, A, B, None, codes_of(layer), sinter(a), fp8=Always()), grad, x=x, A=A, B=B
        )
        for a in (5e-5, 0.0)
    ]
    wanted = [exact(weight_of(layer), None, sinter(a), grad, x=x, A=A, B=B) for a in (5e-5, 0.0)]
    for name in "AB":
        found, truth = arms[0][name].double() - arms[1][name], wanted[0][name] - wanted[1][name]
        record_property(f"error of f's part of dL/d{name}", relative(found, truth))
        assert relative(found, truth) < 0.06, name
        assert share(found, truth) == pytest.approx(1, abs=0.01)


@needs_fp8
@pytest.mark.parametrize("name", ["sinter", "silu", "tanh", "sigmoid"])
def test_at_the_limit_errors_are_no_worse_than_qlora_s(
    device: torch.device, name: str, record_property: Record
) -> None:
    """With factors as large as the limit lets them be: at most 1.5 times PEFT's error (found 0.87)."""
    A, B = factors(device, D_OUT, D_IN, RANK, 1e-2)
    f = DeltaMap(Activation(name, 5e-5, 1e4), 0.25)
    largest = (A.norm(dim=0).max() * B.norm(dim=1).max()).item()
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope_beyond_zero_bound(f, middle * largest) <= LIMIT else (low, middle)
    B = B * low
    x, grad = normal(device, TOKENS, D_IN), normal(device, TOKENS, D_OUT, seed=2)
    theirs = qlora_errors(device, A, B, x, grad)
    layer = nf4_layer(device, D_OUT, D_IN)
    wanted = exact(weight_of(layer), None, f, grad, x=x, A=A, B=B)
    found = gradients(
        lambda x, A, B: merged_linear(x, A, B, None, codes_of(layer), f, fp8=Always()), grad, x=x, A=A, B=B
    )
    for tensor, value in wanted.items():
        ratio = relative(found[tensor], value) / theirs[tensor]
        record_property(f"error of {tensor} / QLoRA's", ratio)
        assert ratio < 1.5, (tensor, ratio)


@needs_fp8
def test_no_part_is_missing_and_none_is_there_twice(device: torch.device) -> None:
    """FP8's gradients are those of bf16, for scales outside and inside of f and an f'(0) of 2."""
    A, B = factors(device, 96, 128, RANK, 1e-2)
    g, x = normal(device, TOKENS, 96), normal(device, TOKENS, 128, seed=2)
    for f in (sinter(5e-5), sinter(5e-5, inside=True), DeltaMap(Activation("cos", 0.0, 3.0), 0.5)):
        pairs = zip(gradients_of_factors(g, x, A, B, f, Always()), gradients_of_factors(g, x, A, B, f), strict=True)
        for found, wanted in pairs:
            assert relative(found, wanted) < 8e-3


@needs_fp8
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_layers_on_one_tensor(device: torch.device, products: list[int], reentrant: bool | None) -> None:
    """q, k and v, whose input is shared, under both kinds of checkpointing as well."""
    layers = [nf4_layer(device, size, 128) for size in (96, 64, 128)]
    pairs = [tuple(t.requires_grad_() for t in factors(device, size, 128, 8, 1e-2)) for size in (96, 64, 128)]
    x = normal(device, 24, 128).requires_grad_()

    def block(x: Tensor) -> Tensor:
        made = (
            merged_linear(x, *pair, None, codes_of(layer), sinter(5e-5), fp8=Always())
            for pair, layer in zip(pairs, layers, strict=True)
        )
        return sum(y.double().square().mean() for y in made)

    loss = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
    loss.backward()
    assert products == [3, 3]
    with_fp8 = [t.grad.clone() for pair in pairs for t in pair]
    for pair in pairs:
        for t in pair:
            t.grad = None
    sum(
        merged_linear(x, *pair, None, codes_of(layer), sinter(5e-5)).double().square().mean()
        for pair, layer in zip(pairs, layers, strict=True)
    ).backward()
    for found, wanted in zip(with_fp8, (t.grad for pair in pairs for t in pair), strict=True):
        assert relative(found, wanted) < 8e-3


@needs_fp8
def test_dropped_inputs_are_what_is_read(device: torch.device, products: list[int]) -> None:
    """The step is that without FP8, with the same masks."""
    model, x = model_of(device, dropout=0.3, dropout_form="exact"), normal(device, 3, 16, 64)
    set_largest(model, 1e-2)
    found = step(model, x, seed=5)
    assert products == [2, 2]
    use_kernels(model, "auto")
    agree(found, step(model, x, seed=5), 8e-3)
