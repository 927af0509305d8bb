"""`curvelora bench eval` where only this package is installed: `python -m curvelora_eval.speed`."""

from __future__ import annotations

import sys

from curvelora.cli import run_guarded, run_module
from curvelora_eval.speed import command

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: run_module(command, "curvelora bench eval", sys.argv[1:])))
