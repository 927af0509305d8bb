"""Full fine-tuning through a run: everything moves, and its file restores the model (resume: test_resume)."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from curvelora import METHODS, UserError
from curvelora.loading import load_adapter
from curvelora_eval.eval_command import add_arguments, run
from curvelora_training.config import RecipeError
from curvelora_training.prepare import load_and_prepare

FULL = {"adapter": {"method": "full"}}


def test_a_run_trains_everything_and_evaluates_again(recipe, finetune, write, tiny_models):

    out = finetune(write(recipe | FULL, **{"training.max_steps": 4, "training.learning_rate": 1e-4}))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_models["bert"], num_labels=2)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = load_adapter(base, out / "adapter")
    assert not any(p.requires_grad for p in model.parameters())
    after = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    same = {name for name, p in before.items() if name in after and torch.equal(p, after[name])}
    assert not {name for name in same if ".key.bias" not in name}, "a key's bias shifts all scores of a row alike"
    result = json.loads((out / "result.json").read_text())
    assert (
        result["method"] == "full" and result["trainable_parameters"] > sum(p.numel() for p in before.values()) * 0.99
    )

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    data = recipe["data"]["test"]["path"]
    again = out.parent / "again"
    args = ["--adapter", str(out / "adapter"), "--data", data, "--limit", "40", "--out", str(again)]
    assert run(parser.parse_args(args)) == 0
    first, second = (json.loads((folder / "evaluation.json").read_text())["metrics"] for folder in (out, again))
    assert first == second


def test_a_tied_decoder_saves_and_loads(tiny_models, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    model = get_peft_model(base, METHODS["full"].build_config())
    assert all(p.requires_grad for p in model.parameters())
    ids = torch.arange(1, 9).view(1, 8)
    torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.05 * p.grad)
    wanted = model.eval()(ids).logits.detach()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    assert torch.equal(load_adapter(again, tmp_path).eval()(ids).logits, wanted)
    merged = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32), tmp_path)
    assert torch.equal(merged.merge_and_unload()(ids).logits, wanted)


def test_a_quantised_base_is_refused(recipe, write):
    with pytest.raises(RecipeError, match="full does not work on a base in nf4"):
        load_and_prepare(write(recipe | FULL, **{"model.quantization": "nf4"}), [])


def test_a_second_adapter_is_refused(tiny_models):
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    model = get_peft_model(base, METHODS["full"].build_config())
    with pytest.raises(UserError, match="a second adapter has nothing to stand on"):
        model.add_adapter("second", METHODS["full"].build_config())
