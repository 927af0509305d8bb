"""Fine-tune a model with an adapter, as a recipe says.

    curvelora train --config recipe.yaml [section.key=value ...]
    accelerate launch -m curvelora_training.finetune --config recipe.yaml
    deepspeed --module curvelora_training.finetune --config recipe.yaml
    torchrun --nproc-per-node 2 -m curvelora_training.finetune --config recipe.yaml

Everything that can be checked without weights is checked first, and all errors are reported at once.

SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) save one checkpoint after the step that runs and stop; a second SIGTERM or SIGINT stops at
once. Exit codes: 0 done, 2 an error that its message explains, 75 stopped by SIGTERM or SIGUSR1 (start again with --resume), 130
stopped by SIGINT.
"""

from __future__ import annotations

from curvelora_training.signals import INTERRUPTED, catch, handled

if __name__ == "__main__":
    catch()  # what is imported below takes seconds

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from curvelora.cli import USER_ERROR, run_guarded, run_module
from curvelora.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora train` and of the module."""
    which = "a YAML file, or the name of a recipe of the project (`curvelora recipes`)"
    parser.add_argument("--config", required=True, type=Path, metavar="RECIPE", help=which)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved recipe and what would train"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's newest whole checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what the run folder holds")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed's launcher adds it


def run(args: argparse.Namespace) -> int:
    """Check the recipe, then train (or, with --dry-run, say what would train); leave as a signal asks."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        with handled(alone="RANK" not in os.environ):
            return _run(args)
    except KeyboardInterrupt as stopped:
        if rank == 0:  # all of them stop together
            print(
                str(stopped) or "interrupted; continue with --resume", file=sys.stderr, flush=True
            )
        return getattr(stopped, "code", INTERRUPTED)


def _run(args: argparse.Namespace) -> int:
    from curvelora_training.distributed import leave, rank
    from curvelora_training.prepare import load_and_prepare, trainable_table
    from curvelora_training.run import train

    try:
        prepared = load_and_prepare(args.config, args.overrides, args.resume)
    except UserError:
        if rank() > 0:  # every process finds the same; one of them says it
            return USER_ERROR
        raise
    if args.dry_run and rank() > 0:
        return 0
    if args.dry_run:
        print(prepared.recipe.as_yaml())
        print(trainable_table(prepared))
        return 0
    try:
        train(prepared, resume=args.resume, overwrite=args.overwrite)
    finally:
        with contextlib.suppress(Exception):
            leave()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m curvelora_training.finetune` and of the launchers."""
    argv = list(sys.argv[1:] if argv is None else argv)
    module: Any = sys.modules[__name__]
    return run_guarded(lambda: run_module(module, "curvelora_training.finetune", argv), debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
