"""The table of bad input: exit code 2, one message that says what is wrong, and every file as it was before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from curvelora import cli
from curvelora_eval import models
from curvelora_training import finetune
from world import WEIGHTS, World, check_message, edited, lacking, pickled, truncated, without

torch.set_num_threads(1)
TSV = "sentence\tlabel\n"
LM = {"kind": "causal_lm", "columns": {"text": "sentence"}}
LLAMA = {"adapter.target_modules": ["q_proj"]}
SEQ2SEQ = ["--task", "seq2seq", "--column", "source=sentence", "--column", "target=sentence"]
CLASSIFY = ["--task", "sequence_classification", "--labels", "0,1", "--column", "text=sentence"]
MODULE = "bert.encoder.layer.0.attention.self.query"

# what is wrong -> (changes to the recipe, what the message must contain)
TRAIN: dict[str, tuple[Callable[[World], dict[str, Any]], list[str]]] = {
    "no training file": (lambda w: {"data.train": w.path("none.tsv")}, ["none.tsv does not exist"]),
    "no test file": (lambda w: {"data.test": w.path("none.tsv")}, ["none.tsv does not exist"]),
    "an empty file": (lambda w: {"data.train": w.file("a.tsv", "")}, ["a.tsv is empty"]),
    "a header and no rows": (lambda w: {"data.train": w.file("a.tsv", TSV)}, ["a.tsv", "no rows"]),
    "an empty folder": (lambda w: {"data.train": str(Path(w.file("d/.hidden", "")).parent)}, ["is an empty folder"]),
    "an unknown ending": (lambda w: {"data.train": w.file("a.xlsx", "x")}, ["'.xlsx'", ".parquet", ".jsonl"]),
    "damaged JSON": (lambda w: {"data.train": w.file("a.jsonl", '{"sentence": "a",\n{')}, ["a.jsonl cannot be read"]),
    "damaged parquet": (lambda w: {"data.train": w.file("a.parquet", "PAR1xx")}, ["a.parquet cannot be read"]),
    "an unknown column": (
        lambda w: {"task.columns": {"text": "sentense"}},
        ["no column 'sentense'", "did you mean 'sentence'", "columns: sentence, label"],
    ),
    "a column that only the test rows lack": (
        lambda w: {"data.test": w.file("a.tsv", "text\tlabel\ngood\t1\n")},
        ["data.test", "no column 'sentence'", "columns: text, label"],
    ),
    "an unknown role": (
        lambda w: {"task.columns": {"txt": "sentence"}},
        ["no role 'txt'", "did you mean 'text'", "text_pair"],
    ),
    "a label outside the range": (
        lambda w: {"data.test": w.file("a.tsv", TSV + "good\t1\nbad\t7\n")},
        ["data.test: row 1 has the label 7", "outside 0..1"],
    ),
    "an unknown label word": (
        lambda w: {"data.train": w.file("a.tsv", TSV + "good\tyess\n"), "task.labels": ["no", "yes"]},
        ["data.train: row 0 has the label 'yess'", "did you mean 'yes'"],
    ),
    "one class only": (
        lambda w: {"data.train": w.file("a.tsv", TSV + "good\t1\nfine\t1\n")},
        ["one class only ('1')", "at least two"],
    ),
    "negative classes": (
        lambda w: {"data.train": w.file("a.tsv", TSV + "good\t-1\nfine\t-2\n")},
        ["labels from -2 to -1", "count from 0", "task.labels"],
    ),
    "an identifier as label": (
        lambda w: {"data.train": w.file("a.tsv", TSV + "good\t3000000000\nfine\t0\n")},
        ["labels from 0 to 3000000000", "below 10,000"],
    ),
    "a row without a label": (
        lambda w: {"data.train": w.file("a.jsonl", '{"sentence": "a", "label": "yes"}\n{"sentence": "b"}\n')},
        ["no label"],
    ),
    "a regression label that is no number": (
        lambda w: {"data.test": w.file("a.tsv", TSV + "good\thigh\n"), "task.kind": "regression"},
        ["data.test: row 0 has the label 'high'", "needs a number"],
    ),
    "rank 0": (lambda w: {"adapter.r": 0}, ["rank must be", "not 0"]),
    "a rank above the layer (loran)": (lambda w: {"adapter.r": 65}, ["65 is above min(d_in, d_out)=64", MODULE]),
    "a rank above the layer (lora)": (
        lambda w: {"adapter": {"method": "lora", "r": 65, "target_modules": ["query"]}},
        ["65 is above min(d_in, d_out)=64", MODULE],
    ),
    "targets that match nothing": (
        lambda w: {"adapter.target_modules": ["qurey"]},
        ["qurey match no module", "did you mean 'query'", "linear modules: query, key, value, dense"],
    ),
    "an unknown activation (ranlora)": (
        lambda w: {"adapter": {"method": "ranlora", "activation": "geluu", "target_modules": ["query"]}},
        ["unknown activation 'geluu'", "did you mean 'gelu'"],
    ),
    "an unknown mode (aurora)": (
        lambda w: {"adapter": {"method": "aurora", "mode": "statik", "target_modules": ["query"]}},
        ["mode must be one of dynamic, static", "did you mean 'static'"],
    ),
    "alpha 0 (qlora)": (
        lambda w: {"adapter": {"method": "qlora", "alpha": 0}, "model.quantization": "nf4"},
        ["alpha must be a positive number, not 0"],
    ),
    "a grid without end": (
        lambda w: {"adapter": {"method": "aurora", "grid_size": 10**9, "target_modules": ["query"]}},
        ["grid_size must be a whole number from 1 to 1000"],
    ),
    "a pattern that matches nothing": (
        lambda w: {"adapter.rank_pattern": {"quary": 2}},
        [
            "adapter.rank_pattern: 'quary' matches nothing that is adapted; did you mean 'query'? (adapted: query, value)"
        ],
    ),
    "an option that the code sets itself": (
        lambda w: {"adapter": {"method": "ranlora", "factors_stored": True, "target_modules": ["query"]}},
        ["factors_stored"],
    ),
    "ranlora on a checkpoint that is quantised itself": (
        lambda w: {
            "adapter": {"method": "ranlora", "target_modules": ["query"]},
            "model.path": w.model("bert", edited("config.json", quantization_config={"load_in_8bit": True})),
        },
        ["starts from the unquantised weights", "adapter.svd_source: dequantised"],
    ),
    "qlora on a plain base": (lambda w: {"adapter": {"method": "qlora", "r": 4}}, ["set model.quantization=nf4"]),
    "linear probing without a head": (
        lambda w: {"adapter": {"method": "linear_probing"}, "task": LM, "model.path": str(w.models["llama"])},
        ["linear_probing trains a new head", "causal_lm has none"],
    ),
    "an unknown metric": (
        lambda w: {"task.metrics": ["acuracy"]},
        ["'acuracy'", "did you mean 'accuracy'", "matthews"],
    ),
    "a metric of another task": (
        lambda w: {"task.metrics": ["perplexity"]},
        ["unknown metric 'perplexity' for task sequence_classification", "accuracy, f1, matthews"],
    ),
    "a metric of text without a completion": (
        lambda w: {"task": LM | {"metrics": ["rouge"]}, "model.path": str(w.models["llama"]), **LLAMA},
        ["rouge compare generated text with a completion", "'prompt' and 'completion'"],
    ),
    "no model": (lambda w: {"model.path": w.path("none")}, ["none holds no model", "config.json"]),
    "a damaged config": (
        lambda w: {"model.path": w.model("bert", truncated("config.json"))},
        ["cannot be found or read"],
    ),
    "pickled weights": (
        lambda w: {"model.path": w.model("bert", pickled("pytorch_model.bin"))},
        ["pickled weights (.bin)", "convert them to safetensors"],
    ),
    "a model without weights": (
        lambda w: {"model.path": w.model("bert", without("*.safetensors"))},
        ["the weights of", "cannot be loaded"],
    ),
    "truncated weights": (
        lambda w: {"model.path": w.model("bert", truncated("model.safetensors"))},
        ["the weights of", "cannot be loaded"],
    ),
    "weights that are missing": (
        lambda w: {"model.path": w.model("bert", lacking("layer.1.attention.self"))},
        ["no weights that fit", "encoder.layer.1.attention.self.key.bias", "and 3 more"],
    ),
    "no tokenizer": (lambda w: {"model.path": w.model("bert", without("tokenizer*"))}, ["no tokenizer"]),
    "a file in place of the output": (lambda w: {"output": w.file("run", "mine")}, ["run is a file", "another folder"]),
    "a file above the output": (lambda w: {"output": w.file("run", "mine") + "/a/b"}, ["run is a file"]),
    "no DeepSpeed JSON": (
        lambda w: {"training.deepspeed": w.path("z.json")},
        ["z.json cannot be read", "No such file"],
    ),
    "an invalid DeepSpeed JSON": (lambda w: {"training.deepspeed": w.file("z.json", "{")}, ["z.json is no valid JSON"]),
    "a DeepSpeed JSON that shards nothing": (
        lambda w: {"training.deepspeed": w.file("z.json", '{"bf16": {}}')},
        ["no zero_optimization section"],
    ),
    "a DeepSpeed JSON that is a number": (
        lambda w: {"training.deepspeed": w.file("z.json", "5")},
        ["no zero_optimization section"],
    ),
    **{
        f"a DeepSpeed JSON with {what}": (
            lambda w, text=text: {"training.deepspeed": w.file("z.json", text)},
            [*said, "z.json"],
        )
        for what, text, said in (
            (
                "a misspelt section",
                '{"zero_optimization": {"stage": 2}, "comms_loger": {}}',
                ["'comms_loger'", "'comms_logger'"],
            ),
            ("a misspelt key", '{"zero_optimization": {"stage": 3, "stag3_x": 1}}', ["zero_optimization.stag3_x"]),
            (
                "a wrong value",
                '{"zero_optimization": {"stage": 3, "overlap_comm": "maybe"}}',
                ["zero_optimization.overlap_comm"],
            ),
            ("no such stage", '{"zero_optimization": {"stage": 4}}', ["ZeRO stage 4", "write 0, 1, 2 or 3"]),
            (
                "an optimiser",
                '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}',
                ["its own optimizer"],
            ),
            (
                "a batch size",
                '{"zero_optimization": {"stage": 2}, "train_batch_size": 8}',
                ["train_batch_size", "auto"],
            ),
            (
                "bf16 weights",
                '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}',
                ["enables bf16", "float32"],
            ),
        )
    },
    "errors of several stages": (
        lambda w: {
            "data.test": w.path("none.tsv"),
            "task.columns": {"text": "sentense"},
            "adapter.target_modules": ["qurey"],
            "output": w.file("run", "mine"),
        },
        ["has 4 errors", "none.tsv does not exist", "'sentense'", "qurey match no module", "run is a file"],
    ),
}

# what is wrong -> (arguments of `curvelora eval`, what the message must contain)
EVAL: dict[str, tuple[Callable[[World], list[str]], list[str]]] = {
    "no rows file": (lambda w: ["--adapter", w.adapter(), "--data", w.path("n.csv")], ["n.csv does not exist"]),
    "an empty file": (lambda w: ["--adapter", w.adapter(), "--data", w.file("a.csv", "")], ["a.csv is empty"]),
    "an unknown column": (
        lambda w: ["--adapter", w.adapter(), "--column", "text=sentense"],
        ["no column 'sentense'", "did you mean 'sentence'"],
    ),
    "a malformed column": (lambda w: ["--adapter", w.adapter(), "--column", "text"], ["ROLE=COLUMN", "'text'"]),
    "an unknown metric": (lambda w: ["--adapter", w.adapter(), "--metrics", "f2"], ["unknown metric 'f2'", "'f1'"]),
    "a batch of nothing": (lambda w: ["--adapter", w.adapter(), "--batch-size", "0"], ["--batch-size", "at least 1"]),
    "a limit of nothing": (lambda w: ["--adapter", w.adapter(), "--limit", "0"], ["--limit", "at least 1"]),
    "neither adapter nor model": (lambda w: [], ["not known", "give --model and --task"]),
    "classes not known": (
        lambda w: ["--model", str(w.models["bert"]), "--task", "sequence_classification"],
        ["class names are not known", "--labels"],
    ),
    "a bare model without the head": (
        lambda w: ["--model", str(w.models["bert"]), *CLASSIFY],
        ["no weights that fit", "classifier.weight"],
    ),
    "no adapter": (lambda w: ["--adapter", w.path("none")], ["none is no folder"]),
    "no adapter config": (lambda w: ["--adapter", w.adapter(damage=without("*config.json"))], ["adapter_config.json"]),
    "a damaged adapter config": (
        lambda w: ["--adapter", w.adapter(damage=truncated("adapter_config.json"))],
        ["adapter_config.json is damaged"],
    ),
    "an unknown method": (
        lambda w: ["--adapter", w.adapter(damage=edited("adapter_config.json", peft_type="LORANN"))],
        ["'LORANN'", "did you mean 'loran'"],
    ),
    "no adapter weights": (
        lambda w: ["--adapter", w.adapter(damage=without(WEIGHTS))],
        ["no adapter weights", WEIGHTS],
    ),
    "truncated adapter weights": (
        lambda w: ["--adapter", w.adapter(damage=truncated(WEIGHTS))],
        [f"{WEIGHTS} is truncated, damaged"],
    ),
    "pickled adapter weights": (
        lambda w: ["--adapter", w.adapter(damage=pickled("adapter_model.bin"))],
        ["pickled weights (adapter_model.bin)", "safetensors"],
    ),
    "a damaged task": (lambda w: ["--adapter", w.adapter(damage=truncated("task.json"))], ["task.json cannot be read"]),
    "an unknown task": (
        lambda w: ["--adapter", w.adapter(damage=edited("task.json", task={"kind": "sorting"}))],
        ["task.json", "sorting"],
    ),
    "an adapter of another model": (
        lambda w: ["--adapter", w.adapter("llama", without("task.json")), "--model", str(w.models["t5"]), *SEQ2SEQ],
        ["does not fit this model", "q_proj", "v_proj"],
    ),
    "an adapter of another size": (
        lambda w: ["--adapter", w.adapter(hidden_size=32)],
        ["belongs to another model", "4 x 32 in the file and 4 x 64 in the model"],
    ),
    "a file in place of the output": (
        lambda w: ["--adapter", w.adapter(), "--out", w.file("scores", "mine")],
        ["scores is a file"],
    ),
    "a file above the output": (
        lambda w: ["--adapter", w.adapter(), "--out", w.file("scores", "mine") + "/a"],
        ["scores is a file"],
    ),
}


@pytest.fixture
def world(tmp_path: Path, tiny_models: dict[str, Path], root: Path) -> World:
    return World(tmp_path, tiny_models, root / "tests/data")


@pytest.mark.parametrize("case", TRAIN)
def test_train(case: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    change, parts = TRAIN[case]
    recipe = world.recipe(change(world))
    before = world.files()
    assert finetune.main(["--config", recipe]) == 2
    check_message(capsys.readouterr().err, parts)
    assert world.files() == before
    assert not Path(world.path("run")).is_dir()


@pytest.mark.parametrize("case", EVAL)
def test_eval(case: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, parts = EVAL[case]
    given = arguments(world)
    before = world.files()
    if case != "a bare model without the head":  # which only its weights tell
        monkeypatch.setattr(models, "_load_weights", lambda *_: pytest.fail("weights were loaded"))
    capsys.readouterr()  # what building the case printed
    assert cli.main(["eval", "--data", world.rows, "--out", world.path("scores"), *given]) == 2
    check_message(capsys.readouterr().err, parts)
    assert world.files() == before


def test_no_recipe(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (cli.main, finetune.main):
        arguments = ["train"] if command is cli.main else []
        assert command([*arguments, "--config", world.path("none.yaml")]) == 2
        check_message(capsys.readouterr().err, ["none.yaml does not exist"])


def test_bad_input_leaves_an_earlier_run_alone(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """--overwrite replaces a run by another one, not by an error."""
    broken = world.recipe({"model.path": world.model("bert", truncated("model.safetensors"))})
    world.file("run/result.json", "{}")
    before = world.files()
    assert finetune.main(["--config", broken, "--overwrite"]) == 2
    check_message(capsys.readouterr().err, ["the weights of"])
    assert world.files() == before


def test_debug_shows_the_traceback(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(["--config", world.recipe({"adapter.r": 65}), "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "in prepare" in error and "65 is above" in error
    assert cli.main(["eval", "--adapter", world.path("none"), "--data", "x", "--out", "y", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "in resolve" in error and "is no folder" in error
