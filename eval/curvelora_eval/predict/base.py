"""What a predictor is: one protocol's questions to a model, cut into units that can be padded together in any batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from curvelora.errors import UserError

Output = dict[str, Any]
"""What the model said about one unit, as values that JSON can hold."""
# position tables of these begin after the padding token's number
OFFSET = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


class Predictor(ABC):
    """The questions of one protocol about some rows, tokenised.

    A unit is what takes one place in a batch: a prompt, a choice of a row, a window of a text. Rows that are over the model's
    limit have no unit.
    """

    lengths: list[int]
    """Tokens of each unit."""
    over_limit: set[int]
    """Rows (by position) that do not fit into the model."""
    counted: ClassVar[str] = "input"
    """Which tokens a rate counts: `input` or `new`."""
    unit: ClassVar[str] = "row"
    """What a unit is called."""

    @abstractmethod
    def predict(self, model: nn.Module, units: Sequence[int]) -> list[Output]:
        """One output a unit, from one batch; `model` is in eval mode, and autocast is on where it should be."""

    @abstractmethod
    def records(self, outputs: dict[int, Output]) -> list[dict[str, Any]]:
        """A prediction record of every row that is over the limit, or whose units are all in `outputs` (unit -> output); of a
        text, a record a window."""

    @property
    def decoding(self) -> dict[str, Any] | None:
        """How text is generated; None where none is."""
        return None

    def tokens(self, units: Sequence[int], outputs: Sequence[Output]) -> int:
        """How many tokens a batch dealt with."""
        return sum(self.lengths[unit] for unit in units)

    def together(self, unit: int) -> list[int]:
        """The units whose outputs make one answer with that of `unit`."""
        return [unit]

    @abstractmethod
    def differs(self, first: Sequence[Output], second: Sequence[Output]) -> tuple[bool, float | None]:
        """Whether two outputs for the same `together` are different answers, and by how much numbers differ (None for text)."""


def context_limit(config: Any) -> int | None:
    """The most tokens that a model takes at once, by its config; None where it does not say.

    What the tokenizer names as its limit is left out: it is a habit of its authors (256 for MiniLM, whose table has 512).
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_sequence_length")]
    limit = min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
    if limit is not None and getattr(text, "model_type", None) in OFFSET:
        return limit - (text.pad_token_id or 0) - 1
    return limit


def padding_token(tokenizer: Any) -> int:
    """The token that a batch is padded with.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer has no padding token, and no end-of-text or unknown token to take for one, so rows cannot share a "
            "batch: name one as pad_token in its tokenizer_config.json"
        )
    return tokenizer.pad_token_id


def largest_difference(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """The largest absolute difference between two lists of numbers; None where one of them is missing."""
    if None in first or None in second:
        return None
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def finite(value: float) -> float | None:
    """`value`, or None where it is not a number that JSON can hold."""
    return value if math.isfinite(value) else None
