"""What the perplexity tasks share: one long text as one row, counted in lines."""

from __future__ import annotations

from curvelora_eval.benchmarks.base import Row
from curvelora_eval.benchmarks.protocols.perplexity import PerplexityProtocol

PROTOCOLS = {"perplexity": PerplexityProtocol()}


def lines(rows: list[Row]) -> int:
    """Lines of all texts."""
    return sum(len(row.fields["text"].splitlines()) for row in rows)


def first_lines(rows: list[Row], limit: int) -> list[Row]:
    """The first `limit` lines of the one text."""
    (row,) = rows
    return [Row(row.id, {"text": "".join(row.fields["text"].splitlines(keepends=True)[:limit])}, None)]
