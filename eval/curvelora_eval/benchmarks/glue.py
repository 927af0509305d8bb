"""Reading GLUE's tab-separated files, and what its tasks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.benchmarks.base import Benchmark, Row, Rows, Split
from curvelora_eval.benchmarks.loading import read_text
from curvelora_eval.benchmarks.protocols.head import HeadProtocol
from curvelora_eval.scoring import Score

SOURCE = "GLUE (Wang et al. 2018, arXiv 1804.07461, gluebenchmark.com); each corpus under its own terms"
HUB = "nyu-mll/glue"
NO_LABELS = "its labels are not public"
PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
SIMILARITY = (0.0, 5.0)
"""Of STS-B, the one task whose answers are numbers."""
MOST_BROKEN = 1e-3
"""Share of lines that may be left out; of the published QQP it is about one in 100,000."""
ACCURACY = (Score("accuracy"),)
F1 = (Score("f1", options={"labels": [0, 1]}),)


@dataclass(frozen=True)
class Table:
    """How one file is laid out."""

    texts: tuple[str, ...]
    """Columns of the one or two texts."""
    label: str | None = "label"
    """Column of the label; None: there is none."""
    header: tuple[str, ...] | None = None
    """All columns in order, where the first line does not name them."""
    further: bool = False
    """Lines may have further fields behind these (STS-B's original names the sources of some sentences)."""
    skip_broken: bool = False
    """Leave out lines with another number of fields, which GLUE's own QQP has, instead of refusing the file."""

    def read(self, path: Path) -> tuple[list[dict[str, str]], int]:
        """The lines as column -> text, and how many were left out.

        Quotation marks are text, and only a line feed ends a line.

        Raises:
            UserError: a column is missing, or a line has too few or too many fields; with `skip_broken`, too many lines have.
        """
        lines = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
        names = list(self.header) if self.header else lines.pop(0).split("\t")
        needed = (*self.texts, *([self.label] if self.label else []))
        if missing := [column for column in needed if column not in names]:
            raise UserError(
                f"{path} has no column {' and no column '.join(missing)} (columns: {', '.join(names)}): check that it is this "
                "task's file for this split"
            )
        rows = []
        for i, line in enumerate(lines):
            fields = line.split("\t")
            if len(fields) == len(names) or (self.further and len(fields) > len(names)):
                rows.append(dict(zip(names, fields, strict=False)))
            elif not self.skip_broken:
                raise UserError(
                    f"{path}: row {i} has {len(fields)} fields and not {len(names)} ({', '.join(names)}): fields are separated "
                    "by tabs, without quoting"
                )
        left_out = len(lines) - len(rows)
        if left_out > max(1, len(lines) * MOST_BROKEN):
            raise UserError(
                f"{path}: {left_out} of {len(lines)} lines have not {len(names)} fields ({', '.join(names)}), and the published "
                "file has a few such lines at most: copy it again"
            )
        return rows, left_out


def benchmark(
    name: str,
    title: str,
    folder: str,
    splits: Mapping[str, tuple[str, int, bool]],
    table: Table,
    labels: tuple[str, ...] | None,
    metrics: Mapping[str, tuple[Score, ...]],
    *,
    written: Mapping[str, str] | None = None,
    special: Mapping[str, Table] | None = None,
    hub_texts: tuple[str, ...] = PAIR,
    default_split: str = "validation",
    notes: tuple[str, ...] = (),
) -> Benchmark:
    """One task of GLUE.

    Args:
        name: its name here, and of its config on the hub.
        title: one line.
        folder: the folder's name in GLUE's own download; `name` is looked for first.
        splits: name -> (file without ending, published rows, labelled); the hub calls splits the same.
        table: layout of its files.
        labels: class names in the hub's order; None for regression.
        metrics: GLUE's own, name -> scores; the first is the primary one.
        written: what a file says -> class name, where these differ.
        special: layouts of single splits.
        hub_texts: the hub's columns of the texts.
        default_split: what is scored where no split is named.
        notes: what to know before believing a score.
    """
    tables = {split: (special or {}).get(split, table) for split in splits}

    def read(path: Path, split: str) -> Rows:
        layout = tables[split]
        records, left_out = layout.read(path)
        rows = Rows()
        rows.left_out = left_out
        for i, record in enumerate(records):
            value = record[layout.label] if layout.label else None
            rows.append(
                _row(f"{split}-{record.get('index', i)}", record, layout.texts, (written or {}).get(value, value))
            )
        return rows

    protocol = HeadProtocol(
        kind="sequence_classification" if labels else "regression",
        labels=labels,
        pair=len(table.texts) == 2,
        metrics=tuple(metrics),
        scores=tuple(score for group in metrics.values() for score in group),
        description="a head trained with the adapter; GLUE's own metrics",
    )
    return Benchmark(
        name=name,
        kind="classification" if labels else "regression",
        title=title,
        source=SOURCE,
        splits={
            split: Split(_files(name, folder, file, labelled), rows, labelled, split, "" if labelled else NO_LABELS)
            for split, (file, rows, labelled) in splits.items()
        },
        default_split=default_split,
        read=read,
        hub=(HUB, name),
        from_hub=_hub_row(hub_texts, labels),
        answers=labels,
        numbers=None if labels else SIMILARITY,
        protocols={protocol.name: protocol},
        notes=notes,
    )


def _files(name: str, folder: str, file: str, labelled: bool) -> tuple[str, ...]:
    endings = (".tsv",) if labelled else ("_unlabelled.tsv", ".tsv")
    return tuple(f"{place}/{file}{ending}" for place in (name, folder) for ending in endings)


def _row(name: str, record: Mapping[str, Any], texts: Sequence[str], answer: str | None) -> Row:
    return Row(name, dict(zip(("text", "text_pair"), (record[column] for column in texts), strict=False)), answer)


def _hub_row(texts: Sequence[str], labels: Sequence[str] | None) -> Callable[[Mapping[str, Any], str], Row]:
    def from_hub(record: Mapping[str, Any], name: str) -> Row:
        value = record["label"]
        unlabelled = value is None or value < 0  # -1 on the hub
        return _row(name, record, texts, None if unlabelled else labels[value] if labels else str(value))

    return from_hub
