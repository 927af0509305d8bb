"""Tiny models and layers that the adapter tests share; built from configs, so nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

from curvelora import LoranConfig
from curvelora.layers.dense_delta import DenseDeltaLayer
from curvelora.methods.loran import LoranLayer

torch.set_num_threads(1)  # also where OMP_NUM_THREADS says otherwise


@pytest.fixture
def llama():
    """-> build(seed): a Llama with grouped-query attention (k, v narrower than q), 128 wide so that NF4 packs it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **overrides):
        torch.manual_seed(seed)
        settings = dict(
            vocab_size=96,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
        return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()

    return build


@pytest.fixture
def bert():
    """-> build(seed): a BERT classifier, whose fresh head belongs into `modules_to_save`."""
    from transformers import BertConfig, BertForSequenceClassification

    def build(seed: int = 0):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=3,
        )
        return BertForSequenceClassification(config).eval()

    return build


@pytest.fixture
def token_ids():
    """A batch of token ids, (2, 7), the same in every test."""
    return torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def randomise():
    """-> fill(model, adapter, std): give B values, as training would, so that an adapter does something."""

    def fill(model: nn.Module, adapter: str = "default", std: float = 0.05, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, DenseDeltaLayer) and adapter in module.configs:
                _, B = module.factors(adapter)
                B.data.copy_(torch.randn(B.shape, generator=generator) * std)

    return fill


@pytest.fixture
def loran_layer():
    """-> build(d_in, d_out, **config): one LoRAN layer over a random frozen nn.Linear, with B of the given std."""

    def build(d_in: int, d_out: int, *, seed: int = 0, B_std: float = 0.05, dtype=torch.float32, bias=True, **options):
        torch.manual_seed(seed)
        base = nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
        layer = LoranLayer(base, "layer")
        layer.add_adapter("default", LoranConfig(**({"dropout": 0.0, "init_B_std": B_std} | options)))
        return layer.to(dtype)

    return build


# f written a second time, in plain torch, for references that autograd differentiates
PLAIN_F = {
    "identity": lambda u, a, w: u,
    "sinter": lambda u, a, w: a * u * torch.sin(w * u) + u,
    "tanh": lambda u, a, w: torch.tanh(u),
    "sigmoid": lambda u, a, w: 1 / (1 + torch.exp(-u)),
    "relu": lambda u, a, w: u.clamp(min=0),
    "silu": lambda u, a, w: u / (1 + torch.exp(-u)),
    "swish": lambda u, a, w: u / (1 + torch.exp(-25 * u)),
    "cos": lambda u, a, w: u * torch.cos(w * u) + u,
    "gaussian": lambda u, a, w: 0.5 * u * torch.exp(-(u**2)),
}


@pytest.fixture
def plain_delta_weight():
    """-> delta(A, B, config): dW written from the formula, s f(BA) or f(s BA), in the dtype of the factors."""

    def delta(A, B, config):
        s, u = config.alpha / config.r, B @ A
        f = PLAIN_F[config.activation]
        if config.scale_position == "inside":
            return f(s * u, config.amplitude, config.frequency)
        return s * f(u, config.amplitude, config.frequency)

    return delta


@pytest.fixture
def plain_adapter(plain_delta_weight):
    """-> run(layer, x, grad): output and gradients (x, A, B) of W0 x + b + dW x in fp64, by plain autograd."""

    def run(layer, x, grad):
        A, B = (factor.detach().double().requires_grad_() for factor in layer.factors("default"))
        x = x.detach().double().requires_grad_()
        y = x @ layer.base_layer.weight.double().T + x @ plain_delta_weight(A, B, layer.configs["default"]).T
        if layer.base_layer.bias is not None:
            y = y + layer.base_layer.bias.double()
        y.backward(grad.double())
        return {"output": y.detach(), "x": x.grad, "A": A.grad, "B": B.grad}

    return run


@pytest.fixture
def run_adapter():
    """-> run(layer, x, grad): the same four tensors from the layer itself."""

    def run(layer, x, grad):
        x = x.detach().clone().requires_grad_()
        A, B = layer.factors("default")
        A.grad = B.grad = None
        y = layer(x)
        y.backward(grad.to(y.dtype))
        return {"output": y.detach(), "x": x.grad, "A": A.grad, "B": B.grad}

    return run
