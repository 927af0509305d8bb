"""Schedules of an amplitude or a frequency over a run: a factor on its value, as a function of how far the run has come.

    constant   1
    warmup     from `start` (0) to `end` (1) in a straight line
    anneal     from `start` (1) to `end` (0) in a straight line
    cosine     from `start` (1) to `end` (0) along half a cosine

over the first `steps` optimiser steps, or the first `share` of the run; from there on the factor is `end`. An adapter keeps its
factors in a persistent buffer, so that a saved one is what it was when it was saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvelora.errors import UserError, nearest
from curvelora.layers.dense_delta import DenseDeltaLayer
from curvelora.tuner import check_choice, is_number

ENDS = {"constant": (1.0, 1.0), "warmup": (0.0, 1.0), "anneal": (1.0, 0.0), "cosine": (1.0, 0.0)}
KEYS = ("kind", "start", "end", "steps", "share")


@dataclass(frozen=True)
class Schedule:
    """One schedule.

    Args:
        kind: one of the table above.
        start, end: factors, dimensionless, at least 0.
        steps: its length in optimiser steps, or None.
        share: its length as a share of the run, above 0 and at most 1, or None.
    """

    kind: str
    start: float
    end: float
    steps: int | None = None
    share: float | None = None

    def factor(self, fraction: float, total_steps: int | None = None) -> float:
        """The factor when `fraction` (0 to 1) of a run of `total_steps` is done; a length in steps needs the latter."""
        if self.kind == "constant":
            return 1.0
        if self.steps is not None and total_steps is None:
            raise UserError(
                f"the schedule {self.kind} counts {self.steps} steps: say how many the run has (total_steps)"
            )
        length = self.share if self.share is not None else self.steps / total_steps
        done = min(fraction / length, 1.0)
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        # not start + done (end - start), which at the end may miss it by a rounding
        return (1 - done) * self.start + done * self.end


def read_schedule(name: str, option: Any) -> Schedule | None:
    """The schedule that the option `name` describes, a mapping with the keys `KEYS`; None for none.

    Raises:
        UserError: no mapping, an unknown key or kind, a factor below 0, or not exactly one length that a run can have.
    """
    if option is None:
        return None
    if not isinstance(option, dict) or "kind" not in option:
        raise UserError(f"{name} must be a mapping such as {{kind: warmup, share: 0.1}}, not {option!r}")
    for key in option:
        if key not in KEYS:
            raise UserError(f"{name} has no key {key!r}{nearest(str(key), KEYS)} (known: {', '.join(KEYS)})")
    kind = option["kind"]
    check_choice(f"{name}.kind", kind, tuple(ENDS))
    if kind == "constant":
        if len(option) > 1:
            raise UserError(
                f"{name}: constant has no other key, and {', '.join(k for k in option if k != 'kind')} was given"
            )
        return Schedule(kind, 1.0, 1.0)
    factors = {key: option.get(key, default) for key, default in zip(("start", "end"), ENDS[kind], strict=True)}
    for key, value in factors.items():
        if not is_number(value) or value < 0:
            raise UserError(f"{name}.{key} must be a factor of at least 0, not {value!r}")
    steps, share = option.get("steps"), option.get("share")
    if (steps is None) == (share is None):
        raise UserError(f"{name} needs its length, as either steps or share (of the run): write for example share: 0.1")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise UserError(f"{name}.steps must be a whole number of at least 1, not {steps!r}")
    if share is not None and (not is_number(share) or not 0 < share <= 1):
        raise UserError(f"{name}.share must be above 0 and at most 1, not {share!r}: a longer schedule would never end")
    return Schedule(kind, float(factors["start"]), float(factors["end"]), steps, share)


def set_schedule_position(model: nn.Module, fraction: float, total_steps: int | None = None) -> int:
    """Bring the active adapters of `model` to where their schedules are when `fraction` of the run is done.

    Args:
        model: with adapters, wrapped or not.
        fraction: 0 to 1.
        total_steps: optimiser steps of the run, for schedules that count steps.

    Returns:
        The number of layers that have a schedule.

    Raises:
        UserError: a fraction or a number of steps out of its range, or no `total_steps` where a schedule needs them.
    """
    if total_steps is not None and (
        not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1
    ):
        raise UserError(f"total_steps must be a whole number of at least 1, not {total_steps!r}")
    if not is_number(fraction) or not 0 <= fraction <= 1:
        raise UserError(f"a schedule's position is a fraction of the run, 0 to 1, not {fraction!r}")
    layers = [module for module in model.modules() if isinstance(module, DenseDeltaLayer)]
    return sum(layer.set_schedule_position(fraction, total_steps) for layer in layers)
