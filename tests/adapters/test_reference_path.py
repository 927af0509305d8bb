"""The reference path: the model's own numbers and gradients, second derivatives as well, and everything put back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from curvelora import AuroraConfig, LoranConfig, RanloraConfig
from curvelora.methods.loran import LoranLayer
from curvelora.reference_path import evaluating, reference_path
from curvelora.spline import Grid, basis_sum

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
OURS = {"r": 4, "alpha": 8, "dropout": 0.1, **TARGETS}
METHODS = {
    "lora": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **TARGETS),
    "sinter": LoranConfig(**OURS),
    "sinter, large, inside": LoranConfig(amplitude=2e-2, scale_position="inside", **OURS),
    "tanh": LoranConfig(activation="tanh", **OURS),
    "cos": LoranConfig(activation="cos", frequency=10.0, **OURS),
    "ranlora": RanloraConfig(svd_source="dequantised", **OURS),
    "aurora": AuroraConfig(**OURS),
    "aurora, static": AuroraConfig(mode="static", **OURS),
}
KINDS = ["fp32", "bf16", "nf4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of the tiny Llama, loud enough for its gradients to be far from zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    model.save_pretrained(path := tmp_path_factory.mktemp("reference") / "llama")
    return path


@pytest.fixture
def adapted(folder):
    """-> build(method, kind): the tiny Llama over a base of that kind, its adapter moved away from the start."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantisation = {"nf4": nf4 | {"bnb_4bit_compute_dtype": torch.float32}, "int8": {"load_in_8bit": True}}

    def build(method: str, kind: str):
        options = {}
        if kind in quantisation:
            pytest.importorskip("bitsandbytes")
            options = {"quantization_config": BitsAndBytesConfig(**quantisation[kind]), "device_map": {"": "cpu"}}
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        torch.manual_seed(0)
        model = get_peft_model(model, copy.deepcopy(METHODS[method]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        return model.eval()

    return build


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def run(model: nn.Module, ids: torch.Tensor):
    """Logits, loss and the gradient as one vector."""
    output = model(ids, labels=ids)
    gradients = torch.autograd.grad(output.loss, trainable(model))
    return output.logits.detach().double(), torch.cat([g.flatten() for g in gradients]).double()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_numbers_and_gradients_are_the_model_s_own(method, kind, adapted, token_ids):
    model = adapted(method, kind)
    logits, gradient = run(model, token_ids)
    with reference_path(model) as dtype:
        assert dtype == torch.float32
        plain_logits, plain_gradient = run(model, token_ids)
    assert gradient.norm() > 1e-2
    # measured: at most 5e-7 and 3e-6
    assert relative(plain_logits, logits) < 3e-6
    assert relative(plain_gradient, gradient) < 2e-5


def test_an_int8_base_multiplies_the_dequantised_weight(adapted, token_ids):
    """bitsandbytes rounds the activations to int8 as well, so the reference is the same model with plain weights."""
    model = adapted("aurora", "int8")
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "Linear8bitLt":
                dense = nn.Linear(child.in_features, child.out_features, bias=False)
                scales = child.weight.SCB if child.weight.SCB is not None else child.state.SCB
                dense.weight = nn.Parameter(child.weight.data.float() * scales[:, None] / 127, requires_grad=False)
                setattr(module, name, dense)
    wanted = run(plain, token_ids)
    with reference_path(model):
        found = run(model, token_ids)
    assert relative(found[0], wanted[0]) < 3e-6 and relative(found[1], wanted[1]) < 2e-5


@pytest.mark.parametrize("method", ["lora", "sinter", "aurora"])
def test_a_bf16_base_computes_in_fp32(method, adapted, token_ids):
    model = adapted(method, "bf16")
    wide = copy.deepcopy(model).float()
    wanted = run(wide, token_ids)
    rounded, _ = run(model, token_ids)
    with reference_path(model):
        found = run(model, token_ids)
    assert found[0].dtype == torch.float64 and relative(found[0], wanted[0]) < 3e-6
    assert relative(found[1], wanted[1]) < 2e-5
    assert relative(rounded, wanted[0]) > 1e-3
    assert torch.equal(run(model, token_ids)[0], rounded)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_a_model(method, kind, adapted, token_ids):
    """H v by double backward against a difference of gradients along v, which the first derivatives' test vouches for."""
    model = adapted(method, kind)
    with reference_path(model):
        parameters = trainable(model)
        generator = torch.Generator().manual_seed(3)
        v = [torch.randn(p.shape, generator=generator) for p in parameters]

        def gradient(step: float) -> torch.Tensor:
            for p, direction in zip(parameters, v, strict=True):
                p.data.add_(direction, alpha=step)
            found = run(model, token_ids)[1]
            for p, direction in zip(parameters, v, strict=True):
                p.data.sub_(direction, alpha=step)
            return found

        # Sinter turns once in 2 pi / 1e4 of BA: the step has to be far below that
        step = 2e-6 if "sinter" in method else 3e-4
        wanted = (gradient(step) - gradient(-step)) / (2 * step)
        gradients = torch.autograd.grad(model(token_ids, labels=token_ids).loss, parameters, create_graph=True)
        product = torch.autograd.grad(gradients, parameters, v)
        found = torch.cat([h.flatten() for h in product]).double()
    assert torch.isfinite(found).all() and relative(found, wanted) < (0.05 if "sinter" in method else 1e-2)


@pytest.mark.parametrize("activation", ["sinter", "tanh", "silu", "cos", "gaussian"])
@pytest.mark.parametrize("position", ["outside", "inside"])
def test_the_hessian_of_one_layer(activation, position, plain_delta_weight):
    """In fp64, against PyTorch's Hessian of the formula written out once more."""
    torch.manual_seed(0)
    config = LoranConfig(
        r=2, dropout=0.0, init_B_std=0.3, activation=activation, amplitude=0.3, frequency=4.0, scale_position=position
    )
    layer = LoranLayer(nn.Linear(5, 4).requires_grad_(False), "layer")
    layer.add_adapter("default", config)
    layer.double().eval()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    A, B = layer.factors("default")

    def by_formula(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return (layer.base_layer(x) + F.linear(x, plain_delta_weight(A, B, config)) - y).square().sum()

    blocks = torch.autograd.functional.hessian(by_formula, (A.detach(), B.detach()))
    sizes = (A.numel(), B.numel())
    wanted = torch.cat([torch.cat([blocks[i][j].reshape(sizes[i], sizes[j]) for j in (0, 1)], 1) for i in (0, 1)])
    with reference_path(layer) as dtype:
        assert dtype == torch.float64
        gradients = torch.autograd.grad((layer(x) - y).square().sum(), (A, B), create_graph=True)
        gradient = torch.cat([g.flatten() for g in gradients])
        rows = [torch.autograd.grad(entry, (A, B), retain_graph=True) for entry in gradient]
    found = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert wanted.abs().max() > 1e-2


def test_the_operator_itself_has_no_second_derivative(adapted, token_ids):
    """Why the path exists: outside of it the same call raises, or its result does not depend on the parameters."""
    model = adapted("sinter", "fp32")
    gradients = torch.autograd.grad(model(token_ids, labels=token_ids).loss, trainable(model), create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(sum(g.square().sum() for g in gradients), trainable(model))


@pytest.mark.parametrize("grid", [Grid(), Grid(5, 2, -2.0, 2.0)], ids=str)
def test_the_spline_differentiates_twice(grid):
    """Finite differences by gradgradcheck, and the sum of the second derivatives of the basis by torch's own."""
    z = torch.linspace(-1.7, 1.73, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: basis_sum(z, grid), (z,))
    w = torch.randn(grid.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.functional.hessian(lambda z: basis_sum(z, grid) @ w, z.detach()[0])
    wanted = torch.autograd.functional.hessian(lambda z: grid.basis(z).sum(0) @ w, z.detach()[0])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert wanted.abs().max() > 0.1


def state_of(model: nn.Module) -> dict:
    """Everything that the path may touch."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "storage": {name: (t.data_ptr(), t.dtype) for name, t in tensors},
        "values": {name: t.detach().clone() for name, t in tensors},
        "modes": {name: m.training for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "attention": model.config._attn_implementation,
        "matmul": torch.backends.cuda.matmul.fp32_precision,
        "cpu matmul": torch.backends.mkldnn.matmul.fp32_precision,
        "convolution": torch.backends.cudnn.conv.fp32_precision,
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.fixture
def coarse_products():
    """A user's setting that must be off inside and back afterwards."""
    backend = torch.backends.mkldnn.matmul
    before, backend.fp32_precision = backend.fp32_precision, "bf16"
    yield
    backend.fp32_precision = before


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "sinter", "ranlora", "aurora"])
def test_everything_is_put_back(method, kind, failing, adapted, token_ids, coarse_products):
    model = adapted(method, kind).train()
    model.get_submodule("base_model.model.model.layers.1").eval()  # mixed modes
    model.config._attn_implementation = "flash_attention_2"  # as on a GPU; never run here
    before = state_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before["autocast"] = True
        try:
            with reference_path(model):
                assert model.config._attn_implementation == "sdpa"
                assert not any(m.training for m in model.modules())
                assert not torch.is_autocast_enabled("cpu")
                assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
                assert torch.backends.cudnn.conv.fp32_precision == "ieee"
                assert not torch.backends.cuda.flash_sdp_enabled()
                assert model(token_ids).logits.dtype == torch.float32
                if failing:
                    raise KeyError("inside")
        except KeyError:
            assert failing
        after = state_of(model)
    for name, tensor in before.pop("values").items():
        assert torch.equal(after["values"][name], tensor), name
    after.pop("values")
    assert after == before


def test_fp64_factors_lift_everything(llama, token_ids):
    model = get_peft_model(llama(), copy.deepcopy(METHODS["sinter"])).eval()
    for parameter in trainable(model):
        parameter.data = parameter.data.double()
    with reference_path(model) as dtype:
        assert dtype == torch.float64 and {p.dtype for p in model.parameters()} == {torch.float64}
        assert model(token_ids).logits.dtype == torch.float64
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float32}


def test_a_compiled_model_runs_eagerly(adapted, token_ids):
    """torch.compile's backward passes have no second derivative either."""
    model = adapted("aurora", "fp32")
    compiled = torch.compile(model, backend="aot_eager")
    with reference_path(compiled):
        gradients = torch.autograd.grad(compiled(token_ids, labels=token_ids).loss, trainable(model), create_graph=True)
        product = torch.autograd.grad(sum(g.square().sum() for g in gradients), trainable(model))
    assert math.isfinite(sum(h.norm().item() for h in product)) and product[0].norm() > 0


def test_evaluating_puts_mixed_modes_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before and len(set(before)) == 2
