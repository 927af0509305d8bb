"""What the two dialogue summarisation tasks share: the prompt, ROUGE, and reading their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvelora_eval.benchmarks.base import Row
from curvelora_eval.benchmarks.llm_adapters import read_records
from curvelora_eval.benchmarks.protocols.generate import GenerateProtocol, Wording
from curvelora_eval.scoring import Score

# the wording of this project's SAMSum recipes; the papers do not give theirs
PLAIN = Wording(
    asked="Summarise the dialogue.\n\n{instruction}\n\nSummary:",
    trained="Summarise the dialogue.\n\n{instruction}\n\nSummary:",
)


@dataclass(frozen=True, kw_only=True)
class RougeProtocol(GenerateProtocol):
    """Greedy; the whole text is the summary."""

    name: str = "rouge"
    scores: tuple[Score, ...] = (Score("rouge", options={"use_stemmer": True, "over_references": "mean"}),)
    max_new_tokens: int = 128

    def instruction(self, row: Row) -> str:
        return row.fields["dialogue"]

    def completion(self, row: Row) -> str:
        return f" {row.answer}"

    def extract(self, text: str, row: Row) -> str:
        return text.strip()

    def reference(self, row: Row) -> str | list[str]:
        """The summary, or all of them where a dialogue has several."""
        return row.fields.get("summaries") or row.answer

    @property
    def extraction(self) -> dict[str, Any]:
        return {"text": "whole", "strip": True}


PROTOCOL = RougeProtocol(
    wordings={"default": PLAIN},
    description="greedy, 128 new tokens, ROUGE-1, 2 and L of Porter stems; the prompt is this project's own",
)


def unix(text: str) -> str:
    """With line feeds alone, whatever the copy ends its lines with."""
    return text.replace("\r\n", "\n")


def make_row(name: str, record: Mapping[str, Any]) -> Row:
    """A dialogue with one summary."""
    return Row(name, {"dialogue": unix(record["dialogue"])}, record["summary"])


def read(path: Path, key: str, columns: Sequence[str] = ("dialogue", "summary")) -> list[tuple[str, dict[str, Any]]]:
    """(the source's own id, record) of a file."""
    return [(record[key], record) for record in read_records(path, (key, *columns))]
