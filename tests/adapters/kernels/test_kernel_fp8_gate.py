"""When products in FP8 are taken: the bound, who asks for it and when it is formed."""

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
    fp8_model,
    needs_fp8,
    normal,
    set_largest,
    step,
)
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from curvelora import LoranConfig, UserError
from curvelora.activations import Activation
from curvelora.kernels import fp8_gate, fp8_record, use_kernels
from curvelora.kernels.fp8_gate import LIMIT, slope_beyond_zero_bound
from curvelora.layers.dense_delta import DeltaMap


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


@needs_fp8
def test_layers_take_it_up_to_the_limit(device: torch.device, products: list[int]) -> None:
    """The edge: Sinter's a (1 + w U) is the limit at U = 0.243; a thousandth below it acts, above it nothing does."""
    model, x = fp8_model(device), normal(device, 3, 16, 64)
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


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each launch that forms bounds."""
    made, launched = [], fp8_gate.factor_norms
    monkeypatch.setattr(fp8_gate, "factor_norms", lambda pairs: (made.append(len(pairs)), launched(pairs))[1])
    return made


@needs_fp8
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_bounds_are_formed_in_the_forward_pass_and_waited_for_in_the_backward_pass(
    device: torch.device, formed: list[int], reentrant: bool | None
) -> None:
    """Without checkpointing and with both kinds, and once a pass."""
    model, x = fp8_model(device), normal(device, 3, 16, 64).requires_grad_()
    set_largest(model, 1e-2)
    fp8_gate.look(model)
    assert formed == []
    with torch.autocast(device.type, torch.bfloat16):
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
    assert formed == [2] and fp8_record(model)["fp8"] == {"asked": 2, "allowed": 0, "products": 0}
    y.float().square().sum().backward()
    again = 1 if reentrant is None else 2  # a checkpoint around the model calls all of it again
    assert formed == again * [2]
    assert fp8_record(model)["fp8"] == {"asked": 2 * again, "allowed": 2, "products": 2}


@needs_fp8
def test_bounds_are_formed_in_the_backward_pass_where_operators_are_watched(
    device: torch.device, formed: list[int]
) -> None:
    """Selective checkpointing, say, which keeps results by operator and would find more of them than in its second pass."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            return func(*args, **kwargs or {})

    model, x = fp8_model(device), normal(device, 3, 16, 64).requires_grad_()
    set_largest(model, 1e-2)
    with torch.autocast(device.type, torch.bfloat16), Watching():
        y = model(x)
    assert formed == []
    y.float().square().sum().backward()
    assert formed == [2] and fp8_record(model)["fp8"] == {"asked": 2, "allowed": 2, "products": 2}


@needs_fp8
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_bounds_do_not_wait_for_what_comes_after_them() -> None:
    model = fp8_model(torch.device("cuda", 0))
    set_largest(model, 1e-3)
    for _ in range(2):  # compiled, and with pinned memory at hand, the second time
        fp8_gate.look(model)
        look = fp8_gate._LOOKS[model.base_model.model.up]
        look.called()
        torch.cuda._sleep(1 << 32)  # two seconds or more
        behind = torch.cuda.current_stream().record_event()
        assert len(look.allowed()) == 2
    assert not behind.query()


class Four(nn.Module):
    """Four layers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Small(device), Small(device)])

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., 64) -> (..., 64)."""
        return self.parts[1](self.parts[0](x))


@needs_fp8
def test_half_of_the_layers_come_before_the_bounds(device: torch.device, formed: list[int]) -> None:
    """So that the GPU has something to do meanwhile."""
    config = LoranConfig(target_modules=["up", "down"], r=8, alpha=16, dropout=0.0)
    model, seen = get_peft_model(Four(device), config).train(), []
    use_kernels(model, "fp8")
    for name, module in model.named_modules():
        if name.endswith((".up", ".down")):
            module.register_forward_hook(lambda *_: seen.append(sum(formed)))
    step(model, normal(device, 3, 16, 64))
    assert seen == [0, 4, 4, 4] and fp8_record(model)["fp8"]["asked"] == 4


@needs_fp8
def test_factors_that_are_no_parameters_take_bf16_and_are_not_kept(device: torch.device, products: list[int]) -> None:
    """As under `functional_call`, where they may be made of anything."""
    model, x = fp8_model(device), normal(device, 3, 16, 64).requires_grad_()
    set_largest(model, 1e-3)
    name = next(name for name, _ in model.named_parameters() if "up.loran_A" in name)
    doubled = 2 * model.get_parameter(name)
    with torch.autocast(device.type, torch.bfloat16):
        y = torch.func.functional_call(model, {name: doubled}, (x,))
    y.float().square().sum().backward()
    assert products == [1, 1] and fp8_record(model)["fp8"] == {"asked": 1, "allowed": 1, "products": 1}
    known = weakref.ref(doubled)
    del doubled, y
    gc.collect()
    assert known() is None


@needs_fp8
def test_a_bound_is_of_the_map_that_the_pass_had(device: torch.device, products: list[int]) -> None:
    """Features that are dropped make factors larger, whatever the config says by the time of the backward pass."""
    edge = (LIMIT / 5e-5 - 1) / 1e4
    model, x = fp8_model(device, dropout=0.5, dropout_form="features"), normal(device, 3, 16, 64).requires_grad_()
    set_largest(model, 0.6 * edge)
    with torch.autocast(device.type, torch.bfloat16):
        y = model(x)
    model.peft_config["default"].dropout = 0.0
    y.float().square().sum().backward()
    assert products == [0, 0]


