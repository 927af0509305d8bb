"""Task kinds by name."""

from __future__ import annotations

from curvelora_eval.spec import TaskSpec
from curvelora_eval.tasks.base import Predictions, Task
from curvelora_eval.tasks.classification import LabelledTask, Regression, SequenceClassification
from curvelora_eval.tasks.generation import CausalLM, Seq2Seq
from curvelora_eval.tasks.images import ImageClassification

TASKS: dict[str, type[Task]] = {
    "causal_lm": CausalLM,
    "seq2seq": Seq2Seq,
    "sequence_classification": SequenceClassification,
    "regression": Regression,
    "image_classification": ImageClassification,
}


def make_task(spec: TaskSpec) -> Task:
    """Bind the settings to their task kind."""
    return TASKS[spec.kind](spec)


__all__ = ["TASKS", "LabelledTask", "Predictions", "Task", "make_task"]
