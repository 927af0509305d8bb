"""Protocol head: a classification or regression head that was trained with the adapter (GLUE, 20 newsgroups)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from curvelora_eval.benchmarks.protocols.base import Protocol, Row
from curvelora_eval.spec import TaskSpec


@dataclass(frozen=True, kw_only=True)
class HeadProtocol(Protocol):
    """Text (or a pair) in; a class, or one number, out of the head."""

    name: str = "head"
    labels: tuple[str, ...] | None = None
    """Class names in the order of their index; None for regression."""
    pair: bool = False
    """Whether the input is two texts."""
    metrics: tuple[str, ...] = ()
    """The task's own metrics, by the names that a recipe takes."""

    def columns(self, row: Row) -> dict[str, Any]:
        """text, text_pair (for pairs) and label, as the existing task kinds read them."""
        label = row.answer if self.labels or row.answer is None else float(row.answer)
        texts = {"text": row.fields["text"]} | ({"text_pair": row.fields["text_pair"]} if self.pair else {})
        return texts | {"label": label}

    def task_spec(self, max_length: int = 256) -> TaskSpec:
        """The settings under which the existing task kinds train and predict these rows."""
        roles = {"text": "text"} | ({"text_pair": "text_pair"} if self.pair else {}) | {"label": "label"}
        return TaskSpec(
            kind=self.kind,
            columns=roles,
            labels=list(self.labels) if self.labels else None,
            max_length=max_length,
            metrics=list(self.metrics) or None,
        )

    def reference(self, row: Row) -> int | float:
        """The index of the class, or the number."""
        return self.labels.index(row.answer) if self.labels else float(row.answer)

    def settings(self, template: str) -> dict[str, Any]:
        return {"labels": list(self.labels) if self.labels else None, "pair": self.pair}
