"""HellaSwag: how does it go on (Zellers et al. 2019, arXiv 1905.07830)?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.benchmarks import commonsense
from curvelora_eval.benchmarks.base import Benchmark, Row
from curvelora_eval.benchmarks.llm_adapters import SOURCE, Request, reader
from curvelora_eval.benchmarks.loading import read_text

REQUEST = Request(
    "Please choose the correct ending to complete the given sentence: ",
    word="Ending",
    labels=("ending1", "ending2", "ending3", "ending4"),
)
LINES = 6  # of one question in the text form: context, index of the right ending, four endings


def cleaned(text: str) -> str:
    """Without WikiHow's marks in brackets, as lm-evaluation-harness takes them out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def for_scoring(row: Row, question: str | None = None) -> Row:
    """The row with a question and options that loglikelihood can use; the instruction keeps the marks."""
    if row.fields["question"] is None:
        return row
    parts = {
        "question": cleaned(question or row.fields["question"]),
        "options": tuple(cleaned(option) for option in row.fields["options"]),
    }
    return replace(row, fields=row.fields | parts)


def from_hub(row: Mapping[str, Any], name: str) -> Row:
    """Columns activity_label, ctx, ctx_a, ctx_b, endings, label ("" in the unlabelled test split)."""
    answer = REQUEST.labels[int(row["label"])] if str(row["label"]) else None
    made = REQUEST.row(name, f"{row['activity_label']}: {row['ctx']}", tuple(row["endings"]), answer)
    return for_scoring(made, f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


def read(path: Path, split: str) -> list[Row]:
    """LLM-Adapters' JSON, or the text form with six lines a question."""
    if ".json" in path.suffixes:
        return reader(lambda name, record: for_scoring(REQUEST.parsed(name, record)))(path, split)
    lines = read_text(path).removesuffix("\n").split("\n")
    if len(lines) % LINES:
        raise UserError(f"{path} has {len(lines)} lines, and a question has {LINES} of them: the file is cut off")
    rows = []
    for i in range(0, len(lines), LINES):
        context, index, *endings = (line.removesuffix("\r") for line in lines[i : i + LINES])
        if index not in ("0", "1", "2", "3"):
            raise UserError(
                f"{path}: line {i + 2} should be the index of the right ending, 0 to 3, and is {index[:40]!r}"
            )
        rows.append(for_scoring(REQUEST.row(f"{split}-{i // LINES}", context, endings, REQUEST.labels[int(index)])))
    return rows


BENCHMARK = Benchmark(
    name="hellaswag",
    kind="multiple_choice",
    title="HellaSwag, endings of situations",
    source=f"arXiv 1905.07830 (MIT); files of {SOURCE}",
    splits={
        "train": commonsense.split("hellaswag", "train", 39905, "train"),
        "test": commonsense.split(
            "hellaswag",
            "test",
            10042,
            "validation",
            commonsense.TEST_IS_VALIDATION,
            "commonsense/hellaswag/hellaswag_val_full.txt",
            "hellaswag/hellaswag_val_full.txt",
        ),
    },
    default_split="test",
    read=read,
    hub=("Rowan/hellaswag", None),
    from_hub=from_hub,
    answers=REQUEST.labels,
    protocols=commonsense.protocols(
        REQUEST,
        "{question}",
        description="lm-evaluation-harness's, except that it begins the unfinished sentence with a capital: files do not say "
        "where that sentence starts, so there it stays as it is",
    ),
    notes=(
        "The text form has lost WikiHow's marks ([header], [title], [step]), which LLM-Adapters leaves in its prompts: scores "
        "of protocol llm-adapters on it are close to, but not the same as, those on LLM-Adapters' own file.",
    ),
)
