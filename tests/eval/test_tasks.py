"""Predictions and losses of every task kind on tiny models, against one row at a time and against plain PyTorch."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F

from curvelora.errors import UserError
from curvelora_eval.models import load_base, load_processor
from curvelora_eval.scoring import perplexity
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import make_task
from curvelora_eval.tasks.generation import IGNORED

SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal_lm text": ("llama", {"kind": "causal_lm", "columns": {"text": "text"}}),
    "causal_lm prompt": (
        "llama",
        {"kind": "causal_lm", "columns": {"prompt": "{text} =>", "completion": "word"}, "max_new_tokens": 6},
    ),
    "seq2seq": ("t5", {"kind": "seq2seq", "columns": {"source": "text", "target": "word"}, "max_new_tokens": 6}),
    "sequence_classification": ("bert", {"kind": "sequence_classification", "labels": ["0", "1"]}),
    "regression": ("bert", {"kind": "regression"}),
    "image_classification": ("vit", {"kind": "image_classification", "labels": ["0", "1"]}),
}


@pytest.fixture
def build(tiny_models: dict[str, Path]) -> Any:
    """`build("seq2seq", max_length=8)` -> (model, task, processor); a new head is large enough for rows to differ."""

    def make(name: str, **settings: Any) -> tuple[nn.Module, Any, Any]:
        architecture, options = SPECS[name]
        task = make_task(TaskSpec(**{"max_length": 48, **options, **settings}))
        spec = ModelSpec(path=str(tiny_models[architecture]), dtype="float32")
        torch.manual_seed(2)
        model = load_base(spec, task, torch.device("cpu"), trained=["classifier"])
        for parameter in model.parameters():
            # random weights of std 0.02 predict the same of every row; of matrices five times as large they do not
            parameter.data *= 5 if parameter.ndim > 1 else 1
        return model, task, load_processor(spec, task)

    return make


@pytest.fixture(scope="module")
def rows(root: Path) -> Dataset:
    """24 real sentences of many lengths, with a word to predict and a label."""
    with (root / "tests/data/sst2_sentences_unseen.tsv").open(encoding="utf-8") as stream:
        read = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[:24]
    texts = [row["sentence"] for row in read]
    return Dataset.from_dict(
        {"text": texts, "word": [t.split()[0] for t in texts], "label": [int(row["label"]) for row in read]}
    )


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """Real images of handwritten zeros and ones."""
    from datasets import Image as ImageFeature
    from PIL import Image
    from sklearn.datasets import load_digits

    read = load_digits(n_class=2)
    images = [Image.fromarray((image * 15).astype("uint8")) for image in read.images[:12]]
    data = Dataset.from_dict({"image": images, "label": read.target[:12].tolist()})
    return data.cast_column("image", ImageFeature())


def predict(built: tuple[nn.Module, Any, Any], rows: Dataset, batch_size: int) -> list[Any]:
    model, task, processor = built
    return task.predict(model, rows, processor, batch_size).predictions


@pytest.mark.parametrize("name", SPECS)
def test_predictions_do_not_depend_on_the_batch(name: str, build: Any, rows: Dataset, digits: Dataset) -> None:
    rows = digits if name == "image_classification" else rows
    built = build(name)
    single = predict(built, rows, 1)
    assert len(set(map(str, single))) > 1  # a model that says the same of every row would prove nothing
    for size in (5, 64):
        batched = predict(built, rows, size)
        if isinstance(single[0], float):
            assert batched == pytest.approx(single, rel=1e-4, abs=1e-5)
        else:
            assert batched == single


@pytest.mark.parametrize("name", SPECS)
def test_rows_keep_their_order(name: str, build: Any, rows: Dataset, digits: Dataset) -> None:
    """Batches are made by length; turned-round rows must give turned-round predictions and references."""
    rows = digits if name == "image_classification" else rows
    built = build(name)
    backwards = rows.select(range(len(rows) - 1, -1, -1))
    model, task, processor = built
    one, two = (task.predict(model, r, processor, 7) for r in (rows, backwards))
    assert two.references[::-1] == one.references and len(set(map(str, one.references))) > 1
    assert two.predictions[::-1] == (
        pytest.approx(one.predictions, rel=1e-4, abs=1e-5) if isinstance(one.predictions[0], float) else one.predictions
    )


@pytest.mark.parametrize("name", SPECS)
def test_prediction_is_in_eval_mode_whatever_the_model_came_in(
    name: str, build: Any, rows: Dataset, digits: Dataset
) -> None:
    rows = digits if name == "image_classification" else rows
    built = build(name)
    for module in built[0].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    if name == "image_classification":  # which comes without dropout, as llama does
        built[0].classifier = nn.Sequential(nn.Dropout(0.5), built[0].classifier)
    wanted = predict(built, rows, 8)
    built[0].train()
    assert predict(built, rows, 8) == wanted
    assert not built[0].training


def test_perplexity_is_that_of_cross_entropy_by_hand(build: Any, rows: Dataset) -> None:
    model, task, tokenizer = build("causal_lm text")
    losses, counts = [], []
    for text in rows["text"]:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:48]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0]
        losses.append(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item())
        counts.append(len(ids) - 1)
    for batch_size in (1, 8):
        predicted = task.predict(model, rows, tokenizer, batch_size)
        assert predicted.predictions == pytest.approx(losses, rel=1e-5)
        assert predicted.references == counts and predicted.counts["tokens"] == sum(counts)
        found = perplexity(predicted.predictions, predicted.references)
        assert found == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-5)


def test_perplexity_with_learned_positions_does_not_depend_on_the_batch(
    rows: Dataset, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A checkpoint may ask for padding on the left, for generation; positions that count from there would be others."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"], padding_side="left")
    tokenizer.save_pretrained(tmp_path)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128, "initializer_range": 0.5}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    task, spec = make_task(TaskSpec(kind="causal_lm")), ModelSpec(path=str(tmp_path), dtype="float32")
    built = (load_base(spec, task, torch.device("cpu")), task, load_processor(spec, task))
    assert predict(built, rows, 8) == pytest.approx(predict(built, rows, 1), rel=1e-4)


def test_perplexity_that_overflows_is_infinite() -> None:
    assert perplexity([1e6], [1]) == math.inf


@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_the_prompt_is_left_out_of_the_loss(loss_on_prompt: bool, build: Any, rows: Dataset) -> None:
    _, task, tokenizer = build("causal_lm prompt", loss_on_prompt=loss_on_prompt, max_length=400)
    for row, encoded in zip(rows, task.encode(rows, tokenizer), strict=True):
        prompt = tokenizer(f"{row['text']} =>")["input_ids"]
        completion = [*tokenizer(row["word"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert encoded["input_ids"] == prompt + completion
        assert encoded["labels"] == (prompt if loss_on_prompt else [IGNORED] * len(prompt)) + completion


@pytest.mark.parametrize(
    ("room", "prompt", "completion"),
    [
        (9, [1, 2, 3, 4], [5, 6, 7]),
        (7, [1, 2, 3, 4], [5, 6, 7]),
        (5, [3, 4], [5, 6, 7]),
        (3, [], [5, 6, 7]),
        (2, [], [5, 6]),
    ],
)
def test_what_does_not_fit_is_cut_from_the_start_of_the_prompt(
    room: int, prompt: list[int], completion: list[int]
) -> None:
    task = make_task(TaskSpec(kind="causal_lm", columns={"prompt": "p", "completion": "c"}, max_length=room))
    assert task._fit([1, 2, 3, 4], [5, 6, 7]) == (prompt, completion)


@pytest.mark.parametrize("name", ["causal_lm prompt", "seq2seq"])
def test_generation_equals_generate_a_row_at_a_time(name: str, build: Any, rows: Dataset) -> None:
    model, task, tokenizer = build(name)
    # a checkpoint that asks for sampling does not get it
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=7)
    found = task.predict(model, rows, tokenizer, 8)
    wanted = []
    for text in rows["text"]:
        text = f"{text} =>" if name == "causal_lm prompt" else text
        ids = tokenizer(text)["input_ids"]
        ids = torch.tensor([ids[-48:] if name == "causal_lm prompt" else ids[:48]])
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        with torch.no_grad():
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        new = tokens[ids.shape[1] :] if name == "causal_lm prompt" else tokens
        wanted.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert found.predictions == wanted
    assert found.references == rows["word"][:]


@pytest.mark.parametrize("name", ["causal_lm text", "seq2seq", "sequence_classification"])
def test_rows_that_are_cut_are_counted(name: str, build: Any, rows: Dataset) -> None:
    model, task, tokenizer = build(name, max_length=24)
    end = 1 if name == "causal_lm text" else 0  # the end-of-sequence token that a text gets
    lengths = [len(ids) + end for ids in tokenizer(rows["text"][:])["input_ids"]]
    counts = task.predict(model, rows, tokenizer, 8).counts
    assert 0 < counts["at_max_length"] == sum(length >= 24 for length in lengths) < len(rows) == counts["rows"]


# rows' labels, the recipe's labels -> class names, indices
LABELS: dict[str, tuple[list[Any], list[str] | None, list[str], list[int]]] = {
    "whole numbers": ([2, 0, 1], None, ["0", "1", "2"], [2, 0, 1]),
    "numbers with a gap": ([3, 0], None, ["0", "1", "2", "3"], [3, 0]),
    "numbers as text": (["1", "0"], None, ["0", "1"], [1, 0]),
    "words": (["pos", "neg", "pos"], None, ["neg", "pos"], [1, 0, 1]),
    "words in the recipe's order": (["neg", "pos"], ["pos", "neg"], ["pos", "neg"], [1, 0]),
    "indices of named classes": ([0, 1], ["pos", "neg"], ["pos", "neg"], [0, 1]),
    "numbers that are names": ([7, 3], ["3", "7"], ["3", "7"], [1, 0]),
    "truth values": ([True, False], None, ["0", "1"], [1, 0]),
    "words with odd dashes": (["--1", "²"], None, ["--1", "²"], [0, 1]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_become_indices(case: str) -> None:
    values, given, names, indices = LABELS[case]
    data = Dataset.from_dict({"text": ["x"] * len(values), "label": values})
    task = make_task(TaskSpec(kind="sequence_classification", labels=given))
    task.learn_labels(data)
    assert task.spec.labels == names
    assert task.label_indices(data, "rows") == indices
    assert task.model_options()["id2label"] == dict(enumerate(names))


@pytest.mark.parametrize(("value", "part"), [(2, "outside 0..1"), (-1, "outside 0..1"), ("neag", "did you mean 'neg'")])
def test_labels_that_are_none(value: Any, part: str) -> None:
    data = Dataset.from_dict({"text": ["x"], "label": [value]})
    with pytest.raises(UserError, match=f"held-out: row 0 has the label .*{part}"):
        make_task(TaskSpec(kind="sequence_classification", labels=["pos", "neg"])).check(data, "held-out")


def test_tasks_are_plain_data(build: Any) -> None:
    """What a recipe resolves to can be written as JSON; task.json depends on it."""
    import dataclasses

    for name in SPECS:
        assert json.loads(json.dumps(dataclasses.asdict(build(name)[1].spec)))["kind"] == SPECS[name][1]["kind"]
