"""Every kind of base layer: storage dtypes, quantised storage, odd shapes, transposed weights."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import MAIN
from formulas import FORMULAS
from models import adapted_layers, gpt2, llama, logits, relative, tensors_of, train_a_little, trainable
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from curvelora.merging import Merge

every_method = pytest.mark.parametrize("case", MAIN, ids=str)
STORAGE = {
    "fp32": ("none", torch.float32),
    "bf16": ("none", torch.bfloat16),
    "fp16": ("none", torch.float16),
    "NF4, double quantisation": ("nf4", torch.float32),
    "int8": ("int8", torch.float32),
}
# Relative error of logits against the same model in fp32 with the base's stored weights: bf16 and fp16 round every layer, int8
# evaluates with quantised activations. The page has what is measured; the adapter alone moves the logits by 0.3 to 0.7.
BOUNDS = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 5e-3, "NF4, double quantisation": 1e-5, "int8": 5e-2}


def in_fp32(model: nn.Module) -> nn.Module:
    """The same model with every base weight as fp32, dequantised where it is packed, and the adapter as it is."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module).__module__.startswith("bitsandbytes"):
            from peft.utils.integrations import dequantize_bnb_weight

            state = getattr(module, "state", None)
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = dequantize_bnb_weight(module.weight, state=state).float()
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], plain.to(module.weight.device))
    return model.float()


@pytest.mark.cell("bases", "a base stored as {storage}: right, trains, stays untouched, evaluates in between")
# QLoRA is LoRA on NF4 by definition; LoRA's own column has the other bases
@pytest.mark.parametrize(
    ("case", "storage"),
    [(c, s) for s, (kind, _) in STORAGE.items() for c in MAIN if c.entry.required_quantization in (None, kind)],
    ids=str,
)
def test_storage(case, storage, load_llama, ids, measure):
    quantization, dtype = STORAGE[storage]
    torch.manual_seed(0)
    model = train_a_little(get_peft_model(load_llama(quantization, dtype), case.config())).eval()
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    found = logits(model, ids)
    assert found.dtype == dtype
    error = relative(found, logits(in_fp32(model), ids))
    measure(f"error against fp32, {storage}", error)
    assert error < BOUNDS[storage]

    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    for _ in range(2):  # after an evaluation: bitsandbytes' CPU layers must still have gradients
        optimizer.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in trainable(model).values())
        optimizer.step()
        logits(model, ids)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers() if n.rpartition(".")[2] != "SCB")


SHAPES = [(37, 53), (53, 37), (1, 8), (8, 1), (5, 3), (128, 32)]


def one_layer(case, base: nn.Module, **options) -> nn.Module:
    """The adapter layer over `base`, with tensors that do something."""
    holder = nn.Module()
    holder.linear = base.requires_grad_(False)
    holder.forward = lambda x: holder.linear(x)
    torch.manual_seed(0)
    model = get_peft_model(holder, case.config(target_modules=["linear"], **options))
    train_a_little(model, std=0.1)
    return next(iter(adapted_layers(model).values())).eval()


@pytest.mark.cell("bases", "odd and rectangular layers; inputs with no, one and two leading dimensions, and empty ones")
@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_shapes(case, shape):
    d_in, d_out = shape
    layer = one_layer(case, nn.Linear(d_in, d_out), r=1).double()
    generator = torch.Generator().manual_seed(0)
    for leading in ((), (3,), (2, 5), (0,), (2, 0)):
        x = torch.randn(*leading, d_in, generator=generator, dtype=torch.float64)
        y = layer(x)
        assert y.shape == (*leading, d_out)
        wanted = layer.base_layer(x) + FORMULAS[case.method](tensors_of(layer), case.config(r=1), x)
        torch.testing.assert_close(y, wanted)


@pytest.mark.cell("bases", "GPT-2's Conv1D, whose weight is stored transposed: forward, gradients, merge")
@every_method
def test_conv1d(case, ids, device):
    torch.manual_seed(0)
    conv = Conv1D(53, 37)
    nn.init.normal_(conv.weight)
    layer = one_layer(case, conv).double()
    x = torch.randn(3, 37, dtype=torch.float64)
    wanted = x @ conv.weight + conv.bias + FORMULAS[case.method](tensors_of(layer), case.config(), x)
    torch.testing.assert_close(layer(x), wanted)

    model = train_a_little(get_peft_model(gpt2(), case.config(target_modules=["c_attn", "c_fc"])).to(device))
    layers = adapted_layers(model)
    assert {(layer.in_features, layer.out_features) for layer in layers.values()} == {(32, 96), (32, 128)}
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in trainable(model).values())
    if case.entry.merge(case.config()) is Merge.EXACT:
        before = logits(model, ids)
        model.merge_adapter()
        assert relative(logits(model, ids), before) < 1e-5


@pytest.mark.cell("bases", "on a bf16 base the tensors are never rounded to bf16, not even on the way")
@pytest.mark.parametrize("case", [c for c in MAIN if c.entry.provided_by == "curvelora"], ids=str)
def test_never_rounded(case):
    """PEFT casts bf16 tensors up again, but what rounding lost would not come back."""
    torch.manual_seed(0)
    model = get_peft_model(llama().to(torch.bfloat16), case.config(), autocast_adapter_dtype=False)
    for layer in adapted_layers(model).values():
        tensors = tensors_of(layer)
        assert all(t.dtype == torch.float32 for t in tensors.values())
        assert not torch.equal(tensors["A"], tensors["A"].bfloat16().float())
