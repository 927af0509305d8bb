"""One thing that is asked of every model: the rows of a named task under one protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.benchmarks import Benchmark, LoadedRows
from curvelora_eval.benchmarks.protocols import GenerateProtocol, HeadProtocol, Protocol
from curvelora_eval.benchmarks.protocols.answers import MetaMathProtocol
from curvelora_eval.benchmarks.quirks import HUNDREDFOLD
from curvelora_eval.evaluation.arms import Arm
from curvelora_eval.evaluation.own_classes import in_own_order, unnamed
from curvelora_eval.spec import TaskSpec

ANYWHERE = "adapter-dropout"  # the quirk that is not about generated text


@dataclass(frozen=True)
class Question:
    """A task, its protocol and its rows.

    Args:
        quirks: defects of the original scripts to reproduce, by name.
        limit: how many rows (lines of a text) were asked for; None for all.
        max_length: where a head's inputs are cut; None takes the adapter's own.
    """

    benchmark: Benchmark
    protocol: Protocol
    template: str
    loaded: LoadedRows
    quirks: tuple[str, ...] = ()
    limit: int | None = None
    max_length: int | None = None

    @property
    def name(self) -> str:
        """Of the results' folder: the task, and what of it is not the default."""
        first = next(iter(self.benchmark.protocols.values()))
        parts = [self.benchmark.name]
        parts += [self.protocol.name] if self.protocol.name != first.name else []
        parts += [self.template] if self.template != self.protocol.templates[0] else []
        return "-".join([*parts, *(["quirks"] if self.quirks else [])])

    def quirks_for(self, arm: Arm) -> tuple[str, ...]:
        """The quirks that can matter for this protocol and model."""
        generates = isinstance(self.protocol, GenerateProtocol)
        matters = {ANYWHERE: arm.folder is not None, HUNDREDFOLD: isinstance(self.protocol, MetaMathProtocol)}
        return tuple(quirk for quirk in self.quirks if matters.get(quirk, generates))

    def rows_hash(self) -> str:
        """SHA-256 over the rows that are asked, in order."""
        rows = [[row.id, row.fields, row.answer] for row in self.loaded.rows]
        return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()

    def task_spec(self, arm: Arm) -> TaskSpec:
        """The task kind that decides the model class, with what the adapter's training says of a head.

        Raises:
            UserError: the adapter was trained as another kind, or for other classes, or the bare model's head has other ones.
        """
        stored = arm.stored[1] if arm.stored else None
        if stored and stored.kind != self.protocol.kind:
            raise UserError(
                f"{arm.folder} was trained as {stored.kind}, and task {self.benchmark.name} with protocol {self.protocol.name} "
                f"needs {self.protocol.kind}: leave one of them out"
            )
        if not isinstance(self.protocol, HeadProtocol):
            return TaskSpec(kind=self.protocol.kind)
        spec = self.protocol.task_spec(self.max_length or (stored.max_length if stored else 256))
        if spec.labels and stored and stored.labels:
            known_by = self._known_by(stored.labels, spec.labels)
            if known_by is None:
                raise UserError(
                    f"{arm.folder} was trained for {len(stored.labels)} classes ({', '.join(stored.labels)}), and "
                    f"{self.benchmark.name} has {len(spec.labels)} ({', '.join(spec.labels)}): leave one of them out, or where "
                    "they are the same classes, name them so in the labels of the adapter's task.json"
                )
            # the head's own order
            named = known_by == "name"
            spec.labels = [name if named else spec.labels[int(name)] for name in stored.labels]
        if arm.classes and spec.labels:
            spec.labels = in_own_order(arm.classes, spec.labels, self.benchmark.name)
        return spec

    def classes(self, arm: Arm) -> dict[str, Any] | None:
        """The head's classes in its own order, and what that order is `known_by`; None where there are none.

        `name`: the head's names are the benchmark's. `number`: they are 0, 1, ..., which only say a place in some order, and the
        benchmark's is taken. `position`: the adapter (or the bare model) names none, as with `number`.
        """
        labels = self.task_spec(arm).labels
        if not labels:
            return None
        stored = arm.stored[1].labels if arm.stored else None
        if stored:
            return {"order": labels, "known_by": self._known_by(stored, labels)}
        return {"order": labels, "known_by": "name" if arm.classes and not unnamed(arm.classes) else "position"}

    @staticmethod
    def _known_by(stored: Sequence[str], labels: Sequence[str]) -> str | None:
        if set(stored) == set(labels):
            return "name"
        return "number" if sorted(stored) == sorted(map(str, range(len(labels)))) else None
