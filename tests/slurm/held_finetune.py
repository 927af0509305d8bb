"""Training whose first attempt goes slowly from step 6 on, so that a test can do something to it; the steps are the same.

HELD is the seconds of such a step; 0 is plain training.
"""

from __future__ import annotations

from curvelora_training.signals import catch

if __name__ == "__main__":
    catch()

import os
import sys
import time
from typing import Any

from curvelora_training import finetune
from curvelora_training.trainer import AdapterTrainer

FREE = 5  # steps


def hold(seconds: float) -> None:
    """Make steps slow; a sleep that a signal handler interrupts goes on."""
    plain = AdapterTrainer.training_step

    def held(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= FREE:
            time.sleep(seconds)
        return plain(self, *args, **kwargs)

    AdapterTrainer.training_step = held


if __name__ == "__main__":
    seconds = float(os.environ["HELD"])
    if seconds and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        hold(seconds)
    sys.exit(finetune.main())
