"""How the papers read an answer out of generated text: a label, a number, a letter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from curvelora_eval.benchmarks.protocols.alpaca import RESPONSE, STEP_BY_STEP, TEMPLATES
from curvelora_eval.benchmarks.protocols.base import Row
from curvelora_eval.benchmarks.protocols.generate import GenerateProtocol, Wording
from curvelora_eval.scoring import Score

LABELS = (Score("label_accuracy"),)
NUMBER = r"-?\d+\.?\d*"
AFTER = "The answer is: "
SIGNED = r"[\-+]?\d*[\.,/]?\d+"


def numbers(tolerance: float) -> tuple[Score, ...]:
    """Accuracy of numbers that may differ by `tolerance`."""
    return (Score("numeric_accuracy", options={"tolerance": tolerance}),)


def own_part(text: str) -> str:
    """What the model wrote before it began a further `### Response:` of its own."""
    return text.split(RESPONSE, 1)[0].strip()


@dataclass(frozen=True, kw_only=True)
class LabelProtocol(GenerateProtocol):
    """LLM-Adapters, commonsense: the first label in the text, case-sensitive (commonsense_evaluate.py)."""

    name: str = "llm-adapters"
    scores: tuple[Score, ...] = LABELS
    templates: tuple[str, ...] = tuple(TEMPLATES)
    wordings: Mapping[str, Wording] = None  # type: ignore[assignment]
    max_new_tokens: int = 32
    num_beams: int = 4
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "wordings", self.wordings or TEMPLATES)

    def extract(self, text: str, row: Row) -> str | None:
        found = re.search("|".join(self.labels), own_part(text))
        return found[0] if found else None

    def reference(self, row: Row) -> str | None:
        """The label."""
        return row.answer

    @property
    def extraction(self) -> dict[str, Any]:
        return {"until": RESPONSE, "first": "|".join(self.labels)}


@dataclass(frozen=True, kw_only=True)
class LetterProtocol(LabelProtocol):
    """LLM-Adapters, AQuA: the first capital A to E anywhere in the text, special tokens kept (evaluate.py).

    The rule is the original's, and a weak one: the A of "Answer" or of a name counts as choice A.
    """

    labels: tuple[str, ...] = ("A", "B", "C", "D", "E")
    max_new_tokens: int = 256
    skip_special_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class NumberProtocol(LabelProtocol):
    """LLM-Adapters, arithmetic: the last number after commas are removed, special tokens kept (evaluate.py)."""

    labels: tuple[str, ...] = ()
    scores: tuple[Score, ...] = numbers(1e-3)
    max_new_tokens: int = 256
    skip_special_tokens: bool = False

    def extract(self, text: str, row: Row) -> float | None:
        found = re.findall(NUMBER, own_part(text).replace(",", ""))
        value = float(found[-1]) if found else math.inf
        return value if math.isfinite(value) else None

    def reference(self, row: Row) -> float:
        """The number."""
        return float(row.answer)

    @property
    def extraction(self) -> dict[str, Any]:
        return {"until": RESPONSE, "remove": ",", "last": NUMBER}


@dataclass(frozen=True, kw_only=True)
class MetaMathProtocol(GenerateProtocol):
    """PiSSA and MiLoRA, GSM8K: greedy; the number after the last "The answer is: ", rounded (gsm8k_inference.py).

    The number's pattern is the original's: of 1,234,567 it takes 1,234, and a fraction a/b is divided. The original counts an
    answer a hundred times too large or too small as right as well; here it is wrong, except with the quirk
    `metamath-hundredfold`.
    """

    name: str = "metamath"
    scores: tuple[Score, ...] = numbers(0.0)
    wordings: Mapping[str, Wording] = None  # type: ignore[assignment]
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ("Instruction:", "Instruction", "Response:", "Response")

    def __post_init__(self) -> None:
        object.__setattr__(self, "wordings", self.wordings or {"default": STEP_BY_STEP})

    def extract(self, text: str, row: Row) -> float | None:
        _, said, answer = text.rpartition(AFTER)
        found = re.search(SIGNED, answer.strip()) if said else None
        if not found:
            return None
        above, slash, below = found[0].partition("/")
        try:
            value = float(above.replace(",", ""))
            if slash and float(below):
                value = float(Fraction(int(above), int(below)))
            return float(round(value))
        except (ValueError, OverflowError):
            return None

    def reference(self, row: Row) -> float:
        """The number."""
        return float(row.answer)

    def forgiven(self, found: float | None, row: Row) -> float | None:
        """The right number where `found` is a hundred times too large or too small, otherwise `found`."""
        right = self.reference(row)
        return right if found is not None and (found == 100 * right or 100 * found == right) else found

    def completion(self, row: Row) -> str:
        """The solution, closed by the sentence that `extract` looks for."""
        return f"{row.fields['solution']}\n{AFTER}{row.answer}" if "solution" in row.fields else row.fields["output"]

    @property
    def extraction(self) -> dict[str, Any]:
        return {"after_last": AFTER, "first": SIGNED, "fractions": "divided", "rounded": "to integer"}
