"""Write the report of a comparison again, from its files."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of `curvelora bench compare`")
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="show this sweep's map")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where."""
    from curvelora_training.bench.compare import gather

    print(f"report: {gather(args.folder, args.sweep)}")
    return 0
