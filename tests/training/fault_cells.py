"""Run under a launcher: runs in one process group, with a fault in one of the processes, or resumed from another's checkpoint.

torchrun ... tests/training/fault_cells.py CELLS      a JSON list of {"name", "arguments": [...], "fault": [kind, rank, step]}

A cell may have "environment", "loading" (seconds that a load is waited for), and "from": [run folder, step], which makes its
folder that of a run that was stopped after this step: the checkpoint of that step is all that is taken over. Faults come when
`step` steps are made: a signal's name, "hang", "nan" (a loss), "evaluation" and "scoring" (SIGTERM in one), "taken" (the run
folder, by another attempt); "load" is a load that takes `step` seconds more. Without a fault it is null. Each process writes its
exit code to NAME.codeRANK, beside the output.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from curvelora_training import distributed, finetune
from curvelora_training import run as run_module
from curvelora_training.lease import describe_attempt

RANK = int(os.environ["RANK"])
TRAINER, COMPUTE_LOSS, LEAVE = run_module.AdapterTrainer, Trainer.compute_loss, distributed.leave
LOAD, SCORE = run_module._load, run_module.score_unseen


class Fault(TrainerCallback):
    def __init__(self, kind: str, step: int, folder: Path) -> None:
        self.kind = kind
        self.step = step
        self.folder = folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != self.step:
            return
        if self.kind.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.kind])
        elif self.kind == "hang":
            time.sleep(3600)
        elif self.kind == "taken":
            (self.folder / "lease.json").write_text(json.dumps(describe_attempt() | {"host": "node7"}))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.kind == "evaluation":
            os.kill(os.getpid(), signal.SIGTERM)


def prepare(kind: str, rank: int, step: int, folder: Path) -> None:
    if rank != RANK:
        return
    run_module.AdapterTrainer = lambda *args, callbacks, **kwargs: TRAINER(
        *args, callbacks=[*callbacks, Fault(kind, step, folder)], **kwargs
    )

    def load(*args: Any) -> Any:
        time.sleep(step if kind == "load" else 0)
        return LOAD(*args)

    def score(*args: Any) -> Any:
        if kind == "scoring":
            os.kill(os.getpid(), signal.SIGTERM)
        return SCORE(*args)

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = COMPUTE_LOSS(self, *args, **kwargs)
        broken = kind == "nan" and self.model.training and self.state.global_step == step
        return found * math.nan if broken else found

    Trainer.compute_loss, run_module._load, run_module.score_unseen = compute_loss, load, score


def take_over(source: Path, step: int, output: Path) -> None:
    """`output` is then the run in `source` as it was when the checkpoint of `step` was there, and nothing later."""
    if RANK == 0:
        shutil.copytree(source / f"checkpoints/checkpoint-{step}", output / f"checkpoints/checkpoint-{step}")
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copy(source / name, output / name)
    distributed.everyones(None)  # it is there


def main() -> None:
    distributed.leave = lambda: None  # the next cell needs the process group
    for cell in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run_module.AdapterTrainer, Trainer.compute_loss = TRAINER, COMPUTE_LOSS
        run_module._load, run_module.score_unseen = LOAD, SCORE
        output = next(o.partition("=")[2] for o in cell["arguments"] if o.startswith("output="))
        before = dict(os.environ)
        os.environ.update(cell.get("environment", {}))
        distributed.LOADING = timedelta(seconds=cell.get("loading", 3600))
        if cell.get("fault"):
            prepare(*cell["fault"], Path(output))
        if "from" in cell:
            take_over(Path(cell["from"][0]), cell["from"][1], Path(output))
        code = finetune.main(cell["arguments"])
        Path(output).with_name(f"{cell['name']}.code{RANK}").write_text(str(code))
        # the next cell may have another engine, and libraries remember this one's in all these places
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
    LEAVE()


if __name__ == "__main__":
    main()
