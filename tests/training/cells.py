"""Run under a launcher: one training run after another in the same process group, for which imports are paid once.

torchrun ... tests/training/cells.py CELLS      a JSON list of [recipe, [override, ...]]

A third item, [run folder, step], makes it a run that was stopped after this step and is resumed: the folder's checkpoint of that
step is all that is taken over.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from curvelora.errors import UserError
from curvelora_training.distributed import everyones, leave, rank
from curvelora_training.prepare import load_and_prepare
from curvelora_training.run import train


def main() -> None:
    """A cell that is refused writes why, beside its output."""
    for recipe, overrides, *stopped in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        output = next(o.partition("=")[2] for o in overrides if o.startswith("output="))
        try:
            if stopped:
                source, step = stopped[0]
                if rank() == 0:
                    take_over(Path(source), step, Path(output))
                everyones(None)  # it is there
            train(load_and_prepare(Path(recipe), overrides, bool(stopped)), resume=bool(stopped))
        except UserError as error:
            Path(f"{output}.refused").write_text(str(error), encoding="utf-8")
            print(f"{output} is refused: {error}", flush=True)
        AcceleratorState._reset_state()  # the next cell may have another engine
        unset_hf_deepspeed_config()
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]  # Accelerate's own notes on the engine of this one
    leave()


def take_over(source: Path, step: int, output: Path) -> None:
    """`output` is then the run in `source` as it was when the checkpoint of `step` was there, and nothing later."""
    shutil.copytree(source / f"checkpoints/checkpoint-{step}", output / f"checkpoints/checkpoint-{step}")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(source / name, output / name)


if __name__ == "__main__":
    main()
