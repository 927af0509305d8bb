"""Reading GLUE's tab-separated files, and what its tasks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.benchmarks.base import Row, Split
from curvelora_eval.benchmarks.loading import read_text
from curvelora_eval.benchmarks.protocols.head import HeadProtocol
from curvelora_eval.scoring import Score

SOURCE = "GLUE (Wang et al. 2018, arXiv 1804.07461, gluebenchmark.com); each corpus under its own terms"
NO_LABELS = "the labels are not public"
HUB = "nyu-mll/glue"


def read_table(path: Path, columns: Sequence[str], header: bool) -> list[dict[str, str]]:
    """The lines of a .tsv file as column -> text; quotation marks are text, and only a line feed ends a line.

    Args:
        path: the file.
        columns: with a header: the columns needed; without: all columns in their order.
        header: whether the first line names the columns.

    Raises:
        UserError: a column is missing, or a line has too few or too many fields.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
    names = lines.pop(0).split("\t") if header else list(columns)
    if missing := [column for column in columns if column not in names]:
        raise UserError(
            f"{path} has no column {', '.join(missing)} (columns: {', '.join(names)}): check that it is this task's"
        )
    rows = []
    for i, line in enumerate(lines):
        fields = line.split("\t")
        if len(fields) != len(names):
            raise UserError(
                f"{path}: row {i} has {len(fields)} fields and not {len(names)} ({', '.join(names)}): "
                "fields are separated by tabs, without quoting"
            )
        rows.append(dict(zip(names, fields, strict=True)))
    return rows


def split(folders: Sequence[str], name: str, published: int, hub: str | None, labelled: bool = True) -> Split:
    """A split of a GLUE task: `mrpc/dev.tsv`, or `MRPC/dev.tsv` as GLUE packs it."""
    files = [f"{folder}/{name}.tsv" for folder in folders]
    if not labelled:
        files = [f"{folder}/{name}_unlabelled.tsv" for folder in folders] + files
    return Split(tuple(files), published, labelled, hub, "" if labelled else NO_LABELS)


def classification(
    labels: tuple[str, ...], metrics: Mapping[str, tuple[Score, ...]], pair: bool = True
) -> dict[str, HeadProtocol]:
    """Protocol head of a classification task; `metrics` in the order in which GLUE names them."""
    scores = tuple(score for group in metrics.values() for score in group)
    protocol = HeadProtocol(
        kind="sequence_classification", labels=labels, pair=pair, metrics=tuple(metrics), scores=scores
    )
    return {protocol.name: protocol}


ACCURACY = {"accuracy": (Score("accuracy"),)}


def f1(classes: int) -> dict[str, tuple[Score, ...]]:
    """F1 of class 1 where there are two classes, macro F1 of more."""
    return {"f1": (Score("f1", options={"labels": list(range(classes))}),)}


def make_row(
    name: str, record: Mapping[str, Any], texts: Sequence[str], label: str | None, labels: Mapping[str, str] | None
) -> Row:
    """A row of one or two texts; `label` None: unlabelled; `labels` translates what the file says."""
    fields = dict(zip(("text", "text_pair"), (record[column] for column in texts), strict=False))
    return Row(name, fields, label if labels is None or label is None else labels.get(label, label))


def hub_row(texts: Sequence[str], labels: Sequence[str] | None) -> Callable[[Mapping[str, Any], str], Row]:
    """`Benchmark.from_hub` for columns of the hub's GLUE: label -1 means unlabelled."""

    def from_hub(record: Mapping[str, Any], name: str) -> Row:
        value = record["label"]
        known = None if value is None or value < 0 else (labels[value] if labels else str(value))
        return make_row(name, record, texts, known, None)

    return from_hub
