"""lm-evaluation-harness runs our tasks and our adapters, and finds what our own predictor finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from curvelora_eval.benchmarks import Benchmark, LoadedRows, Row, Split
from curvelora_eval.benchmarks.protocols import ChoiceProtocol
from curvelora_eval.benchmarks.protocols.choices import NORMALISED, PLAIN
from curvelora_eval.predict.batches import plan
from curvelora_eval.predict.choices import Choices

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
LETTERS = ("A", "B", "C", "D", "E")


def benchmark(name: str, **protocol: Any) -> Benchmark:
    """A benchmark of no file, whose rows are given."""
    choose = ChoiceProtocol(answers=LETTERS, **protocol)
    split = {"test": Split(("none.json",), 9)}
    return Benchmark(name, "multiple_choice", name, "here", split, "test", lambda *_: [], {"loglikelihood": choose})


def row(name: str, question: str, options: list[str], answer: str) -> Row:
    return Row(name, {"question": question, "options": tuple(options)}, answer)


PLAINLY = benchmark("plainly", context="Question: {question}\nAnswer:", scores=(PLAIN, NORMALISED))
QUESTIONS = [
    row("three", "what is good", ["a film", "the long and tedious way home", "art"], "B"),
    row("five", "who laughs", ["no", "nobody at all", "the director's friends", "we", "you and you"], "A"),
    row("accents", "où est le café — naïve?", ["là-bas", "café", "ici, à côté", "日本"], "C"),
    row("blanks", "an end with blanks  ", ["one ", "two  words ", " three"], "A"),
    row("alike", "the same twice", ["fine", "fine", "finer"], "A"),
    row("braces", "{{7 * 7}} and [brackets] {% x %}", ["{0}", "['a', 'b']", "12"], "C"),
    row("long", "a film that " * 40, ["works", "does not work"], "B"),
]
# without anything before the choice, and a context that ends in blanks
BARELY = benchmark("barely", context="{question}", scores=(PLAIN, NORMALISED))
STARTS = [
    row("blank end", "the film is  ", ["good", "bad and long"], "A"),
    row("number", "7", ["8", "9 or 10"], "B"),
]
PARTLY = benchmark("partly", context="{question}", blank="_")
SENTENCES = [
    row("middle", "The film moved the critic, so _ was praised by everyone .", ["the film", "the critic"], "A"),
    row("first", "_ laughed at the other's jokes, which were bad.", ["Robert", "The very old man"], "B"),
    row("mark", "He gave it to _, who ate it.", ["his cat", "me"], "A"),
    row("digits", "_ is more than 3", ["4", "12"], "A"),
]
CASES = [(PLAINLY, QUESTIONS), (BARELY, STARTS), (PARTLY, SENTENCES)]


@pytest.fixture(scope="module")
def spread_llama(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """The tiny Llama with louder weights, whose choices differ by more than rounding, and a tokenizer that begins with <s>."""
    folder = tmp_path_factory.mktemp("spread") / "llama"
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == tokenizer.bos_token_id
    return folder


@needs_lm_eval
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["llama", "spread"])
def test_our_loglikelihood_protocol_agrees_with_lm_eval(
    name: str, tmp_path: Path, tiny_models: dict[str, Path], spread_llama: Path
) -> None:
    from curvelora_eval.harness import run as harness
    from curvelora_eval.harness.model import AdaptedModel
    from curvelora_eval.harness.task_files import task_name, write_task

    folder = spread_llama if name == "spread" else tiny_models["llama"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for one, rows in CASES:
        write_task(tmp_path, one, {"test": LoadedRows(rows, "test", "here", None, len(rows), 9)})
    names = [task_name(one) for one, _ in CASES]
    wrapped = AdaptedModel(model, tokenizer, 3, {})
    results = harness.evaluate(wrapped, names, harness.find_tasks(names, [tmp_path]))

    compared = 0
    for one, rows in CASES:
        ours = Choices(one.protocols["loglikelihood"], "default", rows, tokenizer, limit=None)
        outputs: dict[int, Any] = {}
        for units in plan(ours.lengths, 5):
            with torch.inference_mode():
                outputs |= zip(units, ours.predict(model, units), strict=True)
        records = ours.records(outputs)
        samples = sorted(results["samples"][task_name(one)], key=lambda sample: sample["doc_id"])
        assert len(records) == len(samples) == len(rows)
        for record, sample, said in zip(records, samples, rows, strict=True):
            theirs = [score for score, _ in sample["filtered_resps"]]
            assert record["id"] == sample["doc"]["id"] == said.id
            assert [tuple(pair) for pair in sample["arguments"]] == one.protocols["loglikelihood"].pairs(said)
            assert record["scores"] == pytest.approx(theirs, abs=1e-5, rel=1e-6)
            assert sample["acc"] == (record["prediction"] == record["reference"])
            if "acc_norm" in sample:
                assert sample["acc_norm"] == (record["prediction_norm"] == record["reference"])
                compared += 1
        accuracy = sum(r["prediction"] == r["reference"] for r in records) / len(records)
        assert results["results"][task_name(one)]["acc,none"] == pytest.approx(accuracy)
    assert compared == len(QUESTIONS) + len(STARTS)
