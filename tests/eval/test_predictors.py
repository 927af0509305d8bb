"""Each predictor against plain code that asks one row at a time, and against itself in batches of other sizes."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from curvelora import cli
from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.benchmarks import Row
from curvelora_eval.benchmarks.protocols import PerplexityProtocol
from curvelora_eval.models import load_processor
from curvelora_eval.predict.base import Predictor, context_limit
from curvelora_eval.predict.batches import plan
from curvelora_eval.predict.choices import Choices, encode_pair
from curvelora_eval.predict.generate import Generate
from curvelora_eval.predict.head import Head
from curvelora_eval.predict.perplexity import Perplexity, windows
from curvelora_eval.predict.run import DoesNotFit, _ask, _mode
from curvelora_eval.scoring import score_records
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import make_task
from named_tasks import QUESTIONS

pytestmark = pytest.mark.usefixtures("offline")
NEW = 8


@pytest.fixture(scope="session")
def boolq(task_data: Path) -> tuple[Any, list[Row]]:
    task = benchmarks.get("boolq")
    return task, benchmarks.load(task, task_data).rows


@pytest.fixture(scope="session")
def short(boolq: Any) -> Any:
    """BoolQ's generative protocol with few new tokens."""
    return dataclasses.replace(boolq[0].protocol("llm-adapters"), max_new_tokens=NEW)


def answers(model: Any, predictor: Predictor, batch_size: int) -> list[dict[str, Any]]:
    found = {}
    for batch in plan(predictor.lengths, batch_size):
        found |= dict(zip(batch, _ask(model, predictor, batch), strict=True))
    return predictor.records(found)


def alone(model: Any, tokenizer: Any, prompt: str, beams: int) -> list[int]:
    """The new tokens of one prompt, without padding, by transformers' own defaults."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=beams,
            max_new_tokens=NEW,
            pad_token_id=tokenizer.pad_token_id,
        )
    return out[0, ids.shape[1] :].tolist()


def loud(architecture: str, vocabulary: int) -> Any:
    """A tiny model with learnt positions, which padding on the left would shift, and answers that depend on the question."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=512),
        "opt": dict(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
            word_embed_proj_dim=32,
            dropout=0.0,
        ),
    }[architecture]
    tokens = dict(vocab_size=vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes, **tokens)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_generation_is_that_of_each_row_alone_at_any_batch_size(
    llama: Any, boolq: Any, short: Any, architecture: str
) -> None:
    tokenizer, rows = llama[1], boolq[1]
    model = llama[0] if architecture == "llama" else loud(architecture, len(tokenizer))
    predictor = Generate(short, "legacy", rows, tokenizer, None)
    found = [alone(model, tokenizer, short.prompt(row, "legacy"), short.num_beams) for row in rows]
    wanted = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    assert len(set(wanted)) > 3 and short.num_beams == 4  # the model listens to what it is asked
    for batch_size in (1, 3, 32):
        records = answers(model, predictor, batch_size)
        assert [record["text"] for record in records] == wanted, batch_size
    assert [record["row"] for record in records] == list(range(len(rows)))
    assert [record["id"] for record in records] == [row.id for row in rows]
    assert [record["reference"] for record in records] == [row.answer for row in rows]


