"""Several processes under `torchrun` or `accelerate launch`: who this one is, and how they wait for each other.

They share work through files (`journal.py`); torch.distributed (gloo, on the CPU) only makes them wait and carries small answers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from curvelora.errors import UserError

PATIENCE = timedelta(
    hours=1
)  # for a process that vanished without closing its connection; one that ended is noticed at once
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among `world`; the first (rank 0) speaks and writes results."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here.

        Raises:
            UserError: one of them has ended.
        """
        self._together(distributed.barrier)

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` returns on the first process, on all of them.

        Raises:
            UserError: as raised by `action`, on the first process; the others end quietly with the same exit code.
        """
        if self.world == 1:
            return action()
        answer: list = [None, None]
        error = None
        if self.first:
            try:
                answer[0] = action()
            except (UserError, OSError) as caught:
                error, answer[1] = caught, str(caught)
        self._together(lambda: distributed.broadcast_object_list(answer, src=0))
        if error is not None:
            raise error
        if answer[1] is not None:
            sys.exit(2)
        return answer[0]

    def each_after_first(self, action: Callable[[], T]) -> T:
        """What `action` returns, done on every process; where the first one fails, the others do not begin.

        Raises:
            UserError: as raised by `action`; said once where it fails on the first process.
        """
        answer: list[T] = []
        self.on_first(lambda: answer.append(action()))
        return answer[0] if answer else action()

    def _together(self, action: Callable[[], object]) -> None:
        if self.world == 1:
            return
        try:
            action()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"another process of this evaluation has ended ({reason}): start the same command again, it goes on where it was"
            ) from error


def join_processes() -> Processes:
    """Meet the other processes that RANK, WORLD_SIZE and LOCAL_RANK speak of, and take this one's GPU.

    Raises:
        UserError: they cannot be met, or there are more processes than GPUs on this machine.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and world > 1:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU ({torch.cuda.device_count()} are there): start as many processes as "
                "there are GPUs"
            )
        torch.cuda.set_device(local)
    if world > 1 and not distributed.is_initialized():
        try:
            distributed.init_process_group("gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the {world} processes cannot meet: {' '.join(str(error).split())[:200]}") from error
    return Processes(rank, world)
