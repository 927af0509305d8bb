"""Every kind of base layer: storage dtypes, quantised storage, odd shapes, transposed weights."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from cases import MAIN, OURS, Case, those_with
from formulas import FORMULAS
from models import (
    STORAGE,
    adapted_layers,
    gpt2,
    llama,
    logits,
    relative,
    tensors_of,
    train_a_little,
    trainable,
    with_weight,
)
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from refusals import FORWARD_ONLY, REORDERED, UNREADABLE_WEIGHT, merge_refusal
from torch import nn
from transformers.pytorch_utils import Conv1D

from curvelora.merging import Merge

every_method = pytest.mark.parametrize("case", MAIN, ids=str)
transposed = pytest.mark.parametrize("case", those_with("transposed"), ids=str)
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
    [
        (c, s)
        for s, (kind, _) in STORAGE.items()
        for c in MAIN
        if c.entry.required_quantization in (None, kind) and kind in c.entry.bases and (kind != "int8" or c.has("int8"))
    ],
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


def close(case: Case, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """As near as the dtype allows, in which the method can be compared."""
    if case.has("fp64"):
        torch.testing.assert_close(found, wanted)
    else:
        assert found.numel() == 0 or relative(found, wanted) < 1e-5


@pytest.mark.cell("bases", "odd and rectangular layers; inputs with no, one and two leading dimensions, and empty ones")
@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_shapes(case, shape):
    d_in, d_out = shape
    layer = one_layer(case, nn.Linear(d_in, d_out), r=1).to(case.exact_dtype)
    generator = torch.Generator().manual_seed(0)
    for leading in ((), (3,), (2, 5), (0,), (2, 0))[0 if case.has("vectors") else 1 :]:
        x = torch.randn(*leading, d_in, generator=generator, dtype=case.exact_dtype)
        y = layer(x)
        assert y.shape == (*leading, d_out)
        wanted = layer.base_layer(x) + FORMULAS[case.method](with_weight(layer), case.config(r=1), x)
        close(case, y, wanted)


@pytest.mark.cell("bases", "GPT-2's Conv1D, whose weight is stored transposed: forward, gradients, merge")
@transposed
def test_conv1d(case, ids, device):
    torch.manual_seed(0)
    conv = Conv1D(53, 37)
    nn.init.normal_(conv.weight)
    layer = one_layer(case, conv).to(case.exact_dtype)
    x = torch.randn(3, 37, dtype=case.exact_dtype)
    wanted = x @ conv.weight + conv.bias + FORMULAS[case.method](with_weight(layer), case.config(), x)
    close(case, layer(x), wanted)

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
@pytest.mark.parametrize("case", OURS, ids=str)
def test_never_rounded(case):
    """PEFT casts bf16 tensors up again, but what rounding lost would not come back."""
    torch.manual_seed(0)
    model = get_peft_model(llama().to(torch.bfloat16), case.config(), autocast_adapter_dtype=False)
    for layer in adapted_layers(model).values():
        tensors = tensors_of(layer)
        assert all(t.dtype == torch.float32 for t in tensors.values())
        assert not torch.equal(tensors["A"], tensors["A"].bfloat16().float())


@pytest.mark.cell("bases", "the whole model cast to {dtype} after training: runs, near fp32, and merges as before")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [c for c in MAIN if not c.entry.required_quantization], ids=str)
def test_cast(case, dtype, adapted, ids):
    model = adapted(case)
    wanted = logits(model, ids)
    model.to(getattr(torch, dtype))
    found = logits(model, ids)
    assert found.dtype == getattr(torch, dtype) and relative(found, wanted) < {"bfloat16": 0.03, "float16": 5e-3}[dtype]
    if case.entry.merge(case.config()) is Merge.EXACT:
        model.merge_adapter()
        assert relative(logits(model, ids), wanted) < {"bfloat16": 0.03, "float16": 5e-3}[dtype]


@pytest.mark.cell("bases", "a base whose weights are offloaded: the same start, loading, training and merging")
@pytest.mark.parametrize("case", OURS, ids=str)
def test_offloaded(case, ids, tmp_path, device):
    """accelerate keeps the weights elsewhere and brings each for its pass; PEFT's LoRA loads nothing there (0.21)."""
    torch.manual_seed(0)
    model = get_peft_model(llama().to(device), case.config())
    start = logits(model, ids)
    wanted = logits(train_a_little(model), ids)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    new = get_peft_model(cpu_offload(llama(), execution_device=device), case.config())
    assert torch.equal(logits(new, ids), start)
    base = cpu_offload(llama(), execution_device=device)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True, torch_device=str(device))
    assert all(layer.base_layer.weight.is_meta for layer in adapted_layers(loaded).values())
    assert torch.equal(logits(loaded, ids), wanted)
    loaded(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in trainable(loaded).values())
    if case.entry.merge(case.config()) is Merge.EXACT:
        for undo in (loaded.unmerge_adapter, loaded.base_model.disable_adapter_layers):
            loaded.merge_adapter()
            assert relative(logits(loaded, ids), wanted) < 1e-5
            undo()
            expected = logits(llama().to(device), ids) if undo != loaded.unmerge_adapter else wanted
            assert torch.equal(logits(loaded, ids), expected)


class Packed(nn.Module):
    """Stands for a layer of GPTQ (qweight) or HQQ (W_q), whose weight has another name and cannot be read back."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features = 32, 16
        self.register_buffer(name, torch.zeros(4, 16, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :16]


@pytest.mark.cell(
    "bases", "a base that PEFT only runs forward (a stand-in for GPTQ, AWQ and others): right, never merged"
)
@pytest.mark.parametrize("name", ["qweight", "W_q"])
@pytest.mark.parametrize("case", [*OURS, Case("ranlora", {"r": 4, "init": "K"})], ids=str)
def test_forward_only(case, name, monkeypatch, refused):
    backend = ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr("curvelora.layers.adapter_layer.resolve_quantization_backend", lambda base: backend)
    sources = [{"svd_source": name} for name in ("unquantised", "dequantised")]
    if getattr(case.config(), "needs_unquantised_weight", False) or case.method == "neat":
        for options in sources if case.method != "neat" else [{}]:
            with refused(UNREADABLE_WEIGHT):
                one_layer(case, Packed(name), **options)
        return
    layer = one_layer(case, Packed(name)).double()
    x = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x[:, :16] + FORMULAS[case.method](with_weight(layer), case.config(), x))
    with refused(merge_refusal(case) or FORWARD_ONLY):
        layer.merge()


@pytest.mark.cell(
    "bases", "a 4-bit layer that bitsandbytes has reordered before (simulated): no merge, no factors from it"
)
@pytest.mark.parametrize("case", [*OURS[:2], Case("aurora", {"r": 4, "mode": "static"})], ids=str)
def test_reordered(case, load_llama, refused):
    base = load_llama("nf4")
    for layer in base.model.layers:  # v_proj: the first to be adapted is as it should be
        layer.self_attn.v_proj.weight.quant_state.packing_format_for_cpu = True
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    with refused(REORDERED):
        get_peft_model(base, case.config()).merge_adapter()
    after = {name.replace(".base_layer", ""): p for name, p in base.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
