"""Signals that ask a run to stop. Handlers set a flag; at the next step `stopping.py` has all processes agree on it.

A handler runs between two bytecodes of the main thread: a process that waits in a collective runs it when that returns, and an
exception out of it could leave others waiting. Only where nothing waits (`let_through`) does it raise.

Nothing but the standard library is imported here, so that signals are caught while the libraries load.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start me again
INTERRUPTED = 130
CODES = {signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE, signal.SIGINT: INTERRUPTED}
# Seconds in which a second SIGINT or SIGTERM is the first one's echo: a terminal and some SLURMs send one to every process, and
# launchers pass their own on to their children, who have it already.
ECHO = 3.0


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has.

    Args:
        code: the exit code.
        message: what is saved and how to continue.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Asked:
    """What this process was asked: `code` is the exit code, 0 for nothing."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As if nothing had come."""
        self.code = 0
        self.raising = False
        self._since: float | None = None

    def let_through(self, allowed: bool) -> None:
        """Whether a signal ends the process by an exception: where there is nothing to save and no other process waits."""
        self.raising = allowed
        if allowed and self.code:
            self._raise()

    def handle(self, number: int, _: FrameType | None) -> None:
        """Note the signal; a second SIGINT or SIGTERM ends the process as if there were no handler."""
        now = time.monotonic()
        if number != signal.SIGUSR1:  # a warning, which SLURM lets SIGTERM follow
            if self._since is not None and now - self._since > ECHO:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._since = self._since or now
        first, self.code = not self.code, max(self.code, CODES[signal.Signals(number)])
        if self.raising:
            self._raise()
        if first:  # not print: what it writes to may be in the middle of a line
            os.write(
                2, f"{signal.Signals(number).name}: stopping after this step; a second one stops at once\n".encode()
            )

    def _raise(self) -> None:
        self.raising = False
        raise Stopped(self.code, "stopped; nothing was training: continue with the same command and --resume")


ASKED = Asked()


def catch() -> dict[int, Any]:
    """Catch the signals from now on. Returns the handlers before, by signal."""
    return {number: signal.signal(number, ASKED.handle) for number in CODES}


@contextlib.contextmanager
def handled(alone: bool) -> Iterator[None]:
    """Catch the signals inside the `with` block.

    Args:
        alone: no launcher started this process, so that nobody waits for it.

    Raises:
        Stopped: one came already, and `alone`.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python has no handlers
        yield
        return
    before = catch()
    try:
        ASKED.let_through(alone)
        yield
    finally:
        # a launcher whose first process has left sends SIGTERM to the others, who are leaving with the same code
        leaving = ASKED.code and not alone
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)
        ASKED.forget()
