"""Run under a launcher: one cell after another in the same process group, for which imports are paid once.

    torchrun ... -m curvelora_training.matrix.worker JOBS

JOBS is a JSON file: "until" (seconds since the epoch, after which no cell begins) and "cells", each with "name", "recipe",
"overrides", "environment", "output" and "trains" (false: it should be refused). What is refused writes why to OUTPUT.refused.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from curvelora.cli import quiet_libraries
from curvelora.errors import UserError
from curvelora_training.bench.processes import join
from curvelora_training.distributed import leave, rank, world_size
from curvelora_training.prepare import load_and_prepare
from curvelora_training.run import train

BEGINS, ENDS = "[matrix] begin ", "[matrix] end "


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    quiet_libraries()
    join()
    for cell in jobs["cells"]:
        if _over(jobs["until"]):
            break
        _say(BEGINS + cell["name"])
        before = dict(os.environ)
        os.environ.update(cell["environment"])
        _run(cell)
        # the next cell may have another engine, and libraries remember this one's in all these places
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _say(ENDS + cell["name"])
    leave()


def _run(cell: dict[str, Any]) -> None:
    try:
        prepared = load_and_prepare(Path(cell["recipe"]), [*cell["overrides"], f"output={cell['output']}"])
        if cell["trains"]:
            folder = train(prepared, overwrite=True)
            if rank() == 0:
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
    except UserError as error:
        if rank() == 0:
            Path(f"{cell['output']}.refused").write_text(str(error), encoding="utf-8")


def _over(until: float | None) -> bool:
    """Whether time is up, by the first process's clock: all have to begin the same cells."""
    over = [until is not None and time.time() > until]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(over, src=0)
    return over[0]


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
