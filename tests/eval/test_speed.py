"""The papers' loop and our engine, timed side by side: the same answers, and numbers that fit together."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.predict.generate import Generate
from curvelora_eval.speed import command
from curvelora_eval.speed.measure import measure
from curvelora_eval.speed.table import markdown


def arguments(*words: str) -> Any:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_the_loop_and_the_engine_answer_alike(
    tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data/commonsense/boolq"
    data.mkdir(parents=True)
    opening = "Please answer the following question with true or false, question: "
    rows = [
        {
            "instruction": f"{opening}is {'very ' * i}cold?\n\nAnswer format: true/false",
            "input": "",
            "output": "the correct answer is true",
            "answer": "true",
        }
        for i in range(6)
    ]
    (data / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    out = tmp_path / "speed.json"
    words = ["--model", str(tiny_models["llama"]), "--dtype", "float32", "--task", "boolq", "--template", "clean"]
    words += ["--data-dir", str(tmp_path / "data"), "--rows", "5", "--original-rows", "3", "--batch-sizes", "2,8"]
    assert command.run(arguments(*words, "--out", str(out))) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    (task,) = record["tasks"]
    original, engines = task["original"], task["engine"]
    assert original["rows"] == 3 and original["use_cache"] and [one["batch_size"] for one in engines] == [2, 8]
    assert task["decoding"] == {"num_beams": 4, "max_new_tokens": 32}
    assert task["rows"]["subset"] == "subset 5 of 3270"
    for one in (original, *engines):
        assert one["rows_per_second"] == pytest.approx(one["rows"] / one["seconds"])
        assert one["new_tokens_per_second"] > 0 and one["peak_memory_bytes"] is None
    for one in engines:
        assert one["rows"] == 5 and one["compared"] == one["same_answer"] == one["same_text"] == 3
        assert one["ratio"] == pytest.approx(one["rows_per_second"] / original["rows_per_second"])
    assert record["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert markdown([record]) in printed and printed.count("| boolq (clean) |") == 3
    assert command.run(arguments("--table", str(out), str(out))) == 0
    assert capsys.readouterr().out.count("| boolq (clean) |") == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x.json"], "--task is missing"),
        (["--task", "boolq"], "--out is missing"),
        (["--task", "boolq", "--out", "x.json", "--batch-sizes", "8,-1"], "--batch-sizes takes whole numbers"),
        (["--task", "boolq", "--out", "x.json", "--original-rows", "0"], "--original-rows must be at least 1"),
        (["--task", "samsum", "--out", "x.json"], "samsum has no protocol 'llm-adapters'"),
        (["--table", "none.json"], "none.json cannot be read as a speed file"),
    ],
)
def test_bad_arguments(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        command.run(arguments(*words))


@pytest.mark.usefixtures("offline")
def test_a_batch_that_does_not_fit_keeps_no_other_from_being_timed(
    llama: Any, task_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Generate.predict

    def predict(self: Generate, model: Any, units: Any) -> Any:
        if len(units) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ask(self, model, units)

    monkeypatch.setattr(Generate, "predict", predict)
    boolq = benchmarks.get("boolq")
    protocol = dataclasses.replace(boolq.protocol("llm-adapters"), max_new_tokens=2)
    rows = benchmarks.load(boolq, task_data, limit=4)
    found = measure(*llama, boolq, rows, protocol, "clean", original_rows=2, batch_sizes=[4, 2])["engine"]
    assert found[0] == {"batch_size": 4, "out_of_memory": True}
    assert (found[1]["batch_size"], found[1]["rows"]) == (2, 4)


def test_a_batch_that_does_not_fit_is_a_line_of_the_table() -> None:
    task = {"task": "boolq", "protocol": {"template": "clean"}, "engine": [{"batch_size": 512, "out_of_memory": True}]}
    task["original"] = {"rows": 2, "rows_per_second": 1.0, "new_tokens_per_second": 9.0, "peak_memory_bytes": 2e9}
    record = {"model": {"path": "m", "dtype": "bfloat16"}, "adapter": None, "commit": "c", "tasks": [task]}
    record |= {"versions": {"torch": "1", "transformers": "2"}, "hardware": {"gpu": "H100"}}
    lines = markdown([record]).splitlines()
    assert "| boolq (clean) | engine | 512 | out of memory |" in lines[5]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
