"""Bases and passes that fused kernels must leave alone, or get right although they look alike."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from kernel_world import FusedProducts, factors, nf4_layer, normal, relative, share, sinter
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from curvelora.activations import Activation
from curvelora.kernels import dropout, use_kernels, workspace
from curvelora.kernels.choice import why_not
from curvelora.kernels.factor_gradients import factor_gradients, factor_gradients_reference
from curvelora.kernels.merged_linear import merged_linear
from curvelora.kernels.nf4 import codes_of
from curvelora.kernels.separate_linear import separate_linear
from curvelora.layers.dense_delta import DeltaMap
from curvelora.methods.loran import LoranConfig


class OneLayer(nn.Module):
    """A model of one layer, `proj`."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


@pytest.mark.parametrize("config", [LoranConfig(r=4), LoraConfig(r=4, target_modules=["proj"], fan_in_fan_out=True)])
def test_a_layer_of_gpt2(device: torch.device, config: LoranConfig | LoraConfig) -> None:
    """Its weight lies the other way round."""
    base = Conv1D(32, 64).to(device, torch.bfloat16)
    config.target_modules = ["proj"]
    model = get_peft_model(OneLayer(base), config)
    fused, reasons = use_kernels(model)
    assert fused == 0 and sum(reasons.values()) == 1
    assert model(normal(device, 3, 64)).shape == (3, 32)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_base_that_trains(device: torch.device, part: str) -> None:
    base = nn.Linear(64, 32, device=device, dtype=torch.bfloat16).requires_grad_(False)
    assert why_not(base, 4) is None
    getattr(base, part).requires_grad_()
    assert why_not(base, 4) == "the base trains"


def test_a_base_whose_pass_is_not_its_own(device: torch.device) -> None:
    base = nn.Linear(64, 32, device=device, dtype=torch.bfloat16).requires_grad_(False)
    base.forward = lambda x: x
    assert why_not(base, 4) == "the base layer has a forward of its own"
    del base.forward
    base.register_full_backward_hook(lambda *args: None)
    assert "hooks" in why_not(base, 4)


