"""`curvelora launch` as a module: `python -m curvelora_training.launch ...`."""

from __future__ import annotations

import sys

from curvelora.cli import run_guarded, run_module
from curvelora_training.launch import command

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(run_guarded(lambda: run_module(command, "curvelora launch", arguments), debug="--debug" in arguments))
