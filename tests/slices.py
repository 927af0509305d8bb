"""Slices of a test run, so that what is too long for one run is whole after a few: `--slice K/N`."""

from __future__ import annotations

import argparse
import re
from typing import TypeVar

T = TypeVar("T")


def parse_slice(text: str) -> tuple[int, int]:
    """`2/3` -> (2, 3). Raises `argparse.ArgumentTypeError` for what is no slice."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no slice: write K/N with K from 1 to N, for example 1/4")
    return int(found[1]), int(found[2])


def taken(items: list[T], part: tuple[int, int]) -> list[T]:
    """Every N-th item, from the K-th on: neighbours, which take about as long, are spread over all slices."""
    number, parts = part
    return items[number - 1 :: parts]
