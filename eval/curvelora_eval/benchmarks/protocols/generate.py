"""Generative protocols: prompt, deterministic decoding, and an answer read out of the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curvelora_eval.benchmarks.protocols.base import Protocol, Row

PLACE = "{instruction}"


@dataclass(frozen=True)
class Wording:
    """The text around an instruction; `{instruction}` marks its place.

    What a model is trained on may differ from what it is asked (LLM-Adapters); the completion follows without a break.
    """

    asked: str
    trained: str

    def prompt(self, instruction: str) -> str:
        """The prompt for evaluation."""
        return self.asked.replace(PLACE, instruction, 1)

    def training_prompt(self, instruction: str) -> str:
        """The prompt of a training row."""
        return self.trained.replace(PLACE, instruction, 1)


@dataclass(frozen=True, kw_only=True)
class GenerateProtocol(Protocol):
    """Text in, text out; decoding never samples (do_sample=False)."""

    wordings: Mapping[str, Wording]
    """Template name -> wording."""
    max_new_tokens: int
    num_beams: int = 1
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text before the answer is read."""

    def instruction(self, row: Row) -> str:
        """What stands at the wording's place."""
        return row.fields["instruction"]

    def completion(self, row: Row) -> str:
        """What a model learns to answer in training; follows the training prompt without a break."""
        return row.fields["output"]

    def prompt(self, row: Row, template: str | None = None) -> str:
        """The whole text that the model continues."""
        return self.wordings[self.template(template)].prompt(self.instruction(row))

    def training_text(self, row: Row, template: str | None = None) -> tuple[str, str]:
        """(prompt, completion) of a training row, without the end-of-sequence token."""
        return self.wordings[self.template(template)].training_prompt(self.instruction(row)), self.completion(row)

    @abstractmethod
    def extract(self, text: str, row: Row) -> str | float | None:
        """The prediction in the generated text (without the prompt); None where there is none."""

    @property
    @abstractmethod
    def extraction(self) -> dict[str, Any]:
        """How the answer is read, as values that JSON can hold."""

    def settings(self, template: str) -> dict[str, Any]:
        return {
            "prompt": self.wordings[template].asked,
            "decoding": {
                "do_sample": False,
                "num_beams": self.num_beams,
                "max_new_tokens": self.max_new_tokens,
                "stop": list(self.stop),
            },
            "skip_special_tokens": self.skip_special_tokens,
            "extraction": self.extraction,
        }
