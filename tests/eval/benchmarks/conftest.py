"""What the tests of named tasks share: the small data folder, and the real one where CURVELORA_DATA_DIR names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def samples(root: Path) -> Path:
    """A data folder with a few rows a task."""
    return root / "tests/data/benchmarks"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The whole data sets; tests that need them are skipped without."""
    if not os.environ.get("CURVELORA_DATA_DIR"):
        pytest.skip("CURVELORA_DATA_DIR does not name a folder with the real data")
    return Path(os.environ["CURVELORA_DATA_DIR"])
