"""BitFit through a run: only biases and the head move, the file brings them back, and models without biases are refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from curvelora import METHODS
from curvelora.loading import load_adapter
from curvelora_training.config import RecipeError
from curvelora_training.prepare import load_and_prepare

BITFIT = {"adapter": {"method": "bitfit"}}


def test_a_run_trains_the_biases_and_its_file_has_them(recipe, finetune, write, tiny_models):
    out = finetune(write(recipe | BITFIT, **{"training.max_steps": 3}))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_models["bert"], num_labels=2)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = load_adapter(base, out / "adapter")
    after = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    moved = {name for name, p in before.items() if name in after and not torch.equal(p.float(), after[name].float())}
    # a key projection's bias shifts every score of a row alike, so softmax takes it out
    wanted = {name for name in before if name.endswith(".bias") and "classifier" not in name and ".key." not in name}
    assert wanted <= moved and all(name.endswith(".bias") for name in moved)
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == "bitfit"
    assert result["adapter_parameters"] == sum(
        before[n].numel() for n in before if n.endswith(".bias") and "classifier" not in n
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.quantization": "nf4"}, "bitfit does not work on a base in nf4"),
        ({"adapter.r": 4}, "adapter.r: method 'bitfit' has no such option"),
        ({"model.dtype": "bfloat16"}, "set model.dtype=float32"),
    ],
)
def test_what_is_refused(recipe, write, changes, said):
    with pytest.raises(RecipeError) as caught:
        load_and_prepare(write(recipe | BITFIT, **changes), [])
    assert said in str(caught.value)


def test_a_model_without_biases_is_refused(recipe, write, tiny_models):
    decoder = {"path": str(tiny_models["llama"]), "dtype": "float32"}
    task = {"kind": "causal_lm", "columns": {"text": "sentence"}, "max_length": 32}
    with pytest.raises(RecipeError, match="bitfit trains bias vectors, and this model has none"):
        load_and_prepare(write(recipe | BITFIT | {"model": decoder, "task": task}), [])


def test_lora_that_trains_biases_too_needs_none(recipe, write, tiny_models):
    """PEFT's `bias: all` beside factors is LoRA's, also on a model without biases."""
    decoder = {"path": str(tiny_models["llama"]), "dtype": "float32"}
    task = {"kind": "causal_lm", "columns": {"text": "sentence"}, "max_length": 32}
    adapter = {"method": "lora", "bias": "all", "r": 4, "target_modules": ["q_proj"]}
    prepared = load_and_prepare(write(recipe | {"adapter": adapter, "model": decoder, "task": task}), [])
    assert any(p.requires_grad for p in prepared.shapes.parameters())


def test_the_published_count():
    """RoBERTa-base: 102,144 biases."""
    import transformers
    from peft import get_peft_model

    with torch.device("meta"):
        base = transformers.AutoModel.from_config(transformers.RobertaConfig(vocab_size=50265), add_pooling_layer=False)
        model = get_peft_model(base, METHODS["bitfit"].build_config())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 102_144
