"""Unsloth's QLoRA step on a built-in shape, measured and recorded as `curvelora bench step` does its arms.

python -m curvelora_training.bench.unsloth_step --model llama2-7b --batch-size 4 --length 2048 --out runs/unsloth.json

Importing Unsloth changes transformers' classes for all models of a process, so it is no arm beside the others: it has a process,
and best an environment, of its own.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Measure, write the record, print the table; the exit status."""
    try:
        import unsloth  # noqa: F401, before transformers, which it changes
    except ImportError as error:
        missing = f"Unsloth cannot be imported ({error}): pip install unsloth, best into an environment of its own"
        print(f"error: {missing}", file=sys.stderr)
        return 2
    from curvelora_training.bench.unsloth_ground import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
