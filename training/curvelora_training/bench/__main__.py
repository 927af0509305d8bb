"""`curvelora bench` and `curvelora sweep` for launchers, which start modules: `torchrun -m curvelora_training.bench step ...`."""

from __future__ import annotations

import sys

from curvelora.cli import main

if __name__ == "__main__":
    # deepspeed's launcher puts --local_rank in front; the environment has it too
    argv = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    sys.exit(main(argv if argv[:1] == ["sweep"] else ["bench", *argv]))
