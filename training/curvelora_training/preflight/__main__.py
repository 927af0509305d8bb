"""`curvelora preflight` as a module, for launchers: `torchrun ... -m curvelora_training.preflight --run-folder DIR`."""

from __future__ import annotations

import sys

from curvelora.cli import run_guarded, run_module
from curvelora_training.preflight import command

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(run_guarded(lambda: run_module(command, "curvelora preflight", arguments), debug="--debug" in arguments))
