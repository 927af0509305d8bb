"""What is computed from prediction records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One metric applied to two fields of prediction records."""

    metric: str
    """A name in `curvelora_eval.metrics.METRICS`, or "perplexity"."""
    prediction: str = "prediction"
    reference: str = "reference"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the metric's `compute`."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Metric key -> key in the result."""
