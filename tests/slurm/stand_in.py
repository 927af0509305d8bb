"""In the place of training, to try the job script in a second: does what the plan says for this attempt.

`PLAN` has a word an attempt, the last one for all later ones: an exit code; `save+CODE` leaves a new checkpoint first; `listen`
waits for a signal and leaves as training does (75, SIGINT: 130); `score` does so in the first process alone, the others are done;
`taken` is a port that another program has taken, in the first try only.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def leave(code: int) -> int:
    """As `curvelora.cli.run_guarded` does it: a crash (1) keeps no code."""
    if code != 1:
        Path(os.environ["CURVELORA_EXIT_CODES"], os.environ["RANK"]).write_text(f"{code}\n", encoding="ascii")
    return code


def main() -> int:
    run, attempt = Path(os.environ["RUN"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    plan = os.environ["PLAN"].split()
    word = plan[min(attempt, len(plan) - 1)]
    print(f"rank {os.environ['RANK']} port {os.environ['PORT']} arguments {sys.argv[1:]}", flush=True)
    if word == "taken":
        seen = run / "taken"
        if os.environ["RANK"] == "0" and not seen.exists():
            seen.touch()
            print("RuntimeError: The server socket has failed to listen: EADDRINUSE", flush=True)
            return 1
        return leave(0)
    if word == "score" and os.environ["RANK"] != "0":
        return leave(0)
    if word in ("listen", "score"):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda found, _: sys.exit(leave(130 if found == signal.SIGINT else 75)))
        (run / f"listening-{os.environ['RANK']}").touch()
        time.sleep(120)
        return 1
    if word.startswith("save+"):
        (run / f"checkpoints/checkpoint-{attempt + 1}").mkdir(parents=True, exist_ok=True)
    return leave(int(word.removeprefix("save+")))


if __name__ == "__main__":
    sys.exit(main())
