"""Protocol loglikelihood: the choice whose text the model finds most probable, as lm-evaluation-harness scores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.benchmarks.protocols.base import Protocol, Row
from curvelora_eval.scoring import Score

PLAIN = Score("accuracy")
# the same after division by the length of the choice
NORMALISED = Score("accuracy", prediction="prediction_norm", keys={"accuracy": "accuracy_norm"})


@dataclass(frozen=True, kw_only=True)
class ChoiceProtocol(Protocol):
    """A (context, continuation) pair a choice; the prediction is the index of the largest sum of log-probabilities.

    Rows hold the fields `question` and `options`.
    """

    name: str = "loglikelihood"
    scores: tuple[Score, ...] = (PLAIN,)
    context: str
    """Text before the choice; `{question}` marks the question's place."""
    answers: tuple[str, ...]
    """The rows' answers in the order of the choices."""
    choices: tuple[str, ...] | None = None
    """Fixed choices; None takes the row's options."""
    blank: str | None = None
    """A mark in the question: the option takes its place, and what follows the mark is scored (partial evaluation)."""

    def pairs(self, row: Row) -> list[tuple[str, str]]:
        """(context, continuation with its leading blank) of every choice, in the order of the choices."""
        question, options = row.fields["question"], self.choices or row.fields["options"]
        if self.blank is None:
            context = self.context.replace("{question}", question, 1)
            return [(context, f" {option}") for option in options]
        before, _, after = question.partition(self.blank)
        return [(before + option, f" {after.strip()}") for option in options]

    def lengths(self, row: Row) -> list[int]:
        """What `prediction_norm` divides by: the characters of each choice without its leading blank."""
        return [len(continuation) - 1 for _, continuation in self.pairs(row)]

    def reference(self, row: Row) -> int:
        """The index of the right choice."""
        return self.answers.index(row.answer)

    def settings(self, template: str) -> dict[str, Any]:
        return {
            "context": self.context,
            "choices": list(self.choices) if self.choices else "the row's options",
            "answers": list(self.answers),
            "blank": self.blank,
            "normalised_by": "characters of the choice",
        }

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Every row's question and options are known, the right one and the mark are there, and each choice has text to score."""
        problems = [(row.id, reason) for row in rows if (reason := self._fault(row))]
        if problems:
            raise UserError(
                f"protocol {self.name} cannot read {len(problems)} of {len(rows)} rows (the first: {problems[0][0]} "
                f"{problems[0][1]}): correct these rows, or use protocol llm-adapters"
            )

    def _fault(self, row: Row) -> str | None:
        if row.fields.get("question") is None:
            return "has an instruction in which question and options cannot be told apart"
        options = self.choices or row.fields["options"]
        if self.reference(row) >= len(options):
            return f"has the answer {row.answer} and only {len(options)} options"
        if self.blank is not None and self.blank not in row.fields["question"]:
            return f"has no {self.blank!r} in its sentence"
        if any(not continuation.strip() for _, continuation in self.pairs(row)):
            where = (
                "an option without text" if self.blank is None else f"nothing after the {self.blank!r} of its sentence"
            )
            return f"has {where}, so there is nothing to score"
        return None
