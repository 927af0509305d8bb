"""DialogSum: spoken dialogues and their summaries (Chen et al. 2021, arXiv 2105.06762); three summaries a test dialogue."""

from __future__ import annotations

from pathlib import Path

from curvelora_eval.benchmarks import summaries
from curvelora_eval.benchmarks.base import Benchmark, Row, Split

THREE = ("summary1", "summary2", "summary3")


def read(path: Path, split: str) -> list[Row]:
    """JSON lines of fname, dialogue and summary; in the test split summary1 to summary3."""
    if split != "test":
        return [summaries.make_row(name, record) for name, record in summaries.read(path, "fname")]
    rows = []
    for name, record in summaries.read(path, "fname", ("dialogue", *THREE)):
        all_three = [record[column] for column in THREE]
        rows.append(Row(name, {"dialogue": summaries.unix(record["dialogue"]), "summaries": all_three}, all_three[0]))
    return rows


BENCHMARK = Benchmark(
    name="dialogsum",
    kind="summarisation",
    title="DialogSum, spoken dialogues",
    source="arXiv 2105.06762, github.com/cylnlp/dialogsum (CC BY-NC-SA 4.0: non-commercial)",
    splits={
        "train": Split(("dialogsum/dialogsum.train.jsonl", "dialogsum/train.jsonl"), 12460, hub="train"),
        "validation": Split(("dialogsum/dialogsum.dev.jsonl", "dialogsum/dev.jsonl"), 500, hub="validation"),
        "test": Split(
            ("dialogsum/dialogsum.test.jsonl", "dialogsum/test.jsonl"),
            500,
            note="three summaries a dialogue; the hub's copy has a row for each, so it is not read from there",
        ),
    },
    default_split="test",
    read=read,
    hub=("knkarthick/dialogsum", None),
    from_hub=lambda row, name: summaries.make_row(row["id"], row),
    protocols={"rouge": summaries.PROTOCOL},
    notes=(
        "A test row scores the mean of ROUGE over its three summaries, not the best; the authors' baseline scores the first "
        "alone.",
    ),
)
