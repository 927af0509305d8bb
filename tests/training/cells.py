"""Run under a launcher: one training run after another in the same process group, for which imports are paid once.

torchrun ... tests/training/cells.py CELLS      a JSON list of [recipe, [override, ...]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from curvelora.errors import UserError
from curvelora_training.distributed import leave
from curvelora_training.prepare import load_and_prepare
from curvelora_training.run import train


def main() -> None:
    """A cell that is refused writes why, beside its output."""
    for recipe, overrides in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        prepared = None
        try:
            prepared = load_and_prepare(Path(recipe), overrides)
            train(prepared)
        except UserError as error:
            output = next(o.partition("=")[2] for o in overrides if o.startswith("output="))
            Path(f"{output}.refused").write_text(str(error), encoding="utf-8")
        AcceleratorState._reset_state()  # the next cell may have another engine
        unset_hf_deepspeed_config()
    leave()


if __name__ == "__main__":
    main()
