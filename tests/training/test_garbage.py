"""Who looks at old objects, and when."""

from __future__ import annotations

import contextlib
import gc

import pytest

from curvelora_training.garbage import long_lived, uncollected


def test_what_is_there_is_not_looked_at_while_training() -> None:
    old, before = [object()], gc.get_freeze_count()
    with contextlib.suppress(KeyError), long_lived():
        new: list = [object()]
        assert gc.get_freeze_count() > before
        tracked = [id(one) for one in gc.get_objects()]
        assert id(old) not in tracked and id(new) in tracked
        raise KeyError
    assert gc.get_freeze_count() == 0 and any(one is old for one in gc.get_objects())


@pytest.mark.parametrize("on", [True, False])
def test_nothing_is_collected_while_steps_are_timed(on: bool) -> None:
    (gc.enable if on else gc.disable)()
    try:
        with contextlib.suppress(KeyError), uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is on
    finally:
        gc.enable()
