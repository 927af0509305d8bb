"""The hub's columns become the same rows as the files; without network there is one clear sentence. No network is used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from curvelora.errors import UserError
from curvelora_eval import benchmarks

# the columns of the hub's data sets, with the content of the first local row of each task
ROWS: dict[str, dict[str, Any]] = {
    "boolq": {
        "question": "is a lighthouse lamp always lit by electricity",
        "answer": False,
        "passage": "Early lighthouses burnt wood, coal or oil.",
    },
    "siqa": {
        "context": "Tracy didn't go home that evening and resisted Riley's attacks.",
        "question": "What does Tracy need to do before this?",
        "answerA": "make a new plan",
        "answerB": "Go home and see Riley",
        "answerC": "Find somewhere to go",
        "label": "3",
    },
    "piqa": {
        "goal": "How do I ready a guinea pig cage for it's new occupants?",
        "sol1": "Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper strips, you will also "
        "need to supply it with a water bottle and a food dish.",
        "sol2": "Provide the guinea pig with a cage full of a few inches of bedding made of ripped jeans material, you will also "
        "need to supply it with a water bottle and a food dish.",
        "label": 0,
    },
    "winogrande": {
        "sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
        "option1": "Sarah",
        "option2": "Maria",
        "answer": "2",
    },
    "openbookqa": {
        "id": "8-376",
        "question_stem": "A person wants to start saving money so that they can afford a nice vacation at the end of the year. "
        "After looking over their budget and expenses, they decide the best way to save money is to",
        "choices": {
            "text": [
                "make more phone calls",
                "quit eating lunch out",
                "buy less with monopoly money",
                "have lunch with friends",
            ],
            "label": ["A", "B", "C", "D"],
        },
        "answerKey": "B",
    },
    "arc_challenge": {
        "id": "Own_1",
        "question": "Two cups hold the same tea, one with a lid. After ten minutes the tea with the lid is warmer. What is the "
        "best reason?",
        "choices": {
            "text": [
                "The lid makes heat.",
                "The lid keeps warm vapour from leaving.",
                "The lid cools the air.",
                "The lid makes the tea heavier.",
            ],
            "label": ["1", "2", "3", "4"],
        },
        "answerKey": "2",
    },
}


@pytest.mark.parametrize("task", ROWS)
def test_hub_columns_give_the_local_row(task: str, samples: Path) -> None:
    benchmark = benchmarks.get(task)
    local = benchmarks.load(benchmark, samples).rows[0]
    assert benchmark.from_hub(ROWS[task], "test-0") == local


def test_glue_s_columns() -> None:
    row = benchmarks.get("mrpc").from_hub({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, "validation-0")
    assert (row.fields, row.answer) == ({"text": "a", "text_pair": "b"}, "equivalent")
    assert (
        benchmarks.get("mnli").from_hub({"premise": "a", "hypothesis": "b", "label": 2}, "x").answer == "contradiction"
    )
    assert benchmarks.get("stsb").from_hub({"sentence1": "a", "sentence2": "b", "label": 3.5}, "x").answer == "3.5"
    assert benchmarks.get("sst2").from_hub({"sentence": "a", "label": -1}, "x").answer is None


def test_rows_come_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def give(path: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_list([{"question": f"{i}?", "answer": f"x\n#### {i}"} for i in range(4)])

    monkeypatch.setattr(datasets, "load_dataset", give)
    loaded = benchmarks.load(benchmarks.get("gsm8k"), None, "test", limit=3)
    assert asked == [("openai/gsm8k", "main", "test")]
    assert [row.id for row in loaded.rows] == ["test-0", "test-1", "test-2"]
    assert re.fullmatch("fingerprint [0-9a-f]{16}", loaded.hub_version)
    assert loaded.subset == "subset 3 of 1319" and loaded.sha256 is None and loaded.path == "openai/gsm8k (main) test"


@pytest.mark.parametrize(("other", "said"), [("a" * 40, "commit"), ("b" * 40, "fingerprint")])
def test_the_commit_is_kept_where_it_is_known(other: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"question": "1?", "answer": "x\n#### 1"}])
    urls = [f"hf://datasets/openai/gsm8k@{commit}/main/{i}.parquet" for i, commit in enumerate(("a" * 40, other))]
    rows.info.download_checksums = {url: {"num_bytes": 1, "checksum": None} for url in urls}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    found = benchmarks.load(benchmarks.get("gsm8k")).hub_version
    assert found == {"commit": f"commit {other}", "fingerprint": f"fingerprint {rows._fingerprint}"}[said]


def test_a_file_has_its_hash_and_no_version_on_the_hub(samples: Path) -> None:
    loaded = benchmarks.load(benchmarks.get("gsm8k"), samples)
    assert loaded.hub_version is None and len(loaded.sha256) == 64


@pytest.mark.parametrize("offline_is_set", [True, False])
def test_the_real_reason_is_said(offline_is_set: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every failure is about the cache: also offline, a damaged cache or a full disk is what it is."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline_is_set else "0")
    with pytest.raises(UserError, match="No space left on device") as error:
        benchmarks.load(benchmarks.get("boolq"))
    assert ("HF_HUB_OFFLINE is set" in str(error.value)) is offline_is_set


def test_other_columns_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(UserError, match=r"openai/gsm8k \(main\) has other columns than gsm8k needs.*it has text"):
        benchmarks.load(benchmarks.get("gsm8k"))


def test_offline_says_what_to_do() -> None:
    with pytest.raises(UserError) as error:
        benchmarks.load(benchmarks.get("boolq"))
    said = str(error.value)
    assert said.startswith("boolq cannot be had from the hub as google/boolq (Couldn't reach")
    assert said.endswith(
        "; HF_HUB_OFFLINE is set, so only the cache was looked at): give --data-dir with the folder that holds "
        "commonsense/boolq/test.json or boolq/test.json"
    )


@pytest.mark.parametrize(("task", "split"), [("addsub", None), ("dialogsum", "test"), ("newsgroups20", None)])
def test_what_is_not_on_the_hub(task: str, split: str | None) -> None:
    with pytest.raises(UserError, match="is not read from the hub: give --data-dir"):
        benchmarks.load(benchmarks.get(task), None, split)
