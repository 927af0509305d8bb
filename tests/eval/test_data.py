"""Rows from every format, offline: the same rows come out, and text stays the text that it was."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from curvelora.errors import UserError
from curvelora_eval.data import FORMATS, columns_of, fingerprint, load_rows, render
from curvelora_eval.spec import DataSpec

# Words that readers of tables like to take for missing values or numbers, quotation marks, a comma and another script
ROWS = [
    {"text": "null", "label": 0},
    {"text": "NA", "label": 1},
    {"text": 'she said "no"', "label": 0},
    {"text": "one, two", "label": 1},
    {"text": "naïve 日本", "label": 0},
]


def delimited(separator: str, quoting: Any) -> bytes:
    stream = io.StringIO()
    kind = {"quoting": quoting, "quotechar": None} if quoting == csv.QUOTE_NONE else {"quoting": quoting}
    writer = csv.DictWriter(stream, ["text", "label"], delimiter=separator, **kind)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def parquet() -> bytes:
    stream = io.BytesIO()
    Dataset.from_list(ROWS).to_parquet(stream)
    return stream.getvalue()


WRITERS: dict[str, Callable[[], bytes]] = {
    ".json": lambda: json.dumps(ROWS).encode(),
    ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".csv": lambda: delimited(",", csv.QUOTE_MINIMAL),
    ".tsv": lambda: delimited("\t", csv.QUOTE_NONE),
    ".parquet": parquet,
}
COMPRESSED = [".json", ".jsonl", ".csv", ".tsv"]


def write(folder: Path, ending: str) -> Path:
    content = WRITERS[ending.removesuffix(".gz")]()
    path = folder / f"rows{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    return path


def load(path: Path | str, **options: Any) -> Dataset:
    return load_rows(DataSpec(path=str(path), **options))


def test_every_format_is_tested() -> None:
    assert set(WRITERS) == set(FORMATS)


@pytest.mark.parametrize("ending", [*WRITERS, *(f"{ending}.gz" for ending in COMPRESSED)])
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    assert load(write(tmp_path, ending)).to_list() == ROWS


def test_bare_quotation_marks_in_real_rows(root: Path) -> None:
    """A reader that takes them for quoting joins lines; the number of rows and the text of each say that none did."""
    path = root / "tests/data/sst2_sentences_train.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    rows = load(path)
    assert len(rows) == len(lines) == 1311
    assert [f"{row['sentence']}\t{row['label']}" for row in rows] == lines


@pytest.mark.parametrize("word", ["null", "NA", "None", "nan", "", "n/a", "#N/A", "-"])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_words_for_nothing_stay_words(word: str, ending: str, tmp_path: Path) -> None:
    separator = "," if ending == ".csv" else "\t"
    path = tmp_path / f"rows{ending}"
    path.write_text(f"text{separator}label\n{word}{separator}yes\n", encoding="utf-8")
    assert load(path).to_list() == [{"text": word, "label": "yes"}]


@pytest.mark.parametrize(("limit", "count"), [(None, 5), (1, 1), (3, 3), (5, 5), (99, 5)])
def test_the_limit_takes_the_first_rows(limit: int | None, count: int, tmp_path: Path) -> None:
    assert load(write(tmp_path, ".jsonl"), limit=limit).to_list() == ROWS[:count]


@pytest.mark.parametrize(("ending", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_a_file_without_header(ending: str, separator: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_text(f"good{separator}1\nbad{separator}0\n", encoding="utf-8")
    found = load(path, column_names=["text", "label"]).to_list()
    assert found == [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """`datasets` caches what it read; a file that was written again must not come back as it was."""
    path = tmp_path / "rows.jsonl"
    for text in ("first", "other"):
        path.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
        assert load(path)["text"][0] == text


def test_folders_saved_by_datasets(tmp_path: Path) -> None:
    plain, split = tmp_path / "plain", tmp_path / "split"
    Dataset.from_list(ROWS).save_to_disk(str(plain))
    DatasetDict({"train": Dataset.from_list(ROWS[:3]), "validation": Dataset.from_list(ROWS[3:])}).save_to_disk(
        str(split)
    )
    assert load(plain).to_list() == ROWS
    assert load(split, split="validation").to_list() == ROWS[3:]
    assert load(split, split="train", limit=2).to_list() == ROWS[:2]
    with pytest.raises(UserError, match="splits train, validation: name one of them as `split`"):
        load(split)
    with pytest.raises(UserError, match="did you mean 'validation'"):
        load(split, split="validaton")


def image_folder(folder: Path) -> Path:
    from PIL import Image

    for label, shade in (("cat", 10), ("dog", 200)):
        (folder / label).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8 + i, 8), shade).save(folder / label / f"{i}.png")
    return folder


def test_an_image_folder_has_the_class_names(tmp_path: Path) -> None:
    rows = load(image_folder(tmp_path / "pets"))
    assert rows.features["label"] == ClassLabel(names=["cat", "dog"])
    assert [(row["label"], row["image"].size, row["image"].getpixel((0, 0))) for row in rows] == [
        (0, (8, 8), 10),
        (0, (9, 8), 10),
        (1, (8, 8), 200),
        (1, (9, 8), 200),
    ]


def test_an_image_folder_with_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        image_folder(tmp_path / "pets" / split)
    (tmp_path / "pets/test/dog/1.png").unlink()
    assert len(load(tmp_path / "pets", split="train")) == 4
    assert len(load(tmp_path / "pets", split="test")) == 3


@pytest.mark.parametrize(
    ("pattern", "used"),
    [("text", ["text"]), ("{text}", ["text"]), ("Q: {text} ({label})\nA:", ["text", "label"]), ("{x}", ["{x}"])],
)
def test_columns_of(pattern: str, used: list[str]) -> None:
    # a column may be called what looks like a template
    available = ["text", "label", "{x}"] if pattern == "{x}" else ["text", "label"]
    assert columns_of(pattern, available) == used


@pytest.mark.parametrize("pattern", ["txet", "{txet}", "{text} and {txet}"])
def test_columns_of_names_the_nearest(pattern: str) -> None:
    with pytest.raises(UserError, match=r"no column 'txet'; did you mean 'text'\? \(columns: text, label\)"):
        columns_of(pattern, ["text", "label"])


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        ("a", "x"),
        ("n", 3),  # a column keeps its type
        ("{a} and {b}", "x and y {a}"),  # what a value holds is not filled in again
        ("{n}{none}!", "3!"),
        ("{a", "{a"),
    ],
)
def test_render(pattern: str, value: Any) -> None:
    assert render(pattern, {"a": "x", "b": "y {a}", "n": 3, "none": None}) == value


def test_the_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "rows.csv"
    file.write_bytes(b"a,b\n")
    assert fingerprint(file) == hashlib.sha256(b"a,b\n").hexdigest()  # what sha256sum prints
    seen = {fingerprint(file)}
    folder = tmp_path / "folder"
    changes: list[Callable[[], Any]] = [
        lambda: file.write_bytes(b"a,c\n"),
        lambda: (folder / "x").mkdir(parents=True),
        lambda: (folder / "x/1").write_bytes(b"3"),
        lambda: (folder / "x/1").write_bytes(b"2"),
        lambda: (folder / "x/1").rename(folder / "1"),
        lambda: (folder / "1").rename(folder / "12"),
        lambda: (folder / "12").write_bytes(b""),  # name and content together are the same letters as before the last
    ]
    for change in changes:
        change()
        seen.add(fingerprint(folder if folder.exists() else file))
    assert len(seen) == 1 + len(changes)
    assert fingerprint("no/such") is None


def test_a_folder_of_files_has_a_split_each(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    (tmp_path / "test.jsonl").write_text('{"a": 3}\n', encoding="utf-8")
    assert load_rows(DataSpec(path=str(tmp_path), split="train"))["a"][:] == [1, 2]
    assert load_rows(DataSpec(path=str(tmp_path), split="test"))["a"][:] == [3]
    with pytest.raises(UserError, match="splits test, train"):
        load_rows(DataSpec(path=str(tmp_path)))


def test_a_missing_text_is_refused_with_its_row(tmp_path: Path) -> None:
    """It would be tokenised as the word None."""
    from curvelora_eval.spec import TaskSpec
    from curvelora_eval.tasks import make_task

    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}\n{"text": null, "label": 1}\n', encoding="utf-8")
    task = make_task(TaskSpec(kind="sequence_classification", labels=["no", "yes"]))
    with pytest.raises(UserError, match="row 1 has no text"):
        task.check(load_rows(DataSpec(path=str(tmp_path / "rows.jsonl"))), "train")


def text_folder(folder: Path) -> Path:
    for name, content in (
        ("sci.med/58", b"first\r\n"),
        ("rec.autos/7", "naïve".encode()),
        ("rec.autos/10", b"na\xefve"),
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def test_a_folder_of_texts_has_the_folders_as_labels(tmp_path: Path) -> None:
    rows = load(text_folder(tmp_path / "texts"))
    assert rows["label"] == ["rec.autos", "rec.autos", "sci.med"]
    assert rows["text"] == ["naïve", "naïve", "first\r\n"]  # Latin-1, UTF-8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("stray", b"x", "stray is elsewhere"), ("rec.autos/8", b"\0\1", "neither a text nor")],
)
def test_a_folder_of_texts_holds_nothing_else(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (text_folder(tmp_path / "texts") / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "texts")


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl")
    assert load(path, rename={"text": "query"}).column_names == ["query", "label"]
    assert load(path, rename={"text": "label", "label": "text"})["label"][0] == "null"
    with pytest.raises(UserError, match=r"no column 'txt'; did you mean 'text'"):
        load(path, rename={"txt": "query"})
    with pytest.raises(UserError, match="cannot give the name 'label', which another column has"):
        load(path, rename={"text": "label"})
