"""Reading and writing the LLM-Adapters format: a JSON list of instruction, input, output, answer.

A commonsense instruction is one sentence of request, the question, the options in words, and a line that names the labels:
`Request` writes it from its parts and reads the parts back out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.benchmarks.base import Row
from curvelora_eval.benchmarks.loading import read_text

COLUMNS = ("instruction", "input", "output", "answer")
NUMBERED = ("answer1", "answer2", "answer3", "answer4", "answer5")
SOURCE = "LLM-Adapters (arXiv 2304.01933, github.com/AGI-Edgerunners/LLM-Adapters; repository Apache-2.0, data ODC-By)"


@dataclass(frozen=True)
class Request:
    """The fixed parts of a task's instructions."""

    opening: str
    """The sentence before the question, with its last blank."""
    word: str = ""
    """What numbers the options: Answer gives `Answer1: ...`; empty where there are none."""
    labels: tuple[str, ...] = ()
    """All labels that the task knows; a row with fewer options names the first so many."""
    between: str = " "
    before_labels: str = "\n\n"

    def write(self, question: str, options: Sequence[str]) -> str:
        """The instruction for a question and its options."""
        numbered = self.between.join(f"{self.word}{i}: {option}" for i, option in enumerate(options, 1))
        labels = self.labels[: len(options)] if options else self.labels
        body = f"{question}\n\n{numbered}{self.before_labels}" if options else f"{question}\n\n"
        return f"{self.opening}{body}Answer format: {'/'.join(labels)}"

    def read(self, instruction: str) -> tuple[str, tuple[str, ...]] | None:
        """(question, options) such that `write` gives the same instruction; None where there are none.

        An option is taken to end where the next one's number stands, so an option may not hold that itself.
        """
        body, _, labels = instruction.rpartition("Answer format: ")
        count = labels.count("/") + 1
        if not body.startswith(self.opening) or labels != "/".join(self.labels[:count]):
            return None
        body = body.removeprefix(self.opening)
        if not self.word:
            return (body.removesuffix("\n\n"), ()) if body.endswith("\n\n") else None
        numbered = re.escape(self.between).join(rf"{self.word}{i}: (.*?)" for i in range(1, count + 1))
        found = re.fullmatch(rf"(.*?)\n\n{numbered}{re.escape(self.before_labels)}", body, re.DOTALL)
        return (found[1], found.groups()[1:]) if found else None

    def row(self, name: str, question: str, options: Sequence[str], answer: str | None) -> Row:
        """A row made from parts, as from the hub."""
        return self._row(name, self.write(question, options), answer, answer_text(answer), question, tuple(options))

    def parsed(self, name: str, record: Mapping[str, Any]) -> Row:
        """A row made from a record of a file; question and options are None where they cannot be told apart."""
        question, options = self.read(record["instruction"]) or (None, None)
        return self._row(name, record["instruction"], record["answer"], record["output"], question, options)

    @staticmethod
    def _row(name: str, instruction: str, answer: Any, output: str, question: Any, options: Any) -> Row:
        fields = {"instruction": instruction, "output": output, "question": question, "options": options}
        return Row(name, fields, answer)


def answer_text(answer: str | None) -> str:
    """What LLM-Adapters' commonsense sets teach a model to answer."""
    return f"the correct answer is {answer}"


def read_records(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, Any]]:
    """The records of a JSON list, or of JSON lines; each has all of `columns`, as text.

    Raises:
        UserError: not JSON, not a list of objects, or a record without a column.
    """
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be this task's records: copy it again") from error
    except ValueError as error:
        raise UserError(f"{path} is neither a JSON list nor JSON lines ({error}): copy it again") from error
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(
                f"{path}: record {i} is no object: a list of objects with {', '.join(columns)} was expected"
            )
        if missing := [column for column in columns if not isinstance(record.get(column), str)]:
            raise UserError(
                f"{path}: record {i} has no text in {', '.join(missing)} (it has {', '.join(record) or 'nothing'}): "
                f"this task's records have {', '.join(columns)}"
            )
    return records


def reader(
    make: Callable[[str, Mapping[str, Any]], Row], columns: Sequence[str] = COLUMNS
) -> Callable[[Path, str], list[Row]]:
    """A `Benchmark.read` that makes one row of each record; ids are `<split>-<n>`, counted from 0."""

    def read(path: Path, split: str) -> list[Row]:
        return [make(f"{split}-{i}", record) for i, record in enumerate(read_records(path, columns))]

    return read