def test_the_checkpoints_generation_config_is_put_aside(
    llama: Any, boolq: Any, short: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    (model, tokenizer), rows = llama, boolq[1][:3]
    predictor = Generate(short, "legacy", rows, tokenizer, None)
    before = answers(model, predictor, 3)
    odd = copy.copy(model)
    odd.generation_config = copy.deepcopy(model.generation_config)
    odd.generation_config.update(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, length_penalty=-3.0, num_beams=2
    )
    assert answers(odd, predictor, 3) == before
    assert odd.generation_config.repetition_penalty == 5.0  # and is there again afterwards
    assert not drawn
    # the quirk lets it in, and what is drawn depends on the seed alone
    quirky = Generate(short, "legacy", rows, tokenizer, None, ["checkpoint-sampling"])
    texts = [[o["text"] for o in _ask(odd, quirky, [0, 1, 2], 1)] for _ in range(2)]
    assert drawn and texts[0] == texts[1] != [record["text"] for record in before]
    assert quirky.decoding["do_sample"] != predictor.decoding["do_sample"] is False


def test_an_end_of_text_ends_a_row_and_others_are_truncated(llama: Any, boolq: Any, short: Any) -> None:
    (model, tokenizer), rows = llama, boolq[1]
    greedy = dataclasses.replace(short, num_beams=1)
    before = answers(model, Generate(greedy, "legacy", rows, tokenizer, None), 4)
    assert all(record["truncated"] and record["new_tokens"] == NEW for record in before)
    ids = alone(model, tokenizer, short.prompt(rows[0], "legacy"), 1)
    odd = copy.copy(model)
    odd.generation_config = copy.deepcopy(model.generation_config)
    odd.generation_config.eos_token_id = [ids[2], 2]  # the third token of the first answer ends a text now
    records = answers(odd, Generate(greedy, "legacy", rows, tokenizer, None), 4)
    assert (records[0]["new_tokens"], records[0]["truncated"]) == (ids.index(ids[2]) + 1, False)
    assert any(record["truncated"] for record in records)
    for old, new in zip(before, records, strict=True):
        assert old["text"].startswith(new["text"])


def test_stop_strings_end_a_text_before_them(llama: Any, boolq: Any, short: Any) -> None:
    (model, tokenizer), rows = llama, boolq[1]
    greedy = dataclasses.replace(short, num_beams=1)
    before = answers(model, Generate(greedy, "legacy", rows, tokenizer, None), 3)
    letters = "".join(record["text"] for record in before)
    stop = max("abcdefghijklmnopqrstuvwxyz", key=letters.count)
    stopping = dataclasses.replace(greedy, stop=(stop,))
    records = answers(model, Generate(stopping, "legacy", rows, tokenizer, None), 3)
    for old, new in zip(before, records, strict=True):
        assert new["text"] == old["text"].split(stop)[0]
        assert new["truncated"] == (stop not in old["text"])
    assert any(record["new_tokens"] < NEW for record in records) and any(record["truncated"] for record in records)


def test_special_tokens_stay_with_the_quirk_and_the_pad_token_changes(llama: Any, boolq: Any, short: Any) -> None:
    tokenizer, rows = llama[1], boolq[1]
    plain = Generate(short, "legacy", rows, tokenizer, None)
    quirky = Generate(short, "legacy", rows, tokenizer, None, ["special-tokens", "pad-id-0"])
    plain._ends = quirky._ends = (2,)
    new = [*tokenizer("true", add_special_tokens=False)["input_ids"], 2, 0, 0]
    assert (plain._read(new)["text"], quirky._read(new)["text"]) == ("true", "true</s>")
    tokenizer = copy.copy(tokenizer)
    tokenizer.pad_token = "</s>"
    pads = [Generate(short, "legacy", rows, tokenizer, None, quirks).pad for quirks in ([], ["pad-id-0"])]
    assert pads == [2, 0]


def test_without_cache_the_text_is_the_same(llama: Any, boolq: Any, short: Any) -> None:
    (model, tokenizer), rows = llama, boolq[1][:2]
    slow = Generate(short, "legacy", rows, tokenizer, None, ["no-cache"])
    calls: list[bool] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: calls.append(k.get("use_cache")), with_kwargs=True)
    try:
        first = answers(model, slow, 2)
    finally:
        hook.remove()
    assert set(calls) == {False}
    assert first == answers(model, Generate(short, "legacy", rows, tokenizer, None), 2)


