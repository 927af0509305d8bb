"""The timing harness: arms take turns, so that what drifts (clocks, heat, neighbours) meets all of them alike.

A round gives every arm, in an order that is rotated from round to round, its untimed steps and then its timed ones. A ratio is
taken within a round, and its interval is over rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from curvelora_eval.lab.statistics import paired_ratio, summarise
from curvelora_training.bench.devices import Device
from curvelora_training.garbage import uncollected

ENERGY_SECONDS = 0.5  # the driver's counter is too coarse for shorter turns


class Timed(Protocol):
    """What takes a turn."""

    def enter(self) -> None:
        """Come onto the device."""

    def run(self) -> dict[str, float]:
        """One step: seconds of its phases, and `step`, their sum."""

    def leave(self) -> None:
        """Make room for the next one."""


@dataclass(frozen=True)
class Rounds:
    """How often to measure.

    Args:
        rounds: turns of every arm.
        steps: timed steps a turn.
        warmup: untimed steps at the beginning of a turn, which begins with an empty cache of memory; twice as many in the first.
    """

    rounds: int = 5
    steps: int = 3
    warmup: int = 2


@dataclass
class Timings:
    """Seconds of every timed step of one arm, by phase, with the medians of its turns, and the peaks of memory."""

    phases: dict[str, list[float]] = field(default_factory=dict)
    turns: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    clocks: list[dict[str, Any]] = field(default_factory=list)
    allocated: int | None = None
    reserved: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """SUMMARY of each phase and of the step, memory peaks in bytes, energy a step in joules, and the raw step times."""
        phases = {name: summarise(values) for name, values in self.phases.items() if name != "step"}
        step, turns = summarise(self.phases["step"]), summarise(self.turns)
        return {
            # steps of one turn are not independent of each other, turns are
            "step_seconds": step | {"low": turns["low"], "high": turns["high"]},
            "phases": phases,
            "peak_allocated_bytes": self.allocated,
            "peak_reserved_bytes": self.reserved,
            "joules_per_step": statistics.median(self.joules) if self.joules else None,
            "clocks": self.clocks or None,
            "raw_step_seconds": [round(s, 7) for s in self.phases["step"]],
        }


def interleave(
    arms: Mapping[str, Timed], rounds: Rounds, device: Device, say: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, Timings]]:
    """Give every arm its turns; after each round, yields what each arm took so far, by name, so that it can be written down.

    Args:
        say: is told of progress, a line a round.
    """
    timings = {name: Timings() for name in arms}
    order = list(arms)
    for turn in range(rounds.rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            arm, found = arms[name], timings[name]
            device.reset_peak()
            arm.enter()
            with uncollected():  # from here, as a collection between untimed and timed steps would let the device cool
                for _ in range(rounds.warmup * (2 if turn == 0 else 1)):
                    arm.run()
                device.synchronise()
                before = device.joules()
                steps = [arm.run() for _ in range(rounds.steps)]
                after, clocks = device.joules(), device.clocks()
            peak = device.peak()
            arm.leave()
            for step in steps:
                for phase, seconds in step.items():
                    found.phases.setdefault(phase, []).append(seconds)
            found.turns.append(statistics.median(step["step"] for step in steps))
            long_enough = sum(step["step"] for step in steps) >= ENERGY_SECONDS
            if before is not None and after is not None and long_enough:
                found.joules.append((after - before) / rounds.steps)
            if clocks is not None:  # read while the device is still warm from this arm's steps
                found.clocks.append(clocks)
            if peak is not None:
                found.allocated, found.reserved = (
                    max(a or 0, b) for a, b in zip((found.allocated, found.reserved), peak, strict=True)
                )
        medians = ", ".join(f"{name} {timings[name].turns[-1]:.4g} s" for name in order)
        say(f"round {turn + 1} of {rounds.rounds}: {medians}")
        yield timings


def overheads(timings: Mapping[str, Timings], baseline: str) -> dict[str, dict[str, float] | None]:
    """Step time of every arm over the baseline's: the median over rounds of the ratio within a round, with its 95 % interval."""
    own = timings[baseline].turns
    return {name: None if name == baseline else paired_ratio(found.turns, own) for name, found in timings.items()}
