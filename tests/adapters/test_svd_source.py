"""Where RanLoRA's factors come from: the layer's own weight, or the checkpoint of a quantised layer, and no other one."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from curvelora import RanloraConfig, UserError
from curvelora.checkpoint import unquantised_weight
from curvelora.layers.base_weight import requantised
from curvelora.layers.initial import SAME_WHEN_REQUANTISED
from curvelora.methods.ranlora import RanloraLayer
from curvelora.svd import singular_triplets


def adapted(model: nn.Module, **options) -> PeftModel:
    return get_peft_model(model, RanloraConfig(**({"target_modules": ["q_proj", "v_proj"]} | options))).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids).logits


def quantisation(kind: str):
    """The settings of a quantised base."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)


@pytest.fixture
def quantised(llama, tmp_path):
    """-> load(kind, dtype): the tiny Llama quantised while it is loaded from an fp32 checkpoint; `tmp_path / "base"`."""
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "base", max_shard_size="100KB")

    def load(kind: str, dtype: torch.dtype = torch.float32):
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation(kind), dtype=dtype, device_map={"": "cpu"}
        ).eval()

    return load


def first_removed(model: nn.Module) -> torch.Tensor:
    """C of the first adapted layer."""
    A0, B0 = next(m for m in model.modules() if isinstance(m, RanloraLayer)).removed("default")
    return B0 @ A0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_on_a_quantised_base_the_factors_are_those_of_the_checkpoint(llama, quantised, kind, dtype):
    assert torch.equal(first_removed(adapted(quantised(kind, dtype))), first_removed(adapted(llama())))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_keeps_the_names_of_before_a_renaming(kind, tmp_path):
    """transformers 5 calls ViT's attention.attention.query q_proj, and its checkpoints keep the old name."""
    from safetensors.torch import load_file
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    size = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(tmp_path / "model.safetensors")
    load = AutoModelForImageClassification.from_pretrained
    base = load(tmp_path, quantization_config=quantisation(kind), dtype=torch.float32, device_map={"": "cpu"})
    assert torch.equal(first_removed(adapted(base)), first_removed(adapted(load(tmp_path, dtype=torch.float32))))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_another_revision_is_not_taken_for_the_one_that_was_loaded(llama, tmp_path, monkeypatch, kind):
    """A model does not say its revision, and two revisions may differ by a few per cent only."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    for commit, name in (("a" * 40, "main"), ("b" * 40, "v2")):
        model, generator = llama(), torch.Generator().manual_seed(9)
        for parameter in model.parameters() if name == "v2" else ():
            parameter.data += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / name).write_text(commit)

    def load(**options):
        return AutoModelForCausalLM.from_pretrained("me/tiny", revision="v2", dtype=torch.float32, **options)

    packed = dict(quantization_config=quantisation(kind), device_map={"": "cpu"})
    with pytest.raises(UserError, match=r"another weight under its name.*another revision"):
        adapted(load(**packed))
    exact = first_removed(adapted(load()))
    assert torch.equal(first_removed(adapted(load(**packed), revision="v2")), exact)
    config = RanloraConfig(target_modules=["q_proj", "v_proj"])
    assert torch.equal(first_removed(get_peft_model(load(**packed), config, revision="v2")), exact)


@pytest.mark.parametrize(("kind", "expected"), [("nf4", 0.050), ("int8", 0.0145)])
def test_how_far_a_weight_that_differs_by_one_per_cent_is(quantised, kind, expected):
    """The figures of docs/decisions.md and the room on both sides of the bound: the right weight is at 0."""
    layer = quantised(kind).model.layers[0].self_attn.q_proj
    exact = unquantised_weight(quantised(kind), "model.layers.0.self_attn.q_proj")
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    right, other = requantised(layer, exact), requantised(layer, exact + 0.01 * exact.std() * noise)
    assert torch.equal(right, requantised(layer, exact)) and SAME_WHEN_REQUANTISED == 0.01
    assert ((other - right).norm() / right.norm()).item() == pytest.approx(expected, rel=0.1)


def test_dequantised_factors_are_other_ones_and_have_to_be_asked_for(llama, quantised):
    exact = first_removed(adapted(llama()))
    rough = first_removed(adapted(quantised("nf4"), svd_source="dequantised"))
    assert (exact - rough).norm() / exact.norm() > 0.5  # measured: 0.97 (1.41 is no overlap at all)


@pytest.mark.parametrize(("module", "expected"), [("query", 1.43), ("value", 1.45), ("intermediate.dense", 0.38)])
def test_how_far_the_dequantised_tail_is_on_a_real_model(minilm, module, expected):
    """The figures of docs/methods.md: MiniLM in NF4, r = 2, median over its layers."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from safetensors.torch import load_file

    distances = []
    for name, weight in load_file(minilm / "model.safetensors").items():
        if name.endswith(f"{module}.weight"):
            packed = functional.quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=True)
            exact, rough = (
                singular_triplets(w, 2, "last").product() for w in (weight, functional.dequantize_4bit(*packed))
            )
            distances.append((exact - rough).norm() / exact.norm())
    assert len(distances) == 6 and torch.stack(distances).median().item() == pytest.approx(expected, abs=0.02)


