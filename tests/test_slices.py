"""`--slice`: all slices together are the run, and `.ci/run` takes them in turn."""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from slices import parse_slice, taken


@pytest.mark.parametrize("parts", [1, 3, 4, 9])
def test_slices_are_the_whole_and_do_not_overlap(parts: int) -> None:
    items = list(range(7))
    slices = [taken(items, (number, parts)) for number in range(1, parts + 1)]
    assert sorted(chain(*slices)) == items and max(map(len, slices)) - min(map(len, slices)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", ""])
def test_what_is_no_slice(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no slice: write K/N"):
        parse_slice(text)


def test_a_slice_is_taken_of_what_the_marker_leaves(root: Path) -> None:
    """Of this file's tests, through pytest itself: two halves, none of them twice."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_slices.py", "-k", "no_slice"]
    halves = []
    for half in ("1/2", "2/2"):
        done = subprocess.run(
            [*command, "--slice", half], cwd=root, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        halves.append({line for line in done.stdout.splitlines() if "::" in line})
    assert [len(half) for half in halves] == [4, 3] and not halves[0] & halves[1]


def test_ci_takes_the_slices_in_turn(root: Path) -> None:
    """On days that follow each other, whatever the day: also 008 and 009, which are no octal numbers."""
    script = (root / ".ci/run").read_text(encoding="utf-8")
    (line,) = (line for line in script.splitlines() if line.startswith("slice="))
    found = []
    for day in ("007", "008", "009", "010", "099", "366"):
        shell = f'day={day}\n{line}\necho "$slice"'
        found.append(subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.strip())
    assert found == ["4/4", "1/4", "2/4", "3/4", "4/4", "3/4"]
    assert all(parse_slice(text) for text in found)
