"""All processes of a job, talking over a store before there is a process group: who has come, and who has what."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

from curvelora.errors import UserError
from curvelora_training.preflight.place import Place

POLL = 0.05  # seconds
# How much longer than the first process the others wait for its answer: it may have begun to wait later.
GRACE = 10.0


class Absent(UserError):
    """Somebody is missing. All who are there know; the first process says it."""


class Meeting:
    """What processes tell the first one, and what it tells them. Every process makes the same calls in the same order.

    Args:
        store: of all processes, as `open_store` gives it.
        seconds: how long one is waited for.
    """

    def __init__(self, store: Any, place: Place, seconds: float) -> None:
        self.store, self.place, self.seconds = store, place, seconds
        self.first = place.rank == 0
        self.came: dict[int, tuple[str, int]] = {}  # rank -> host, node; on the first process

    def call_the_roll(self) -> None:
        """Wait until all have come. Raises `Absent`, on every process that has, naming those that have not."""
        there = self.gather("here", [self.place.host, self.place.node])
        if there is not None:
            self.came = {rank: (host, node) for rank, (host, node) in enumerate(there)}

    def gather(self, topic: str, value: Any) -> list[Any] | None:
        """The values of all processes in order of rank, on the first one; None on the others.

        Raises:
            Absent: on every process that is there, where one did not come in time; names it.
        """
        self.store.set(f"{topic}/{self.place.rank}", json.dumps(value))
        values, problem = None, None
        if self.first:
            problem = self._wait(topic)
            if problem is None:
                keys = [f"{topic}/{rank}" for rank in range(self.place.processes)]
                values = [json.loads(self.store.get(key)) for key in keys]
        if said := self.announce(f"{topic}/gathered", problem):
            raise Absent(said)
        return values

    def announce(self, topic: str, value: Any = None) -> Any:
        """What the first process says, on every process.

        Raises:
            UserError: it says nothing in time.
        """
        if self.first:
            self.store.set(topic, json.dumps(value))
            return value
        try:
            self.store.wait([topic], timedelta(seconds=self.seconds + GRACE))
            return json.loads(self.store.get(topic))
        except Exception as error:  # a time-out, or a connection that broke
            place = self.place
            raise UserError(
                f"{place.host} (process {place.rank}) waited {self.seconds + GRACE:g} s in vain for the first process at "
                f"{place.address}:{place.port}: look at its output"
            ) from error

    def part(self, seconds: float = 5.0) -> None:
        """Leave; the process that keeps the store leaves last, or the others would lose it under their hands."""
        try:
            self.store.set(f"left/{self.place.rank}", "1")
            if self.first:
                self._wait("left", seconds)
        except Exception:  # nothing is left to be said over it
            return

    def watcher(self) -> Meeting:
        """The same meeting over a connection of its own: this one may be busy waiting."""
        store = self.store if self.place.processes == 1 else self.store.clone()
        return Meeting(store, self.place, self.seconds)

    def named(self, ranks: list[int]) -> str:
        """Who these are, on the first process."""
        return "; ".join(f"process {rank} ({self.came[rank][0]})" for rank in ranks) + " did not begin it"

    def absent(self, topic: str) -> list[int]:
        """Ranks that have said nothing on this topic so far."""
        return [rank for rank in range(self.place.processes) if not self.store.check([f"{topic}/{rank}"])]

    def _wait(self, topic: str, seconds: float | None = None) -> str | None:
        """Wait for all; who is missing at the end, as a sentence."""
        seconds = self.seconds if seconds is None else seconds
        until = time.monotonic() + seconds
        while missing := self.absent(topic):
            if time.monotonic() > until:
                return self._name(topic, missing, seconds)
            time.sleep(POLL)
        return None

    def _name(self, topic: str, missing: list[int], seconds: float) -> str:
        """Who is missing, by node where that can be told."""
        place, came = self.place, dict(self.came)
        if topic == "here":
            for rank in range(place.processes):
                if rank not in missing:
                    host, node = json.loads(self.store.get(f"here/{rank}"))
                    came[rank] = (host, node)
        names = {node: host for host, node in came.values()} | dict(enumerate(place.nodes))
        by_node: dict[str, list[int]] = {}
        for rank in missing:
            node = came[rank][1] if rank in came else rank // max(place.local_processes, 1)
            by_node.setdefault(names.get(node, f"node {node}"), []).append(rank)
        who = "; ".join(f"{name} (process {_list(ranks)})" for name, ranks in by_node.items())
        present = sorted({host for rank, (host, _) in came.items() if rank not in missing})
        what = "did not come" if topic == "here" else f"came, and then said nothing more ({topic})"
        there = f"; {', '.join(present)} did" if topic == "here" and present else ""
        return (
            f"{who} {what} within {seconds:g} s{there}: look whether it runs and at what it printed, or raise --timeout"
        )


def _list(ranks: list[int]) -> str:
    """1, 2 and 3; "1 to 8" where there are many in a row."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))
