"""Options that the commands of the lab share: the arms, and how often to measure."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from curvelora.errors import UserError
from curvelora_training.bench.arms import DEFAULT_ARMS
from curvelora_training.bench.interleave import Rounds


def add_arm_arguments(parser: argparse.ArgumentParser) -> None:
    """`--arms` and `--arm`."""
    group = parser.add_argument_group("arms")
    group.add_argument(
        "--arms", default=DEFAULT_ARMS, metavar="A,B,...", help=f"the first is the baseline (default {DEFAULT_ARMS})"
    )
    group.description = (
        "METHOD[:VARIANT], then any of @fp32, @eager (no fused kernels), @fp8 (LoRAN's gradients partly from FP8), @liger "
        "(liger-kernel's kernels around the layers) and @keep=N (the last N layers keep large products)"
    )
    own = "one more arm, for example mine=loran,amplitude=1e-3 (repeatable)"
    group.add_argument("--arm", action="append", default=[], metavar="NAME=METHOD,OPTION=VALUE", help=own)


def add_timing_arguments(parser: argparse.ArgumentParser, rounds: int, timed: int) -> None:
    """`--rounds`, `--timed` and `--std`, with these defaults."""
    group = parser.add_argument_group("timing")
    group.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help="turns of every arm (default %(default)s)"
    )
    group.add_argument("--timed", type=int, default=timed, metavar="N", help="timed steps a turn (default %(default)s)")
    warm = "untimed steps at the beginning of a turn (default %(default)s)"
    group.add_argument("--warm-up-steps", type=int, default=2, metavar="N", help=warm)
    std = "standard deviation of the entries of BA while timing (default %(default)s)"
    group.add_argument("--std", type=float, default=1e-2, metavar="S", help=std)


def rounds_from(args: argparse.Namespace) -> Rounds:
    """Raises `UserError` for counts below 1, or an update of 0."""
    if args.rounds < 1 or args.timed < 1:
        raise UserError("--rounds and --timed must be at least 1")
    if not 0 < args.std < math.inf:
        raise UserError(f"--std must be positive, not {args.std}: at BA = 0 a method that skips zeros would look free")
    return Rounds(args.rounds, args.timed, args.warm_up_steps)


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the runs go, and how they are made."""
    group = parser.add_argument_group("runs")
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs and of the report")
    group.add_argument("--resume", action="store_true", help="keep the runs that DIR has finished and make the others")
    group.add_argument("--overwrite", action="store_true", help="replace what DIR holds")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time on each device (default 1)")
    recorded = "replay steps as CUDA graphs (default for causal language models on one GPU without checkpointing)"
    group.add_argument("--recorded", action=argparse.BooleanOptionalAction, default=None, help=recorded)
