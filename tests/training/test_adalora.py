"""AdaLoRA in a run: the budget moves once an optimiser step, as PEFT's own loop moves it, and its schedule fits the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from curvelora import METHODS
from curvelora_training.adalora import RankAllocation
from curvelora_training.config import RecipeError, TrainingSpec
from curvelora_training.lease import Lease
from curvelora_training.nonfinite import ROW, Guard, WithRows
from curvelora_training.prepare import load_and_prepare
from curvelora_training.run_folder import RunFolder
from curvelora_training.trainer import AdapterTrainer, StepTimer
from run_files import metrics, result

STEPS, ACCUMULATION = 6, 2
FAST = {"training.learning_rate": 0.02}
ADALORA = {"method": "adalora", "init_r": 4, "target_r": 2, "alpha": 8, "target_modules": ["query", "value"]}


def model() -> PeftModel:
    """A tiny decoder with AdaLoRA on it, the same in every call."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_cache=False,
        )
    )
    config = METHODS["adalora"].build_config(
        init_r=4, target_r=2, target_modules=["q_proj", "v_proj"], total_step=STEPS, tinit=1, tfinal=2
    )
    config.task_type = "CAUSAL_LM"  # without one PEFT leaves the penalty out
    return get_peft_model(base, config)


def watched(tuner: Any) -> list[tuple[int, int]]:
    """(step, budget) of every call of the allocator from now on."""
    allocate, seen = tuner.rankallocator.update_and_allocate, []

    def watching(inner: Any, step: int, **options: Any) -> Any:
        budget, pattern = allocate(inner, step, **options)
        seen.append((step, budget))
        return budget, pattern

    tuner.rankallocator.update_and_allocate = watching
    return seen


def tensors(trained: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}


def penalty(trained: PeftModel) -> Tensor:
    """Mean over all factors of |A A^T - I| and |B^T B - I|."""
    norms = []
    for name, p in trained.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append((gram - torch.eye(len(gram))).norm())
    return torch.stack(norms).mean()


@pytest.mark.parametrize("token_loss", [False, True], ids=["mean over batches", "mean over tokens"])
def test_allocation_equals_a_loop_by_hand_under_accumulation(token_loss, tmp_path):
    ids = torch.randint(1, 48, (8, 9), generator=torch.Generator().manual_seed(1))
    batches: list[dict[str, Tensor]] = []

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        labels = torch.stack([row["ids"] for row in rows])
        labels[0, : 1 + int(labels[0, 0]) % 5] = -100  # batches of unequal weight
        batches.append({"input_ids": torch.stack([row["ids"] for row in rows]), "labels": labels})
        return dict(batches[-1])

    trained = model()
    seen = watched(trained.base_model)
    masks: list[dict[str, Tensor]] = []

    class Masks(RankAllocation):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            super().on_optimizer_step(args, state, control, model, **kwargs)
            masks.append(tensors(model))

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = AdapterTrainer(
        model=trained,
        args=arguments,
        train_dataset=[{"ids": row, ROW: index} for index, row in enumerate(ids)],
        data_collator=WithRows(collate),
        callbacks=[Masks(token_loss)],
        optimizers=(torch.optim.Adam(trained.parameters(), lr=0.05), None),
        head={"lr": 0.05, "weight_decay": 0.0},
        token_loss=token_loss,
        timer=StepTimer(),
        shapes=trained,
        guard=Guard(TrainingSpec(), RunFolder(tmp_path)),
        lease=Lease(tmp_path),
    )
    trainer.train()

    byhand = model().train()
    by_hand_seen = watched(byhand.base_model)
    optimizer = torch.optim.Adam(byhand.parameters(), lr=0.05)
    weight = byhand.peft_config["default"].orth_reg_weight
    for step in range(1, STEPS + 1):
        both = batches[(step - 1) * ACCUMULATION : step * ACCUMULATION]
        tokens = [(batch["labels"][:, 1:] != -100).sum() for batch in both]
        for batch, own in zip(both, tokens, strict=True):
            share = own / sum(tokens) if token_loss else 1 / ACCUMULATION
            (share * byhand.base_model.model(**batch).loss).backward()  # below PEFT's forward, without its penalty
        (weight * penalty(byhand)).backward()
        optimizer.step()
        byhand.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        for name, tensor in tensors(byhand).items():
            torch.testing.assert_close(masks[step - 1][name], tensor, rtol=1e-3, atol=1e-5)
            if "lora_E" in name:
                assert torch.equal(masks[step - 1][name] == 0, tensor == 0)
    # 4 layers from rank 4 to 2: all until step 1, cubic until step 4 = total_step - tfinal, then the last mask stays
    assert seen == by_hand_seen == [(1, 16), (2, 10), (3, 8), (4, 8)]
    assert trained.peft_config["default"].orth_reg_weight == weight
    found, wanted = (m.peft_config["default"].rank_pattern for m in (trained, byhand))
    assert found == wanted and sum(map(sum, found.values())) == 8