CHANGES = {
    "the checkpoint is gone": lambda model, folder: setattr(model.config, "_name_or_path", str(folder / "nowhere")),
    "the model names no checkpoint": lambda model, folder: setattr(model.config, "_name_or_path", ""),
    "another model's weights": lambda model, folder: setattr(model.config, "_name_or_path", str(folder / "other")),
    "quantised itself": lambda model, folder: setattr(model.config, "_name_or_path", str(folder / "packed")),
}
REASONS = {
    "the checkpoint is gone": "nowhere",
    "the model names no checkpoint": "does not say which checkpoint",
    "another model's weights": "has another weight under its name",
    "quantised itself": "is quantised itself",
}


def test_a_quantiser_that_cannot_be_asked_is_compared_with_roughly(llama, quantised, tmp_path, monkeypatch):
    """HQQ and others: another model is refused, and what quantisation costs is not."""
    monkeypatch.setattr("curvelora.layers.initial.requantised", lambda *_: None)
    assert torch.equal(first_removed(adapted(quantised("nf4"))), first_removed(adapted(llama())))
    llama(seed=7).save_pretrained(tmp_path / "other")
    base = quantised("nf4")
    base.config._name_or_path = str(tmp_path / "other")
    with pytest.raises(UserError, match="another weight under its name"):
        adapted(base)


def test_a_module_around_the_model(quantised):
    """It is refused in a sentence where its names are not those of the checkpoint."""
    holder = nn.Module()
    holder.inner = quantised("nf4")
    holder.config = holder.inner.config
    with pytest.raises(UserError, match=r"has no tensor inner.*svd_source: dequantised"):
        get_peft_model(holder, RanloraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("change", CHANGES)
def test_a_quantised_base_without_its_unquantised_weight_is_refused(llama, quantised, tmp_path, change):
    llama(seed=7).save_pretrained(tmp_path / "other")
    base = quantised("nf4")
    base.save_pretrained(tmp_path / "packed")
    CHANGES[change](base, tmp_path)
    with pytest.raises(UserError, match=REASONS[change]) as caught:
        adapted(base)
    assert "q_proj' is quantised" in str(caught.value) and "svd_source: dequantised" in str(caught.value)
    assert "\n" not in str(caught.value)
    first_removed(adapted(base, svd_source="dequantised"))  # the remedy works


def test_a_saved_adapter_loads_on_a_base_that_exists_only_quantised(quantised, token_ids, tmp_path):
    model = adapted(quantised("nf4"))
    model.save_pretrained(tmp_path / "adapter")
    base = quantised("nf4")
    base.config._name_or_path = ""
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True, torch_device="cpu")
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
