"""Whole runs in this process: what a run leaves behind, for every task kind, and what the optimiser is given."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoModelForSequenceClassification, Trainer

from curvelora.loading import load_adapter
from curvelora_training.config import load_recipe
from curvelora_training.run_folder import CONTENTS
from run_files import metrics, result


def test_the_run_folder_is_complete(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path]
) -> None:
    folder = finetune(write(recipe))
    assert {p.name for p in folder.iterdir()} == set(CONTENTS)
    run = result(folder)
    assert (run["status"], run["steps"], run["examples"], run["method"]) == ("completed", 12, 96, "loran")
    # 2 layers x (query, value) x r (d_in + d_out) = 4 x 4 x 128, and the head 64 x 2 + 2
    assert run["adapter_parameters"] == 2048
    assert run["trainable_parameters"] == 2048 + 130
    assert run["resolvability"]["forward"] > 0.9  # fp32 sees Sinter at its published amplitude
    assert run["engine"]["engine"] == "single process"
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 4, 8, 12]
    assert all("resolvability_forward" in line and line["loss"] > 0 for line in lines)
    assert run["first_loss"] == lines[0]["loss"]
    environment = result(folder, "environment.json")
    assert torch.__version__.startswith(environment["versions"]["torch"].partition("+")[0])
    stored = result(folder / "adapter", "adapter_config.json")
    assert sorted(stored["modules_to_save"]) == ["classifier", "score"]  # PEFT's own names for this task, each once
    assert stored["base_model_name_or_path"] == recipe["model"]["path"]
    card = (folder / "adapter/README.md").read_text(encoding="utf-8")
    assert "resolvability" in card and "arXiv 2509.21870" in card
    assert not (folder / "adapter/training_args.bin").exists()
    for saved in (folder / "adapter", folder / "checkpoints/checkpoint-12"):
        assert (saved / "tokenizer.json").is_file()
    resolved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert resolved["task"]["labels"] == ["0", "1"]


def test_scores_come_from_the_saved_adapter(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], root: Path
) -> None:
    """evaluation.json equals accuracy computed by hand from the adapter on disk."""
    folder = finetune(write(recipe))
    base = AutoModelForSequenceClassification.from_pretrained(recipe["model"]["path"], num_labels=2).eval()
    model = load_adapter(base, folder / "adapter").eval()
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(recipe["model"]["path"])
    with (root / "tests/data/sst2_sentences_unseen.tsv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[:40]
    correct = 0
    for row in rows:
        with torch.no_grad():
            logits = model(**words(row["sentence"], truncation=True, max_length=32, return_tensors="pt")).logits
        correct += int(logits.argmax()) == int(row["label"])
    assert result(folder, "evaluation.json")["metrics"]["accuracy"]["value"] == pytest.approx(correct / 40)


def write_digits(folder: Path) -> None:
    """Real images of handwritten digits (scikit-learn's), one folder a class."""
    from PIL import Image

    digits = load_digits(n_class=3)
    for i, (image, label) in enumerate(zip(digits.images[:45], digits.target[:45], strict=True)):
        target = folder / f"digit{label}" / f"{i:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).save(target)


def kind_cases(tiny_models: dict[str, Path], root: Path, tmp_path: Path) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Task kind -> (changes to the recipe, metric keys that the evaluation must have)."""
    problems = {"path": str(root / "tests/data/gsm8k_sample.jsonl"), "limit": 12}
    write_digits(tmp_path / "digits")
    scores = tmp_path / "scores.csv"
    scores.write_text(
        "a,b,score\n" + "".join(f"cat {i},dog {i % 5},{i % 7 / 2}\n" for i in range(24)), encoding="utf-8"
    )
    text = {"model.path": str(tiny_models["llama"]), "adapter.target_modules": ["q_proj", "down_proj"]}
    return {
        "causal_lm text": (
            text
            | {
                "task": {"kind": "causal_lm", "columns": {"text": "question"}},
                "data": {"train": problems, "validation": problems, "test": problems},
            },
            ["perplexity"],
        ),
        "causal_lm prompt": (
            text
            | {
                "task": {
                    "kind": "causal_lm",
                    "columns": {"prompt": "Question: {question}\nAnswer: ", "completion": "answer"},
                    "max_new_tokens": 4,
                },
                "data": {"train": problems, "test": problems},
            },
            ["exact_match", "rouge1", "rouge2", "rougeL"],
        ),
        "seq2seq": (
            {
                "model.path": str(tiny_models["t5"]),
                "adapter.target_modules": ["q", "v"],
                "task": {"kind": "seq2seq", "columns": {"source": "question", "target": "answer"}, "max_new_tokens": 4},
                "data": {"train": problems, "validation": problems, "test": problems},
            },
            ["rouge1", "rouge2", "rougeL", "exact_match"],
        ),
        "regression": (
            {
                "task": {"kind": "regression", "columns": {"text": "a", "text_pair": "b", "label": "score"}},
                "data": {"train": str(scores), "validation": str(scores), "test": str(scores)},
            },
            ["pearson", "spearman"],
        ),
        "image_classification": (
            {
                "model.path": str(tiny_models["vit"]),
                "adapter.target_modules": ["q_proj", "v_proj"],
                "task": {"kind": "image_classification"},
                "data": {"train": str(tmp_path / "digits"), "test": str(tmp_path / "digits")},
            },
            ["accuracy", "f1"],
        ),
    }


@pytest.mark.parametrize(
    "kind", ["causal_lm text", "causal_lm prompt", "seq2seq", "regression", "image_classification"]
)
def test_every_task_kind_trains_and_is_scored(
    kind: str,
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    tiny_models: dict[str, Path],
    root: Path,
    tmp_path: Path,
) -> None:
    changes, keys = kind_cases(tiny_models, root, tmp_path)[kind]
    folder = finetune(write(recipe, **changes))
    evaluation = result(folder, "evaluation.json")
    assert list(evaluation["metrics"]) == keys
    for interval in evaluation["metrics"].values():
        assert interval["value"] is None or interval["low"] <= interval["value"] <= interval["high"]
    predictions = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(predictions) == evaluation["counts"]["rows"]
    if "validation" in changes["data"]:
        assert any("eval_loss" in line for line in metrics(folder))
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert any(name.endswith("loran_B") and tensor.abs().max() > 0 for name, tensor in weights.items())


def test_head_and_adapter_have_their_own_rates(
    recipe: dict[str, Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    from curvelora_training.prepare import prepare
    from curvelora_training.run import head_settings
    from curvelora_training.trainer import parameter_groups

    changes = {"training.weight_decay": 0.1, "training.head_learning_rate": 5e-3, "training.head_weight_decay": 0.0}
    loaded = load_recipe(write(recipe, **changes))
    model = prepare(loaded).shapes
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
    decaying = Trainer(model=torch.nn.Linear(1, 1), args=args).get_decay_parameter_names
    groups = parameter_groups(model, args, head_settings(loaded), decaying)
    names = {id(p): n for n, p in model.named_parameters()}
    by_name = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert set(by_name) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, settings in by_name.items():
        assert settings == ((5e-3, 0.0) if "classifier" in name else (1e-3, 0.1)), name


def test_same_seed_same_run(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], tmp_path: Path
) -> None:
    first = finetune(write(recipe), f"output={tmp_path / 'a'}")
    second = finetune(write(recipe), f"output={tmp_path / 'b'}")
    other = finetune(write(recipe), f"output={tmp_path / 'c'}", "seed=1")
    a, b, c = (load_file(f / "adapter/adapter_model.safetensors") for f in (first, second, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


def test_quantised_base_with_validation_in_between_keeps_learning(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path]
) -> None:
    """bitsandbytes may reorder 4-bit weights when they are evaluated on a CPU, and drop every gradient from then on."""
    changes = {
        "model.dtype": "bfloat16",
        "model.quantization": "nf4",
        "adapter": {"method": "qlora", "r": 4, "target_modules": ["query", "value"]},
        "data.validation": recipe["data"]["test"],
        "training.evaluate_every": 2,
    }
    folder = finetune(write(recipe, **changes))
    lines = metrics(folder)
    assert sum("eval_loss" in line for line in lines) == 6
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    moved = {n: t.abs().max().item() for n, t in weights.items() if "lora_B" in n}
    # 12 steps of Adam at 1e-3 with linear decay move an entry by up to 6.5e-3, and the two steps before the first
    # evaluation by less than 2e-3
    assert min(moved.values()) > 3e-3, moved


def test_dry_run_needs_no_weights(
    recipe: dict[str, Any], write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A 70B shape: only its config exists."""
    from transformers import AutoTokenizer, LlamaConfig

    from curvelora_training.finetune import main

    folder = tmp_path / "llama70b"
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(recipe["model"]["path"]).save_pretrained(folder)
    task = {"kind": "causal_lm", "columns": {"text": "sentence"}}
    adapter = {"method": "loran", "r": 64, "target_modules": ["q_proj", "v_proj"]}
    path = write(recipe, **{"model.path": str(folder), "task": task, "adapter": adapter})
    assert main(["--config", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    # 80 layers x 64 x ((8192 + 8192) + (8192 + 1024))
    assert f"trains {80 * 64 * (8192 + 8192 + 8192 + 1024):,} of" in printed
    assert "q_proj.loran_A" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["sequence_classification", "seq2seq", "causal_lm"])
def test_accumulation_equals_one_large_batch(
    kind: str,
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    tiny_models: dict[str, Path],
    root: Path,
    tmp_path: Path,
) -> None:
    """Two batches of four are one batch of eight: same first loss and gradient norm (rows of unequal length for the LM)."""
    text = {"path": str(root / "tests/data/sst2_sentences_train.tsv"), "limit": 8}
    changes = {"adapter.dropout": 0.0, "training.max_steps": 1, "training.learning_rate": 1e-3, "data": {"train": text}}
    if kind != "sequence_classification":
        name, columns, targets = {
            "seq2seq": ("t5", {"source": "sentence", "target": "label"}, ["q", "v"]),
            "causal_lm": ("llama", {"text": "sentence"}, ["q_proj", "v_proj"]),
        }[kind]
        changes |= {"model.path": str(tiny_models[name]), "task": {"kind": kind, "columns": columns}}
        changes |= {"adapter.target_modules": targets, "adapter.init_B_std": 0.02}
    runs = [
        finetune(
            write(recipe, **changes),
            f"output={tmp_path / str(size)}",
            f"training.batch_size={size}",
            f"training.accumulation={8 // size}",
        )
        for size in (8, 4)
    ]
    whole, accumulated = (metrics(folder)[0] for folder in runs)
    assert accumulated["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert accumulated["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_the_base_s_embeddings_are_not_saved_with_an_adapter_on_them(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path]
) -> None:
    """PEFT adds them by default; they are frozen, and placeholders where the base is in shares."""
    recipe["adapter"] = {"method": "lora", "r": 4, "target_modules": ["query", "word_embeddings"]}
    folder = finetune(write(recipe))
    for saved in (folder / "adapter", folder / "checkpoints/checkpoint-12"):
        stored = load_file(saved / "adapter_model.safetensors")
        assert any("lora_embedding_A" in name for name in stored)
        assert not any("base_layer" in name for name in stored)
    base = AutoModelForSequenceClassification.from_pretrained(recipe["model"]["path"], num_labels=2).eval()
    model = load_adapter(base, folder / "adapter")
    trained = [p for n, p in model.named_parameters() if "lora_embedding_B" in n]
    assert trained and all(p.abs().max() > 0 for p in trained)


def test_saving_copies_nothing_of_the_base(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under DeepSpeed transformers' way has every process copy the whole base into host memory, whatever of it is saved."""

    def copying(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers' save_model was called")

    monkeypatch.setattr(Trainer, "save_model", copying)
    folder = finetune(write(recipe))
    for saved in (folder / "adapter", folder / "checkpoints/checkpoint-12"):
        assert load_file(saved / "adapter_model.safetensors")
