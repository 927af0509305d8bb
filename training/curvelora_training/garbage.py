"""Python's collector of garbage, which looks at all objects now and then and stops the process meanwhile.

With a model of 32 blocks, its adapters and the libraries around it that takes a quarter of a second (0.28 s on a CPU of 2.6 GHz),
in whichever step it comes, and the other processes of a job wait.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def long_lived() -> Iterator[None]:
    """What is there now is not looked at again; what is made from now on is."""
    gc.collect()
    was_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:  # by somebody else, whose objects would be let go as well
            gc.unfreeze()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected, while a few steps are timed."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
