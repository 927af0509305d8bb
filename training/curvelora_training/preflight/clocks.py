"""How far the nodes' clocks are apart, over the store that they share."""

from __future__ import annotations

import time
from collections.abc import Callable

from curvelora_training.preflight.meeting import Meeting

ROUNDS = 5


def clock_skew(meeting: Meeting, clock: Callable[[], float] = time.time) -> float:
    """Seconds by which this process's clock is ahead of the first one's; too high by at most the time that a word takes.

    The first process says its time to all who wait for it, a few times; what arrives soonest counts.
    """
    seen = []
    for turn in range(ROUNDS):
        meeting.gather(f"clock {turn}", True)  # all are waiting from here on, or will be at once
        if meeting.first:
            time.sleep(0.01)  # until the slowest of them is
        theirs = meeting.announce(f"time {turn}", clock())
        seen.append(clock() - theirs)
    return 0.0 if meeting.first else min(seen)