@pytest.fixture
def adalora_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"adapter": ADALORA}


def test_a_run_takes_its_own_steps_and_saves_what_it_scored(adalora_recipe, write, finetune, tiny_models):
    path = write(adalora_recipe, **{"training.batch_size": 4, "training.accumulation": 2, "adapter.tfinal": 4} | FAST)
    folder = finetune(path)
    saved = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert saved["total_step"] == result(folder)["steps"] == 12 and saved["orth_reg_weight"] == 0.1
    kept = [sum(kept) for kept in saved["rank_pattern"].values()]
    assert sum(kept) == 2 * len(kept)
    stored = load_file(folder / "adapter/adapter_model.safetensors")
    assert sorted(len(t) for name, t in stored.items() if name.endswith("lora_E")) == sorted(kept)
    # the saved adapter, with the lost triplets cut out, is the function that was scored
    base = AutoModelForSequenceClassification.from_pretrained(tiny_models["bert"], num_labels=2)
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    scored = [json.loads(line)["prediction"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    unseen = Path(adalora_recipe["data"]["test"]["path"]).read_text(encoding="utf-8").splitlines()[1:41]
    texts = [line.split("\t")[0] for line in unseen]
    inputs = AutoTokenizer.from_pretrained(tiny_models["bert"])(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=32
    )
    with torch.no_grad():
        assert loaded(**inputs).logits.argmax(-1).tolist() == scored


@pytest.mark.parametrize("step", [4, 6, 10])  # while the budget shrinks, and when it has its end
def test_a_resumed_run_is_the_straight_one(adalora_recipe, write, finetune, tmp_path, step):
    """With triplets that lost their budget and may win it back, and the averages by which they are ranked."""
    changes = {"training.save_every": 2, "training.keep_checkpoints": 9, "adapter.tinit": 2, "adapter.tfinal": 4}
    path = write(adalora_recipe, **changes)
    straight = finetune(path)
    resumed = tmp_path / "resumed"
    shutil.copytree(straight / f"checkpoints/checkpoint-{step}", resumed / f"checkpoints/checkpoint-{step}")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(straight / name, resumed / name)
    finetune(path, f"output={resumed}", "--resume")
    for name in ("adapter_model.safetensors", "moments.safetensors", "method.safetensors"):
        files = [(f / "checkpoints/checkpoint-12" / name).read_bytes() for f in (straight, resumed)]
        assert files[0] == files[1], name
    assert [line["loss"] for line in metrics(resumed)] == [line["loss"] for line in metrics(straight)]
    patterns = [
        json.loads((f / "adapter/adapter_config.json").read_text())["rank_pattern"] for f in (straight, resumed)
    ]
    assert patterns[0] == patterns[1] and not all(map(all, patterns[0].values()))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no step is left for the run's budget": (
        {"adapter.tinit": 6, "adapter.tfinal": 6},
        "tinit + tfinal = 12 leaves none of the 12 steps",
    ),
    "nor for that of a given schedule": (
        {"adapter.total_step": 10, "adapter.tinit": 10},
        "tinit + tfinal = 10 leaves none of the 10 steps",
    ),
    "a schedule that never ends": (
        {"adapter.total_step": 100, "adapter.tfinal": 10},
        "reaches target_r at step 90, and the run has 12 optimiser steps",
    ),
    "the rank is called init_r": ({"adapter.r": 4}, "adapter.r: method 'adalora' has no such option"),
    "above what the layer has": ({"adapter.init_r": 400}, "write init_r <= "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schedule_that_does_not_fit_is_refused_before_anything_is_loaded(adalora_recipe, write, name):
    changes, said = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        load_and_prepare(write(adalora_recipe, **changes), [])
    assert said in str(caught.value) and len(caught.value.problems) == 1


def test_a_schedule_may_end_before_the_run(adalora_recipe, write):
    prepared = load_and_prepare(write(adalora_recipe, **{"adapter.total_step": 9, "adapter.tfinal": 2}), [])
    assert prepared.peft_config.total_step == 9
    untrained = load_and_prepare(write(adalora_recipe, **{"training.max_steps": 0, "adapter.tinit": 3}), [])
    assert untrained.peft_config.total_step == 4


def test_images_have_no_penalty_in_peft(recipe, write, tiny_models, root):
    """PEFT adds it in the forward pass of a task type, and has none for images."""
    images = {
        "model": {"path": str(tiny_models["vit"]), "dtype": "float32"},
        "task": {"kind": "image_classification", "labels": ["a", "b"]},
        "adapter": ADALORA | {"target_modules": ["q_proj", "v_proj"]},
    }
    with pytest.raises(RecipeError) as caught:
        load_and_prepare(write(recipe | images), [])
    assert "write adapter.orth_reg_weight=0 to train without it" in str(caught.value)
    with pytest.raises(RecipeError) as caught:  # the rows of this recipe are no images
        load_and_prepare(write(recipe | images, **{"adapter.orth_reg_weight": 0}), [])
    assert "orth_reg_weight" not in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "changes", "said"),
    [
        ({"method": "delora", "r": 4}, {"model.quantization": "nf4"}, "delora does not work on a base in nf4"),
        ({"method": "dora", "r": 4}, {"model.quantization": "int8"}, "dora on a base in int8 needs a GPU"),
        (ADALORA, {"training.deepspeed": "ds_configs/none.json"}, "DeepSpeed has cleared them by then"),
        (ADALORA | {"orth_reg_weight": -0.1}, {}, "`orth_reg_weight` should be greater than or equal to 0"),
        ({"method": "dora_dynamic"}, {}, "adapter.method dora_dynamic is DoRA by dynamic rank distribution"),
        (
            {"method": "fourierft", "n_frequency_pattern": {"quary": 5}},
            {},
            "adapter.n_frequency_pattern: 'quary' matches nothing that is adapted; did you mean 'query'",
        ),
    ],
    ids=lambda value: value.get("method", "") if isinstance(value, dict) else "",
)
def test_what_peft_does_not_have_for_a_method_is_refused(recipe, write, monkeypatch, adapter, changes, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target = {} if adapter["method"] == "dora_dynamic" else {"target_modules": ["query", "value"]}
    with pytest.raises(RecipeError) as caught:
        load_and_prepare(write(recipe | {"adapter": adapter | target}, **changes), [])
    assert said in str(caught.value)


@pytest.mark.parametrize("method", ["dora", "rslora", "fourierft", "delora"])
def test_the_others_train_from_a_recipe(recipe, write, finetune: Callable[..., Path], method):
    options = {"n_frequency": 50, "init_weights": True} if method == "fourierft" else {"r": 2, "dropout": 0.1}
    adapter = {"method": method, "target_modules": ["query", "value"], **options}
    folder = finetune(write(recipe | {"adapter": adapter}, **{"training.max_steps": 3}))
    assert result(folder)["steps"] == 3 and result(folder)["method"] == method
    assert result(folder)["start_shift"]["relative"] < 1e-5
