"""What the eight commonsense tasks share: where their files lie, and their two protocols."""

from __future__ import annotations

from curvelora_eval.benchmarks.base import Split
from curvelora_eval.benchmarks.llm_adapters import Request
from curvelora_eval.benchmarks.protocols.answers import LabelProtocol
from curvelora_eval.benchmarks.protocols.base import Protocol
from curvelora_eval.benchmarks.protocols.choices import NORMALISED, PLAIN, ChoiceProtocol

QUESTION = "Question: {question}\nAnswer:"
TEST_IS_VALIDATION = "what LLM-Adapters calls test is the published validation split"


def split(folder: str, name: str, published: int, hub: str | None, note: str = "", *more: str) -> Split:
    """A split in LLM-Adapters' own layout, or below commonsense/."""
    files = (f"commonsense/{folder}/{name}.json", f"{folder}/{name}.json", *more)
    return Split(files, published, hub=hub, note=note)


def protocols(
    request: Request,
    context: str,
    *,
    choices: dict[str, str] | None = None,
    blank: str | None = None,
    normalised: bool = True,
    labels: tuple[str, ...] | None = None,
    description: str = "",
) -> dict[str, Protocol]:
    """llm-adapters and loglikelihood of one task.

    Args:
        request: its instructions.
        context: its context in lm-evaluation-harness.
        choices: label -> fixed choice, in the order of lm-evaluation-harness.
        blank: the mark that an option replaces.
        normalised: whether lm-evaluation-harness reports acc_norm for this task.
        labels: what the generated text is searched for; None takes the request's labels.
        description: what is particular about loglikelihood here.
    """
    generate = LabelProtocol(
        labels=labels or request.labels,
        description="LLM-Adapters' commonsense_evaluate.py: 4 beams, 32 new tokens, the first label in the text",
    )
    choose = ChoiceProtocol(
        context=context,
        answers=tuple(choices) if choices else request.labels,
        choices=tuple(choices.values()) if choices else None,
        blank=blank,
        scores=(PLAIN, NORMALISED) if normalised else (PLAIN,),
        description=description or "the prompt of lm-evaluation-harness, no examples",
    )
    return {generate.name: generate, choose.name: choose}