def test_a_base_that_was_asked_about_goes_with_its_model(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    """bitsandbytes's weight keeps its layer, so nothing may keep the weight."""
    base = nf4(32, 64)
    assert base.weight.module is base and why_not(base, 4) is None
    gone = weakref.ref(base)
    del base
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("method", "kind"),
    [(method, kind) for method in ("loran", "lora") for kind in ("fp4", "fp4, double", "bf16")],
)
def test_small_updates_survive_where_weights_are_numbers_of_bf16(
    device: torch.device, method: str, kind: str, record_property: Callable[[str, object], None]
) -> None:
    """Or half of them, as FP4's, transformers's default."""
    if kind == "bf16":
        torch.manual_seed(3)
        base = nn.Linear(512, 448, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    else:
        base = nf4_layer(device, 448, 512, nested=kind != "fp4", quant_type="fp4")
    lora = LoraConfig(r=16, lora_alpha=4, target_modules=["proj"])
    loran = LoranConfig(r=16, alpha=4, dropout=0.0, target_modules=["proj"])
    model = get_peft_model(OneLayer(base), lora if method == "lora" else loran)
    assert use_kernels(model) == (1, {})
    A, B = factors(device, 448, 512, 16, 1e-5)
    layer, x = model.base_model.model.proj, normal(device, 512, 512)
    made = []
    for size in (0, 1):
        pair = (
            layer.factors("default")
            if method == "loran"
            else (layer.lora_A.default.weight, layer.lora_B.default.weight)
        )
        for parameter, value in zip(pair, (A, size * B), strict=True):
            parameter.data = value
        with FusedProducts() as products, torch.no_grad():
            made.append(model(x).double())
        assert products.count == 1
    f = layer.delta_map("default") if method == "loran" else DeltaMap(Activation("identity"), 0.25)
    wanted = x.double() @ f.value(B.double() @ A.double()).T
    assert wanted.norm() < 2e-4 * made[0].norm()
    record_property("share of the update", found := share(made[1] - made[0], wanted))
    assert found == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("config", [LoranConfig(r=4, dropout=0.0), LoraConfig(r=4)])
def test_a_base_that_multiplies_in_fp32(device: torch.device, config: LoranConfig | LoraConfig) -> None:
    """transformers's default `bnb_4bit_compute_dtype`: what it says holds, but for autocast."""
    base = nf4_layer(device, 32, 64)
    base.compute_dtype = torch.float32
    config.target_modules = ["proj"]
    model, x = get_peft_model(OneLayer(base), config), normal(device, 3, 64)
    assert use_kernels(model) == (1, {})
    for autocast in (False, True):
        with (
            FusedProducts() as products,
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
        ):
            model(x)
        assert products.count == autocast


def test_training_after_a_pass_in_inference_mode(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    layer, (A, B) = nf4(40, 64), factors(device, 40, 64, 4, 1e-2)
    workspace.release()
    with torch.inference_mode():
        merged_linear(normal(device, 3, 64), A, B, None, codes_of(layer), sinter(2e-2))
    x = normal(device, 3, 64).requires_grad_()
    merged_linear(x, A.requires_grad_(), B.requires_grad_(), None, codes_of(layer), sinter(2e-2)).sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.norm() > 0 for t in (x, A, B))


def test_a_fused_layer_of_peft_can_be_pickled(nf4: Callable[..., nn.Module], device: torch.device) -> None:
    model = get_peft_model(OneLayer(nf4(32, 64)), LoraConfig(r=4, target_modules=["proj"]))
    assert use_kernels(model)[0] == 1
    kind = type(model.base_model.model.proj)
    assert kind.__name__.startswith("Fused") and pickle.loads(pickle.dumps(kind)) is kind


def test_gradients_in_bands_of_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose parts of dL/dB would take too much memory is done in several launches."""
    A, B = factors(device, 300, 192, 8, 1e-2)
    G = normal(device, 300, 192)
    wanted = factor_gradients_reference(G, A, B, sinter(2e-2))
    monkeypatch.setattr("curvelora.kernels.factor_gradients.PARTS", 2 * 8 * 64)
    for found, value in zip(factor_gradients(G, A, B, sinter(2e-2)), wanted, strict=True):
        assert relative(found, value) < 3e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which counts what is allocated")
@pytest.mark.parametrize(("f", "p"), [("sinter", 0.0), ("identity", 0.3), ("sinter", 0.3)])
def test_peak_of_a_backward_pass_is_qlora_s(f: str, p: float) -> None:
    """Parts of gradients and inputs with dropout are gone before dL/dx is there; the latter's own part comes in bands."""
    device = torch.device("cuda", 0)
    layer, (A, B) = nf4_layer(device, 1024, 4096), factors(device, 1024, 4096, 64, 1e-2)
    base, given = codes_of(layer), (normal(device, 8192, 4096).requires_grad_(), A.requires_grad_(), B.requires_grad_())

    def peak(function: Callable[..., torch.Tensor], f: str, *more: float) -> int:
        delta_map = sinter(2e-2) if f == "sinter" else DeltaMap(Activation("identity"), 0.25)
        for _ in range(2):  # kernels are compiled, the workspace and cuBLAS's own are there
            y = function(*given, None, base, delta_map, *more)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y.backward(torch.ones_like(y))
            for tensor in given:
                tensor.grad = None
        return torch.cuda.max_memory_allocated() - before

    qlora = peak(merged_linear, "identity")
    found = peak(separate_linear, f, p) if p else peak(merged_linear, f)
    assert found - qlora <= (2 * dropout.BAND if p else 0) + (4 << 20)
    assert qlora > 8192 * 4096 * 2