def test_an_adapter_that_is_gone_stops_nothing(device: torch.device) -> None:
    """Deleted between a pass and the first question."""
    model = fp8_model(device)
    set_largest(model, 1e-3)
    fp8_gate.look(model)
    layer = model.base_model.model.up
    look = fp8_gate._LOOKS[layer]
    assert look is fp8_gate._LOOKS[model.base_model.model.down]
    look.called()
    model.delete_adapter("default")
    assert len(look.allowed()) == 2 and look.allowed() is look.allowed()


def test_layers_are_not_kept(device: torch.device) -> None:
    """Not by what is remembered of them, a lone layer either, whose list would be found by itself."""
    model = fp8_model(device)
    layer = model.base_model.model.up
    use_kernels(layer, "fp8")
    for module in (layer, model):
        fp8_gate.look(module)
        fp8_gate._LOOKS[layer].called()
    held = [weakref.ref(layer), weakref.ref(model)]
    del layer, model, module
    gc.collect()
    assert [one() for one in held] == [None, None]


@needs_fp8
def test_a_bound_that_may_be_stale_is_not_used(device: torch.device, products: list[int]) -> None:
    """Factors that changed after the model was called, and a model inside of it that is called itself."""
    model, x = fp8_model(device), normal(device, 3, 16, 64)
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
    model = fp8_model(device, **options)
    set_largest(model, 1e-2)
    found = step(model, normal(device, 3, 16, 64))
    assert products == [0, 0] and fp8_record(model)["fp8"]["allowed"] == 0
    use_kernels(model, "auto")
    agree(step(model, normal(device, 3, 16, 64)), found, 1e-12)


@needs_fp8
def test_dropped_features_widen_the_bound(device: torch.device, products: list[int]) -> None:
    """What is kept of A is divided by 1 - p, so the edge is at half of it for p = 0.5."""
    edge = (LIMIT / 5e-5 - 1) / 1e4
    model, x = fp8_model(device, dropout=0.5, dropout_form="features"), normal(device, 3, 16, 64)
    for largest, times in ((0.6 * edge, 0), (0.49 * edge, 2)):
        set_largest(model, largest)
        step(model, x)
        assert products[0] == times


@needs_fp8
def test_only_training_asks(device: torch.device) -> None:
    """A pass in evaluation is differentiated without FP8, also behind one in training; without gradients none asks."""
    model, x = fp8_model(device), normal(device, 3, 16, 64)
    set_largest(model, 1e-2)
    step(model, x)
    assert fp8_record(model) == {"fp8": {"asked": 2, "allowed": 2, "products": 2}}
    with torch.no_grad():
        model(x)
    step(model.eval(), x)
    assert fp8_record(model) == {"fp8": {"asked": 2, "allowed": 2, "products": 2}}


@needs_fp8
def test_a_layer_that_is_told_otherwise_does_not_ask(device: torch.device) -> None:
    model, x = fp8_model(device), normal(device, 3, 16, 64)
    set_largest(model, 1e-2)
    step(model, x)
    use_kernels(model.base_model.model.up, "auto")
    step(model, x)
    assert fp8_record(model) == {"fp8": {"asked": 3, "allowed": 3, "products": 3}}


@needs_fp8
def test_a_pass_without_a_backward_pass_says_nothing_of_later_factors(
    device: torch.device, products: list[int]
) -> None:
    """Its bounds are of factors that have changed since."""
    model, x = fp8_model(device), normal(device, 3, 16, 64)
    set_largest(model, 1e-3)
    with torch.autocast(device.type, torch.bfloat16):
        model(x.clone().requires_grad_())
    set_largest(model, 1.0)
    step(model.get_base_model(), x)
    assert products == [0, 0]


@needs_fp8
def test_what_acts_is_counted_and_not_what_may(device: torch.device, products: list[int]) -> None:
    """A first layer whose x needs no gradient has no fused backward pass, and fp32 has no kernels."""
    model = fp8_model(device)
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
            fp8_model(device)
    kernels_mode("off")
    with pytest.raises(UserError, match=r"kernels fp8: CURVELORA_KERNELS=off leaves kernels out: write auto"):
        fp8_model(device)
    with pytest.raises(UserError, match="did you mean 'fp8'"):
        use_kernels(Small(device), "fp9")


def test_a_model_that_moved_where_there_is_none(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fp8_model(device)
    set_largest(model, 1e-2)
    monkeypatch.setattr(fp8_gate, "why_no_fp8", lambda device: "a GPU of capability 8.0 has no FP8")
    step(model, normal(device, 3, 16, 64))
    assert fp8_record(model)["fp8"] == {"asked": 0, "allowed": 0, "products": 0}


def test_a_copy_of_the_model_goes_on_by_itself(device: torch.device) -> None:
    model, x = fp8_model(device), normal(device, 3, 16, 64)
    other = copy.deepcopy(model)
    step(other, x)
    assert fp8_record(other)["fp8"]["asked"] == 2 and fp8_record(model)["fp8"]["asked"] == 0
