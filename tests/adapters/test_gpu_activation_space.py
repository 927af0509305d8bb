"""Activation-space adapters on a CUDA GPU: against fp64, compiled, over quantised bases; singular triplets of real sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvelora import AuroraConfig, RanloraConfig
from curvelora.methods.aurora import AuroraLayer
from curvelora.methods.ranlora import RanloraLayer
from curvelora.svd import singular_triplets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
D_OUT, D_IN, TOKENS = 1536, 1000, 333
LAYERS = {
    "ranlora": (RanloraLayer, RanloraConfig(r=16, dropout=0.0)),
    "ranlora P tanh": (RanloraLayer, RanloraConfig(r=16, dropout=0.0, init="P", activation="tanh")),
    "aurora": (AuroraLayer, AuroraConfig(r=16, alpha=32, dropout=0.0)),
    "aurora static": (AuroraLayer, AuroraConfig(r=16, alpha=32, dropout=0.0, mode="static")),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One layer on the GPU whose every trainable tensor has moved from its start."""
    layer_class, config = LAYERS[name]
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT, device="cuda").requires_grad_(False)
    layer = layer_class(base, "layer")
    layer.add_adapter("default", config)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    base.to(dtype)
    return layer


def run(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of x, gradients of all trainable tensors."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *trained], grad.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients(name: str, dtype: torch.dtype) -> None:
    """Against the same layer in fp64 on the same, already rounded, inputs."""
    layer = build(name, dtype)
    x, grad = (torch.randn(TOKENS, d, device="cuda").to(dtype) for d in (D_IN, D_OUT))
    found, wanted = run(layer, x, grad), run(copy.deepcopy(layer).double(), x.double(), grad.double())
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(found, wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < bound


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_without_graph_breaks(name: str) -> None:
    layer = build(name)
    x, grad = torch.randn(TOKENS, D_IN, device="cuda"), torch.randn(TOKENS, D_OUT, device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for a, b in zip(run(compiled, x, grad), run(layer, x, grad), strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-4


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096)])
@pytest.mark.parametrize("end", ["first", "last"])
def test_triplets_of_real_sizes(shape: tuple[int, int], end: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    W = torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16) / shape[1] ** 0.5
    found = singular_triplets(W, 16, end)
    exact, one = W.double(), torch.eye(16, device="cuda", dtype=torch.float64)
    assert (exact @ found.V - found.U * found.S).norm() / exact.norm() < 1e-9
    assert (exact.T @ found.U - found.V * found.S).norm() / exact.norm() < 1e-9
    assert (found.U.T @ found.U - one).norm() < 1e-11 and (found.V.T @ found.V - one).norm() < 1e-11


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("config", [RanloraConfig(dropout=0.0), AuroraConfig(dropout=0.0)], ids=["ranlora", "aurora"])
def test_quantised_bases_train_save_and_load(config, quantization: str, tmp_path) -> None:
    """The loss falls, and the saved adapter gives the same logits on a fresh base."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from curvelora.loading import load_adapter

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    settings = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if quantization == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )

    def base() -> nn.Module:
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=copy.deepcopy(settings), dtype=torch.bfloat16, device_map={"": 0}
        )

    config = copy.deepcopy(config)
    config.target_modules = "all-linear"
    model = get_peft_model(base(), config)
    ids = torch.randint(0, 512, (4, 64), device="cuda")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(40):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(base(), tmp_path / "adapter")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)
