"""LoRAN over bitsandbytes NF4 (double quantisation) and int8, on the CPU: the packed weight is never touched."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from curvelora import LoranConfig, UserError
from curvelora.methods.loran import LoranLayer

bnb = pytest.importorskip("bitsandbytes")

# Relative error of a layer against the dense layer with the dequantised weight, forward and backward. NF4 dequantises
# and multiplies in fp32 (measured: 0); int8 does so in training (7e-8) and multiplies codes in evaluation (6e-3).
BOUNDS = {"nf4": {"train": 1e-6, "eval": 1e-6}, "int8": {"train": 1e-6, "eval": 2e-2}}
KINDS = list(BOUNDS)


@pytest.fixture
def quantised(llama, tmp_path):
    """-> load(kind): the tiny Llama with its linear layers quantised."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "base")
    settings = {
        "nf4": dict(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "int8": dict(load_in_8bit=True),
    }

    def load(kind: str):
        config = BitsAndBytesConfig(**settings[kind])
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
        ).eval()

    return load


@pytest.fixture
def adapted(quantised, randomise):
    def build(kind: str):
        config = LoranConfig(
            r=4, alpha=8, dropout=0.0, amplitude=2e-2, target_modules=["q_proj", "v_proj", "down_proj"]
        )
        model = get_peft_model(quantised(kind), config)
        randomise(model)
        return model.eval()

    return build


def packed_weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.dtype.is_floating_point}


def dequantised(weight) -> torch.Tensor:
    """Not through PEFT: bitsandbytes' own function for 4 bits; for int8 codes times the row's maximum / 127."""
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.CB.float() * weight.SCB.view(-1, 1).float() / 127


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_dequantised_base_plus_adapter(adapted, run_adapter, kind, mode):
    layer = adapted(kind).base_model.model.model.layers[0].self_attn.v_proj.train(mode == "train")
    assert layer.quantization_backend is not None
    assert all(factor.dtype == torch.float32 for factor in layer.factors("default"))
    dense = LoranLayer(nn.Linear(128, 64, bias=False), "dense")
    dense.base_layer.weight.data = dequantised(layer.base_layer.weight)
    dense.add_adapter("default", layer.configs["default"])
    for ours, other in zip(dense.factors("default"), layer.factors("default"), strict=True):
        ours.data.copy_(other.data)
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 5, 128, generator=generator), torch.randn(2, 5, 64, generator=generator)
    found, expected = run_adapter(layer, x, grad), run_adapter(dense, x, grad)
    for name in ("output", "x"):
        assert relative(found[name], expected[name]) < BOUNDS[kind][mode], name
    for name in ("A", "B"):  # the base has no part in them
        assert relative(found[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("evaluated_before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_warns_and_unmerging_restores_the_packed_bits(adapted, token_ids, kind, evaluated_before):
    """Requantising the difference would not come back; the packed tensor itself is kept and put back."""
    model = adapted(kind)
    before = logits(model, token_ids) if evaluated_before else None
    packed = packed_weights(model)
    with pytest.warns(UserWarning, match="quantises the sum again, which changes the model"):
        model.merge_adapter()
    merged = logits(model, token_ids)
    assert sum(not torch.equal(p, packed[name]) for name, p in packed_weights(model).items()) == 6
    model.unmerge_adapter()
    assert packed_weights(model).keys() == packed.keys()
    assert all(torch.equal(p, packed[name]) for name, p in packed_weights(model).items())
    model.to("cpu")  # moving quantises a weight that is not marked as quantised, so the marks must be back as well
    after = logits(model, token_ids)
    if evaluated_before:
        assert torch.equal(after, before)
    # lossy, but still about the same model (NF4: about 0.1, int8: about 0.02); 1.3 is what a wrong dequantisation gives
    assert 0 < relative(merged, after) < {"nf4": 0.3, "int8": 0.06}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_is_the_sum_within_the_quantiser_s_error(adapted, kind):
    layer = adapted(kind).base_model.model.model.layers[0].self_attn.q_proj
    expected = dequantised(layer.base_layer.weight) + layer.delta_weight("default")
    layer.merge()
    assert relative(layer.get_base_weight(), expected) < {"nf4": 0.12, "int8": 0.02}[kind]


def test_a_base_that_was_reordered_before_is_refused(quantised, token_ids):
    """bitsandbytes reorders 4-bit codes at the first evaluation on some CPUs; what is read from them is garbage."""
    base = quantised("nf4")
    logits(base, token_ids)
    layer = base.model.layers[0].self_attn.q_proj
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not reorder")
    model = get_peft_model(base, LoranConfig(r=4, init_B_std=0.1))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(UserError, match="load the base model again"):
        layer.merge()


def test_training_takes_peft_s_preparation(quantised, token_ids):
    """prepare_model_for_kbit_training casts norms to fp32; the adapter trains after it and the packed base stays."""
    from peft import prepare_model_for_kbit_training

    base = prepare_model_for_kbit_training(quantised("nf4"), use_gradient_checkpointing=False)
    model = get_peft_model(base, LoranConfig(r=4, dropout=0.0)).train()
    packed = packed_weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(token_ids, labels=token_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, packed[name]) for name, p in packed_weights(model).items())
