"""Rows from a data folder: layouts, packed files, subsets, and every kind of bad input in one sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.benchmarks import loading

ROWS = [
    {"instruction": f"{i} and 1?", "input": "", "output": f"The answer is {i + 1}.", "answer": str(i + 1)}
    for i in range(3)
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """`write("mrpc/dev.tsv", text)` below a data folder, which it returns."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
        return tmp_path

    return write_file


def load(task: str, folder: Path, split: str | None = None, limit: int | None = None) -> benchmarks.LoadedRows:
    return benchmarks.load(benchmarks.get(task), folder, split, limit)


@pytest.mark.parametrize("task", benchmarks.BENCHMARKS)
def test_every_task_reads_its_sample_and_says_how_much_of_the_set_it_is(task: str, samples: Path) -> None:
    benchmark = benchmarks.get(task)
    loaded = load(task, samples)
    assert loaded.split == benchmark.default_split and loaded.path.startswith(str(samples))
    assert loaded.subset == f"subset {loaded.n} of {benchmark.splits[loaded.split].published}"
    assert len(loaded.sha256) == 64
    ids = [row.id for row in loaded.rows]
    assert len(ids) == len(set(ids))
    for protocol in benchmark.protocols.values():
        protocol.check(loaded.rows)


@pytest.mark.parametrize("name", ["math/AddSub/test.json", "AddSub/test.json"])
def test_both_layouts_are_found(name: str, write: Callable[[str, str], Path]) -> None:
    assert [row.answer for row in load("addsub", write(name, json.dumps(ROWS))).rows] == ["1", "2", "3"]


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed_files_are_read(ending: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = tmp_path / "AddSub" / f"test.json{ending}"
    file.parent.mkdir()
    file.write_bytes(pack(json.dumps(ROWS).encode()))
    assert load("addsub", tmp_path).n == 3
    file.write_bytes(pack(json.dumps(ROWS).encode())[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        load("addsub", tmp_path)


def test_a_packed_file_that_is_damaged_inside_is_said(tmp_path: Path) -> None:
    """The beginning is whole, so that gzip knows the format, and zlib finds the fault."""
    file = tmp_path / "AddSub" / "test.json.gz"
    file.parent.mkdir()
    content = bytearray(gzip.compress(json.dumps(ROWS * 50).encode()))
    content[12:40] = b"\xff" * 28
    file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        load("addsub", tmp_path)


def test_a_file_that_unpacks_to_too_much_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "AddSub" / "test.json.gz"
    file.parent.mkdir()
    file.write_bytes(gzip.compress(b" " * (3 << 20)))
    with pytest.raises(UserError, match="unpacks to more than 1 MiB"):
        loading.read_bytes(file, most=1 << 20)


def test_the_whole_set_is_no_subset(write: Callable[[str, str], Path]) -> None:
    rows = [ROWS[0] | {"instruction": f"question {i}"} for i in range(395)]
    folder = write("AddSub/test.json", json.dumps(rows))
    assert load("addsub", folder).subset is None
    assert load("addsub", folder, limit=394).subset == "subset 394 of 395"


def test_other_names_for_the_validation_split(samples: Path) -> None:
    assert load("mrpc", samples, "dev").split == load("samsum", samples, "val").split == "validation"


def test_gsm8k_in_both_forms(write: Callable[[str, str], Path]) -> None:
    question = {"question": "2 and 1,000?", "answer": "2 + 1000 = <<2+1000=1002>>1,002\n#### 1,002"}
    row = load("gsm8k", write("gsm8k/test.jsonl", json.dumps(question) + "\n")).rows[0]
    assert row.answer == "1002" and row.fields["output"] == "2 + 1000 = 1,002 The answer is 1002."
    (folder := write("gsm8k/test.json", json.dumps(ROWS))).joinpath("gsm8k/test.jsonl").unlink()
    assert load("gsm8k", folder).rows[2].answer == "3"


def test_a_text_is_one_row_counted_in_lines(samples: Path) -> None:
    whole, some = load("wikitext2", samples), load("wikitext2", samples, limit=3)
    assert len(whole.rows) == len(some.rows) == 1 and whole.rows[0].answer is None
    assert some.n == 3 and whole.rows[0].fields["text"].startswith(some.rows[0].fields["text"])
    parts = [load("tiny_shakespeare", samples, split).rows[0].fields["text"] for split in ("train", "validation")]
    assert "".join(parts) == (samples / "tiny-shakespeare/input.txt").read_text()
    assert len(parts[0]) / len("".join(parts)) == pytest.approx(0.9, abs=1e-3)


MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
BAD = {
    "no rows": ("addsub", "AddSub/test.json", "[]", "has no rows"),
    "empty": ("addsub", "AddSub/test.json", " \n", "is empty"),
    "not JSON": ("addsub", "AddSub/test.json", "[{", "neither a JSON list nor JSON lines"),
    "depth": ("addsub", "AddSub/test.json", "[" * 100_000, "is nested too deeply"),
    "not objects": ("addsub", "AddSub/test.json", "[1]", "record 0 is no object"),
    "column": (
        "addsub",
        "AddSub/test.json",
        '[{"question": "a", "answer": "1"}]',
        "no text in instruction, input, output",
    ),
    "no number": (
        "addsub",
        "AddSub/test.json",
        json.dumps([ROWS[0] | {"answer": "one"}]),
        "no number.*test-0 has 'one'",
    ),
    "label": ("boolq", "boolq/test.json", json.dumps([ROWS[0]]), "boolq does not know.*test-0 has '1'.*true, false"),
    "letter": ("aqua", "AQuA/test.json", json.dumps([ROWS[0] | {"answer": "F"}]), "aqua does not know"),
    "duplicates": (
        "samsum",
        "samsum/test.json",
        json.dumps([{"id": "7", "dialogue": "a", "summary": "b"}] * 2),
        "1 ids occur more than once .7.",
    ),
    "mark": ("gsm8k", "gsm8k/test.jsonl", '{"question": "a", "answer": "3"}', "test-0 has no '####'"),
    "solution": (
        "gsm8k",
        "gsm8k/test.jsonl",
        '{"question": "a", "answer": "b #### twelve"}',
        "no number .test-0 has 'twelve'",
    ),
    "infinite": (
        "addsub",
        "AddSub/test.json",
        json.dumps([ROWS[0] | {"answer": "1e999"}]),
        "no number .test-0 has '1e999'",
    ),
    "similarity": (
        "stsb",
        "stsb/dev.tsv",
        "sentence1\tsentence2\tscore\na\tb\tabc\na\tb\t2.5\na\tb\tnan\na\tb\t99\na\tb\t5.000\n",
        "3 rows have an answer that is no number from 0 to 5 .validation-0 has 'abc', validation-2 has 'nan', validation-3 has",
    ),
    "fields": ("mrpc", "mrpc/dev.tsv", f"{MRPC}1\t2\t3\ta\n", "row 0 has 4 fields and not 5"),
    "header": ("mrpc", "mrpc/dev.tsv", "label\ta\tb\n1\ta\tb\n", "no column #1 String"),
    "class": (
        "mrpc",
        "mrpc/dev.tsv",
        f"{MRPC}2\t2\t3\ta\tb\n",
        "validation-0 has '2'.*knows not_equivalent, equivalent",
    ),
    "header only": ("mrpc", "mrpc/dev.tsv", MRPC, "has no rows"),
    "encoding": ("wikitext2", "wikitext-2/test.txt", None, "is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_said_in_one_sentence(case: str, write: Callable[[str, str], Path]) -> None:
    task, name, text, said = BAD[case]
    folder = write(name, text or "x")
    if text is None:
        (folder / name).write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=said) as error:
        load(task, folder)
    assert str(folder) in str(error.value) or "test-0" in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_labels_and_duplicate_ids_are_reported_together(write: Callable[[str, str], Path]) -> None:
    rows = f"{MRPC}1\t2\t3\ta\tb\n3\t2\t3\ta\tb\n"
    assert load("mrpc", write("mrpc/dev.tsv", f"{MRPC}1\t2\t3\ta\tb\n")).n == 1
    with pytest.raises(UserError, match="1 rows have an answer"):
        load("mrpc", write("mrpc/dev.tsv", rows))
    text = "index\tsentence1\tsentence2\tlabel\n4\ta\tb\tentailment\n4\ta\tb\tneither\n"
    with pytest.raises(UserError, match=r"1 ids occur more than once .validation-4.*; 1 rows have an answer"):
        load("rte", write("rte/dev.tsv", text))


def test_missing_splits_files_and_folders(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no split 'tset'; did you mean 'test'\?: name one of its splits \(train, test\)"
    ):
        load("boolq", samples, "tset")
    with pytest.raises(UserError, match=r"no file for its split train below .*splits that are there: test"):
        load("piqa", samples, "train")
    with pytest.raises(UserError, match="is no folder"):
        load("boolq", tmp_path / "nowhere")
    with pytest.raises(UserError, match="limit must be at least 1"):
        load("boolq", samples, limit=0)


def test_problems_of_several_tasks_are_reported_at_once(samples: Path) -> None:
    tasks = [benchmarks.get(name) for name in ("boolq", "piqa", "qqp")]
    with pytest.raises(UserError) as error:
        benchmarks.load_all(tasks, samples, "train")
    assert str(error.value).count("\n") == 0 and "piqa has no file for its split train" in str(error.value)
    with pytest.raises(UserError) as error:
        benchmarks.load_all(tasks, samples, "dev")
    assert str(error.value).count("\n") == 1 and "boolq has no split 'dev'" in str(error.value)
    assert [loaded.n for loaded in benchmarks.load_all(tasks[:2], samples)] == [12, 12]


@pytest.mark.parametrize("task", ["cola", "rte", "qnli"])
def test_an_unlabelled_split_loads_and_cannot_be_scored(task: str, samples: Path) -> None:
    benchmark = benchmarks.get(task)
    loaded = load(task, samples, "test")
    assert not benchmark.splits["test"].labelled and [row.answer for row in loaded.rows] == [None] * 3
    with pytest.raises(UserError, match=r"3 of 3 rows have no answer.*choose a labelled split"):
        benchmark.protocol().check(loaded.rows)


def test_unknown_names_bring_the_nearest() -> None:
    with pytest.raises(UserError, match="no task 'bolq'; did you mean 'boolq'"):
        benchmarks.get("bolq")
    with pytest.raises(UserError, match="no protocol 'loglikelyhood'; did you mean 'loglikelihood'"):
        benchmarks.get("boolq").protocol("loglikelyhood")
    with pytest.raises(UserError, match="no template 'legcy'; did you mean 'legacy'"):
        benchmarks.get("boolq").protocol().prompt(benchmarks.Row("0", {"instruction": ""}, None), "legcy")
    with pytest.raises(UserError, match="commonsense170k is a training set"):
        benchmarks.get("commonsense170k").protocol()


def test_some_of_the_training_files_are_not_the_training_set(samples: Path, tmp_path: Path) -> None:
    """boolq, both parts of ARC and OpenBookQA have 9,427 + 2,251 + 1,119 + 4,957 training rows."""
    assert load("commonsense170k", samples).subset == "subset 12 of 170420"
    (tmp_path / "commonsense").mkdir()
    for folder in (samples / "commonsense").iterdir():
        if folder.is_dir():
            (tmp_path / "commonsense" / folder.name).symlink_to(folder)
    with pytest.raises(UserError) as error:
        load("commonsense170k", tmp_path)
    assert "piqa, siqa, hellaswag, winogrande are missing as well, and the others have 17,754 of its 170,420" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("task", "answer"), [("gsm8k", "twelve"), ("stsb", "inf"), ("rte", "maybe"), ("piqa", "solution9")]
)
def test_an_answer_that_cannot_be_compared_with_is_said_before_any_model_is_loaded(task: str, answer: str) -> None:
    """However the rows came about: here past every check of files."""
    fields = {"instruction": "", "question": "a", "options": ("b", "c"), "text": "a", "text_pair": "b"}
    good = {"gsm8k": "1", "stsb": "2.5", "rte": "entailment", "piqa": "solution1"}[task]
    rows = [benchmarks.Row("test-6", fields, good), benchmarks.Row("test-7", fields, answer)]
    for name, protocol in benchmarks.get(task).protocols.items():
        if (task, name) != ("piqa", "llm-adapters"):  # whose reference is any text
            with pytest.raises(UserError, match=f"1 of 2 rows have an answer that .* test-7 has '{answer}'"):
                protocol.check(rows)
