"""What every protocol has: a name, a version, and a hash over everything that decides a score."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from curvelora.errors import UserError, nearest
from curvelora_eval.scoring import Score
from curvelora_eval.spec import TaskKind


@dataclass(frozen=True)
class Row:
    """One question of a benchmark."""

    id: str
    fields: dict[str, Any]
    answer: str | None
    """What is right; None in an unlabelled split."""


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """How a row becomes a model's input, and the model's output a prediction.

    Two results may stand in one table only where `hash` agrees. A golden test holds the hashes: who changes what `frozen`
    returns raises `version` as well.
    """

    name: str
    version: int = 1
    scores: tuple[Score, ...]
    """What is computed from the records; the first is the primary one."""
    templates: tuple[str, ...] = ("default",)
    """Names of the wordings; the first is the default."""
    kind: TaskKind = field(default="causal_lm")
    """Which model class it needs."""
    description: str = ""

    @abstractmethod
    def settings(self, template: str) -> dict[str, Any]:
        """Everything particular to this protocol that decides a score, as values that JSON can hold."""

    @abstractmethod
    def reference(self, row: Row) -> Any:
        """What a record holds as `reference`."""

    def template(self, name: str | None = None) -> str:
        """`name` checked, or the default.

        Raises:
            UserError: the protocol has no such template.
        """
        if name is None:
            return self.templates[0]
        if name not in self.templates:
            raise UserError(
                f"protocol {self.name} has no template {name!r}{nearest(name, self.templates)}: "
                f"name one of {', '.join(self.templates)}"
            )
        return name

    def frozen(self, template: str | None = None) -> dict[str, Any]:
        """Everything that decides a score, as values that JSON can hold."""
        template = self.template(template)
        return {
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "template": template,
            "scores": [asdict(score) for score in self.scores],
            **self.settings(template),
        }

    def hash(self, template: str | None = None) -> str:
        """SHA-256 of `frozen` as JSON with sorted keys."""
        text = json.dumps(self.frozen(template), sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def check(self, rows: Sequence[Row]) -> None:
        """Find out without a model whether these rows can be scored.

        Raises:
            UserError: rows without an answer, or rows that this protocol cannot read.
        """
        missing = [row.id for row in rows if row.answer is None]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(rows)} rows have no answer (the first is {missing[0]}), so {self.name} has nothing "
                "to compare with: choose a labelled split"
            )
        unreadable = [row for row in rows if not self._has_reference(row)]
        if unreadable:
            raise UserError(
                f"{len(unreadable)} of {len(rows)} rows have an answer that {self.name} cannot compare with (the first: "
                f"{unreadable[0].id} has {unreadable[0].answer!r}): correct these rows"
            )
        self.check_rows(rows)

    def _has_reference(self, row: Row) -> bool:
        try:
            found = self.reference(row)
        except ValueError:
            return False
        return not isinstance(found, float) or math.isfinite(found)

    def check_rows(self, rows: Sequence[Row]) -> None:  # noqa: B027 - most protocols have nothing to add
        """What `check` looks at beyond the answers."""