def test_rows_over_the_limit_are_not_asked_and_never_cut(llama: Any, boolq: Any, short: Any) -> None:
    (model, tokenizer), rows = llama, boolq[1]
    whole = Generate(short, "legacy", rows, tokenizer, None)
    limit = sorted(whole.lengths)[-2] + NEW  # the longest prompt alone does not fit
    predictor = Generate(short, "legacy", rows, tokenizer, limit)
    (over,) = predictor.over_limit
    assert len(predictor.lengths) == len(rows) - 1 and max(predictor.lengths) + NEW == limit
    records = answers(model, predictor, 4)
    assert records[over] == {
        "row": over,
        "id": rows[over].id,
        "prediction": None,
        "reference": rows[over].answer,
        "text": None,
        "new_tokens": 0,
        "truncated": False,
        "over_limit": True,
    }
    assert [r for r in records if r["row"] != over] == [r for r in answers(model, whole, 4) if r["row"] != over]


def log_probability(model: Any, context: list[int], continuation: list[int]) -> float:
    """By the chain rule, from all logits of one sequence in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double()
    return sum(F.log_softmax(logits[len(context) + i - 1], -1)[token].item() for i, token in enumerate(continuation))


def test_choices_are_the_sums_of_log_probabilities(llama: Any, task_data: Path) -> None:
    model, tokenizer = llama
    task = benchmarks.get("piqa")
    protocol, rows = task.protocol("loglikelihood"), benchmarks.load(task, task_data).rows
    predictor = Choices(protocol, "default", rows, tokenizer, None)
    assert len(predictor.lengths) == 2 * len(rows)
    wanted = [[log_probability(model, *encode_pair(tokenizer, *pair)) for pair in protocol.pairs(row)] for row in rows]
    for batch_size in (1, 3, 32):
        for row, (record, scores) in enumerate(zip(answers(model, predictor, batch_size), wanted, strict=True)):
            assert record["scores"] == pytest.approx(scores, rel=1e-4)
            assert record["prediction"] == max((0, 1), key=lambda i: scores[i])
            by_length = [s / len(option) for s, option in zip(scores, rows[row].fields["options"], strict=True)]
            assert record["prediction_norm"] == max((0, 1), key=lambda i: by_length[i])
    assert {record["prediction"] for record in answers(model, predictor, 32)} == {0, 1}


def test_a_row_is_over_the_limit_where_one_choice_is(llama: Any, task_data: Path) -> None:
    model, tokenizer = llama
    task = benchmarks.get("piqa")
    protocol, rows = task.protocol("loglikelihood"), benchmarks.load(task, task_data).rows
    longest = max(Choices(protocol, "default", rows, tokenizer, None).lengths)
    predictor = Choices(protocol, "default", rows, tokenizer, longest - 1)
    (over,) = predictor.over_limit
    assert len(predictor.lengths) == 2 * (len(rows) - 1)
    records = answers(model, predictor, 5)
    assert len(records) == len(rows) and records[over]["over_limit"] is True
    assert records[over]["prediction"] is records[over]["prediction_norm"] is records[over]["scores"] is None
    assert Choices(protocol, "default", rows, tokenizer, longest).over_limit == set()


def test_pairs_are_encoded_as_one_text(llama: Any) -> None:
    tokenizer = llama[1]
    for context, continuation in (("is it", " true"), ("is it ", "true"), ("tr", "ue"), ("", " yes")):
        before, after = encode_pair(tokenizer, context, continuation)
        whole = tokenizer.encode(context + continuation)
        assert (before + after == whole) if context.strip() else (before, after) == ([1], whole)
        assert before and after
    assert encode_pair(tokenizer, "is it ", "true") == encode_pair(tokenizer, "is it", " true")


@pytest.mark.parametrize(("length", "window", "stride"), [(1, 8, 4), (5, 8, 4), (33, 8, 4), (33, 8, 8), (30, 7, 3)])
def test_windows_count_every_token_but_the_first_once(length: int, window: int, stride: int) -> None:
    counted = []
    for begin, first, end in windows(length, window, stride):
        assert begin < first <= end <= length and end - begin <= window
        counted += range(first, end)
    assert counted == list(range(1, length))


@pytest.mark.parametrize("stride", [8, 16])
def test_perplexity_is_that_of_plain_windows(llama: Any, stride: int) -> None:
    model, tokenizer = llama
    rows = [Row("long", {"text": " ".join(QUESTIONS)}, None), Row("short", {"text": QUESTIONS[0]}, None)]
    protocol = PerplexityProtocol(window=16, stride=stride)
    predictor = Perplexity(protocol, "default", rows, tokenizer, None)
    wanted, counts, ids_of = [], [], []
    for row in rows:
        ids = tokenizer(row.fields["text"])["input_ids"]
        counted, number = 1, 0
        for begin in range(0, len(ids), min(stride, 15)):
            end = min(begin + 16, len(ids))
            if counted < end:
                ids_of.append(f"{row.id}/{number}")
                wanted.append(-log_probability(model, ids[begin:counted], ids[counted:end]))
                counts.append(end - counted)
                counted, number = end, number + 1
        assert counted == len(ids)
    for batch_size in (1, 3, 32):
        records = answers(model, predictor, batch_size)
        assert [record["nll"] for record in records] == pytest.approx(wanted, rel=1e-4)
        assert [record["tokens"] for record in records] == counts
        assert [record["id"] for record in records] == ids_of and len(set(ids_of)) == len(ids_of) > 6
        assert [f"{rows[r['row']].id}/{r['window']}" for r in records] == ids_of
    for limit, window in ((12, 12), (4096, 2048), (None, 2048)):
        predictor = Perplexity(PerplexityProtocol(), "default", rows, tokenizer, limit)
        assert predictor.decoding == {"window": window, "stride": window // 2}


def test_the_limit_is_that_of_the_position_table(llama: Any) -> None:
    from transformers import GPT2Config, LongformerConfig, RobertaConfig

    assert context_limit(llama[0].config) == llama[0].config.max_position_embeddings
    assert context_limit(GPT2Config(n_positions=99)) == 99
    assert context_limit(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert context_limit(LongformerConfig(max_position_embeddings=4098, pad_token_id=1)) == 4096
    assert context_limit(object()) is None


@pytest.mark.parametrize("kind", ["data2vec-text", "mpnet", "xlm-roberta", "xlm-roberta-xl"])
def test_the_limit_is_what_the_model_takes(kind: str) -> None:
    """Position tables that begin after the padding token: one token more than the limit is one too many."""
    from transformers import AutoConfig, AutoModel

    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    config = AutoConfig.for_model(kind, max_position_embeddings=20, pad_token_id=1, **sizes)
    model, limit = AutoModel.from_config(config).eval(), context_limit(config)
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


def test_a_tokenizer_without_any_token_to_pad_with_is_refused(
    llama_folder: Path, boolq: Any, short: Any, task_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(llama_folder, tmp_path / "bare"))
    settings = json.loads((copied / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("pad_token", "eos_token", "unk_token"):
        settings.pop(name, None)
    (copied / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_processor(ModelSpec(path=str(copied)), make_task(TaskSpec(kind="causal_lm")))
    with pytest.raises(UserError, match=r"no padding token.*tokenizer_config\.json"):
        Generate(short, "legacy", boolq[1], tokenizer, None)
    given = ["eval", "--model", str(copied), "--data-dir", str(task_data), "--out", str(tmp_path / "out"), "--task"]
    assert cli.main([*given, "boolq"]) == 2 and not list(tmp_path.glob("out/*/*"))
    assert capsys.readouterr().err.count("the tokenizer has no padding token") == 1


def _gpu_is_full(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _computer_is_full(*_: Any) -> Any:
    return torch.empty(1 << 60, dtype=torch.uint8)  # no address space has as much


@pytest.mark.parametrize("full", [_gpu_is_full, _computer_is_full])
def test_a_batch_that_does_not_fit_is_said(llama: Any, boolq: Any, short: Any, full: Any) -> None:
    predictor = Generate(short, "legacy", boolq[1], llama[1], None)
    predictor.predict = full
    with pytest.raises(DoesNotFit, match=r"7 sequences of up to \d+ tokens do not fit.*--batch-size"):
        _ask(llama[0], predictor, range(7))


def test_another_error_of_torch_is_left_alone(llama: Any, boolq: Any, short: Any) -> None:
    predictor = Generate(short, "legacy", boolq[1], llama[1], None)
    predictor.predict = lambda *_: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="size") as error:
        _ask(llama[0], predictor, range(7))
    assert not isinstance(error.value, UserError)


def _head(task: str) -> Head:
    head = Head.__new__(Head)
    head.protocol = benchmarks.get(task).protocol()
    return head


@pytest.mark.parametrize(
    ("predictor", "answers"),
    [
        (Choices.__new__(Choices), [[{"log_probability": x}, {"log_probability": -1.0}] for x in (None, -2.0, -0.5)]),
        (_head("mrpc"), [[{"logits": [x, 0.0]}] for x in (None, 1.0, -1.0)]),
        (_head("stsb"), [[{"logits": [x]}] for x in (None, 1.0, 2.0)]),
        (Perplexity.__new__(Perplexity), [[{"nll": x}] for x in (None, 1.0, 2.0)]),
    ],
    ids=["choices", "classes", "numbers", "perplexity"],
)
def test_no_answer_is_the_same_as_no_answer(predictor: Predictor, answers: list[Any]) -> None:
    nothing, one, other = answers
    assert predictor.differs(nothing, nothing) == (False, None)
    for a, b in ((nothing, one), (one, nothing), (one, other)):
        assert predictor.differs(a, b)[0] is True
    assert predictor.differs(one, one) == (False, 0.0)


def test_dropout_is_off_whatever_mode_the_model_came_in(llama_folder: Path, adapters: dict[str, Path]) -> None:
    """And with the quirk it is on inside the adapter alone."""
    from transformers import AutoModelForCausalLM

    from curvelora.loading import load_adapter

    ids = torch.arange(3, 40)[None]
    for name in ("lora", "loran"):
        model = load_adapter(AutoModelForCausalLM.from_pretrained(llama_folder), adapters[name]).train()

        def logits(quirks: list[str], model: Any = model) -> torch.Tensor:
            with torch.no_grad(), _mode(model, quirks):
                return model(input_ids=ids).logits

        with torch.no_grad():
            still = model.eval()(input_ids=ids).logits
        model.train()
        assert torch.equal(logits([]), still)
        assert not torch.equal(logits(["adapter-dropout"]), logits(["adapter-dropout"]))
        assert torch.equal(logits([]), still)


@pytest.mark.parametrize("protocol", ["metamath", "llm-adapters"])
@pytest.mark.parametrize("quirks", [(), ("metamath-hundredfold",)])
def test_answers_a_hundred_times_off_count_with_the_quirk_alone(protocol: str, quirks: tuple[str, ...]) -> None:
    """MiLoRA's comparison: 1,200 and 12 for 1,200; 12,000 is wrong in any case, and only where its protocol is asked."""
    gsm8k = benchmarks.get("gsm8k")
    chosen = gsm8k.protocol(protocol)
    rows = [Row(str(i), {"instruction": "?"}, "1200") for i in range(5)]
    said = ["12", "120000", "1200", "12000", "none"]

    class Tokenizer:
        pad_token_id = 0

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1] for _ in texts]}

    asked = Generate(chosen, chosen.template(), rows, Tokenizer(), None, quirks)
    outputs = {
        i: {"text": f"The answer is: {text}", "new_tokens": 1, "truncated": False} for i, text in enumerate(said)
    }
    records = asked.records(outputs)
    right = [1200.0, 1200.0] if quirks and protocol == "metamath" else [12.0, 120000.0]
    assert [record["prediction"] for record in records] == [*right, 1200.0, 12000.0, None]
    assert score_records(records, chosen.scores, resamples=20)["accuracy"]["value"] == (
        0.6 if 12.0 not in right else 0.2
    )
