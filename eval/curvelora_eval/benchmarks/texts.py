"""What the perplexity tasks share: one long text as one row, counted in lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from curvelora_eval.benchmarks.base import Row
from curvelora_eval.benchmarks.loading import read_text
from curvelora_eval.benchmarks.protocols.perplexity import PerplexityProtocol

PROTOCOLS = {
    "perplexity": PerplexityProtocol(
        description="windows of 2,048 tokens (or the model's limit, where that is lower), half a window apart, over the whole "
        "text; no token is left out"
    )
}


def read(path: Path, split: str) -> list[Row]:
    """The whole file as one text; its id is the split's name."""
    return [Row(split, {"text": read_text(path)}, None)]


def lines(rows: list[Row]) -> int:
    """Lines of all texts."""
    return sum(text.count("\n") + (not text.endswith("\n")) for text in (row.fields["text"] for row in rows))


def first_lines(rows: list[Row], limit: int) -> list[Row]:
    """The first `limit` lines of the one text."""
    (row,) = rows
    pieces = row.fields["text"].split("\n")
    end = "\n" if len(pieces) > limit else ""
    return [replace(row, fields={"text": "\n".join(pieces[:limit]) + end})]
