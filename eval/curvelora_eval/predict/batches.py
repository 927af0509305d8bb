"""Which units are predicted together.

The plan is decided by the lengths and the batch size alone. So a run that was killed, or that goes on with another number of
processes, pads every unit exactly as it would have been padded, and ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence


def plan(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Unit numbers in batches of similar length, longest first (a batch that does not fit in memory fails at once).

    Args:
        lengths: tokens of each unit; equal lengths keep their order.
        batch_size: units a batch, at least 1.
    """
    order = sorted(range(len(lengths)), key=lambda unit: -lengths[unit])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def share(batches: int, rank: int, world: int) -> range:
    """The numbers of the batches that process `rank` of `world` predicts: every `world`-th, so each gets long and short ones."""
    return range(rank, batches, world)


def spread(batches: Sequence[Sequence[int]], count: int) -> list[int]:
    """At most `count` units, evenly spread over the plan and so over the lengths; the longest and the shortest are among them."""
    order = [unit for batch in batches for unit in batch]
    if count < 1 or not order:
        return []
    if count >= len(order):
        return order
    if count == 1:
        return order[:1]
    return [order[i * (len(order) - 1) // (count - 1)] for i in range(count)]
