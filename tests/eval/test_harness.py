"""lm-evaluation-harness runs our tasks and our adapters, and finds what our own predictor finds."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from curvelora import LoranConfig
from curvelora.errors import UserError
from curvelora_eval.benchmarks import Benchmark, LoadedRows, Row, Split
from curvelora_eval.benchmarks.protocols import ChoiceProtocol
from curvelora_eval.benchmarks.protocols.choices import NORMALISED, PLAIN
from curvelora_eval.harness import command
from curvelora_eval.harness.task_files import document
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
SCRIPTS = [("zqx", "日本語"), ("qjz", "ééé"), ("xkq", "ßßß"), ("vwz", "язы"), ("jqx", "ñññ"), ("zzk", "êôû")]
# by bytes these come out otherwise than by characters
QUESTIONS += [row(f"bytes {i}", "q" * i, [a * 4, b * 2], "A") for i, (a, b) in enumerate(SCRIPTS)]
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


def arguments(*words: str) -> Any:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def boolq(tmp_path: Path) -> Path:
    """A data folder with four rows of boolq in LLM-Adapters' format."""
    folder = tmp_path / "data/commonsense/boolq"
    folder.mkdir(parents=True)
    questions = ["is ice cold", "is the sun a planet", "do cats laugh", "is water wet"]
    opening = "Please answer the following question with true or false, question: "
    rows = [
        {
            "instruction": f"{opening}{question}?\n\nAnswer format: true/false",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for question, answer in zip(questions, ("true", "false", "false", "true"), strict=True)
    ]
    for split in ("test", "train"):
        (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "data"


OWN = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: [no, yes]
doc_to_target: "{{a}}"
metadata: {version: 7}
""".replace("[no, yes]", '["no", "yes"]')


GENERATIVE = """
task: told
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {max_gen_toks: 8, until: ["b b b"]}
metric_list: [{metric: exact_match}]
"""


@needs_lm_eval
@pytest.mark.usefixtures("offline")
def test_the_command_runs_our_tasks_and_the_users_own_on_an_adapter(
    tmp_path: Path, boolq: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    torch.manual_seed(1)
    config = LoranConfig(r=4, alpha=64, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(base, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    own = tmp_path / "own"
    own.mkdir()
    (own / "rows.jsonl").write_text('{"q": "is it", "a": 1}\n{"q": "was it", "a": 0}\n', encoding="utf-8")
    (own / "own.yaml").write_text(OWN.replace("ROWS", str(own / "rows.jsonl")), encoding="utf-8")
    words = ["--model", str(tiny_models["llama"]), "--dtype", "float32", "--task", "boolq", "--data-dir", str(boolq)]
    words += ["--harness-task", "own", "--include", str(own), "--num-fewshot", "1"]
    results = {}
    for name, extra in (("bare", []), ("adapted", ["--adapter", str(tmp_path / "adapter")])):
        out = tmp_path / name
        assert command.run(arguments(*words, *extra, "--out", str(out))) == 0
        results[name] = json.loads((out / "results.json").read_text(encoding="utf-8"))
        assert {p.name for p in (out / "tasks").iterdir()} == {
            *("curvelora_boolq.yaml", "curvelora_boolq.test.jsonl", "curvelora_boolq.fewshot.jsonl")
        }
    printed = capsys.readouterr().out
    assert "curvelora_boolq" in printed and "4 rows, subset 4 of 3270" in printed and "own " in printed
    ours = results["adapted"]["curvelora"]
    assert ours["adapter"]["sha256"] and results["bare"]["curvelora"]["adapter"] is None
    assert ours["tasks"]["curvelora_boolq"]["protocol"]["hash"] and ours["versions"]["torch"] == torch.__version__
    assert results["bare"]["versions"]["own"] == 7 and results["bare"]["n-shot"]["curvelora_boolq"] == 1
    samples = [json.loads(line) for line in (tmp_path / "adapted/samples_curvelora_boolq.jsonl").open(encoding="utf-8")]
    context = samples[0]["arguments"][0][0]
    assert context.endswith("Question: is ice cold?\nAnswer:") and context.count("Question:") == 2
    scores = {
        name: [
            json.loads(line)["filtered_resps"]
            for line in (tmp_path / name / "samples_curvelora_boolq.jsonl").open(encoding="utf-8")
        ]
        for name in results
    }
    assert scores["bare"] != scores["adapted"], "the adapter must be in what lm-eval runs"


@needs_lm_eval
def test_what_the_model_cannot_hold_is_counted(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    from curvelora_eval.harness import run as harness
    from curvelora_eval.harness.model import AdaptedModel
    from curvelora_eval.harness.task_files import write_task

    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], max_position_embeddings=64)
    wrapped = AdaptedModel(model, AutoTokenizer.from_pretrained(tiny_models["llama"]), 4, {})
    write_task(tmp_path, PLAINLY, {"test": LoadedRows(QUESTIONS, "test", "here", None, len(QUESTIONS), 9)})
    harness.evaluate(wrapped, ["curvelora_plainly"], harness.find_tasks(["curvelora_plainly"], [tmp_path]))
    assert wrapped.cut == len(QUESTIONS[-1].fields["options"])  # the long row, once a choice


@needs_lm_eval
def test_prompts_to_generate_from_are_counted_where_they_are_cut(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from curvelora_eval.harness import run as harness
    from curvelora_eval.harness.model import AdaptedModel

    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], max_position_embeddings=64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    room = 64 - 8  # for the prompt
    words = tokenizer(" a" * 200)["input_ids"]
    prompts = [tokenizer.decode(words[:n]) for n in (3, room - 1, room, room + 1, 90, 5)]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert sorted(lengths)[-3:] == [room, room + 1, 90]
    lines = "".join(json.dumps({"q": prompt, "a": "b"}) + "\n" for prompt in prompts)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "told.yaml").write_text(GENERATIVE.replace("ROWS", str(tmp_path / "rows.jsonl")), encoding="utf-8")
    shown: list[torch.Tensor] = []
    generate = AdaptedModel._model_generate
    keep = lambda self, context, **options: shown.append(context) or generate(self, context, **options)  # noqa: E731
    monkeypatch.setattr(AdaptedModel, "_model_generate", keep)
    wrapped = AdaptedModel(model, tokenizer, 4, {})
    harness.evaluate(wrapped, ["told"], harness.find_tasks(["told"], [tmp_path]))
    assert wrapped.cut == 2  # shorter rows of their batch are padded to the same width, and are whole
    assert [tuple(context.shape) for context in shown] == [(4, room), (2, 5)]
    assert shown[0][0].tolist() == tokenizer(prompts[4])["input_ids"][-room:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name ours with --task"),
        (["--task", "boolq", "--limit", "0"], "--limit must be at least 1"),
        (["--task", "boolk"], "did you mean 'boolq'"),
        (["--task", "gsm8k"], "gsm8k has no loglikelihood protocol"),
        (["--task", "boolq"], "the base model is not known"),
        (["--harness-task", "own", "--include", "nowhere"], "nowhere is no folder"),
    ],
)
def test_bad_arguments(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=said):
        command.run(arguments("--out", str(tmp_path / "out"), *words))
    assert not (tmp_path / "out").exists()


def test_without_lm_eval_the_command_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install lm-eval==") as caught:
        command.run(arguments("--out", str(tmp_path), "--task", "boolq"))
    pins = (Path(__file__).resolve().parents[2] / "requirements-lm-eval.txt").read_text(encoding="utf-8")
    assert str(caught.value).rpartition("==")[2] in pins  # the version that is tested here


def test_choices_that_no_task_file_can_hold() -> None:
    class Both(ChoiceProtocol):
        def pairs(self, row: Row) -> list[tuple[str, str]]:
            return [("a", " b"), ("c", " d")]

    class Joined(ChoiceProtocol):
        def pairs(self, row: Row) -> list[tuple[str, str]]:
            return [("a", "b"), ("a", " c")]

    for protocol, said in ((Both, "differ in context and in ending"), (Joined, "does not begin with a space")):
        with pytest.raises(UserError, match=said):
            document(protocol(context="", answers=LETTERS), QUESTIONS[0])
