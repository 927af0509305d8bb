"""Protocol perplexity: exp of the mean negative log-likelihood a token, over whole texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from curvelora_eval.benchmarks.protocols.base import Protocol, Row
from curvelora_eval.scoring import Score


@dataclass(frozen=True, kw_only=True)
class PerplexityProtocol(Protocol):
    """Windows slide over each text; every token but the first of a text is predicted exactly once, nothing is cut.

    A window begins `stride` tokens after the last one; of its tokens only those count that no earlier window has counted, so
    that (window - stride) tokens of context stand before each. A record is a window (version 1 recorded whole texts, and
    a benchmark of one text had no spread to speak of).
    """

    name: str = "perplexity"
    version: int = 2
    scores: tuple[Score, ...] = (Score("perplexity", prediction="nll", reference="tokens"),)
    window: int = 2048
    """Tokens a window; a model with a lower limit has its own."""
    stride: int = 1024
    """Tokens between the beginnings of two windows; at most half of the model's own."""

    def text(self, row: Row) -> str:
        """The text whose tokens are predicted."""
        return row.fields["text"]

    def reference(self, row: Row) -> None:
        """There is none: the text itself is predicted."""
        return None

    def check(self, rows: Any) -> None:
        """Texts need no answers."""

    def settings(self, template: str) -> dict[str, Any]:
        return {"window": self.window, "stride": self.stride}
