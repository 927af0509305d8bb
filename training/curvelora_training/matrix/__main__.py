"""`curvelora matrix` as a module: `python -m curvelora_training.matrix ...`."""

from __future__ import annotations

import sys

from curvelora.cli import run_guarded, run_module
from curvelora_training.matrix import command

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(run_guarded(lambda: run_module(command, "curvelora matrix", arguments), debug="--debug" in arguments))
