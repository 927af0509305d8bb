"""Compare arms on one model: what each costs, whether it is stable, whether its nonlinearity is there; with a report.

The same weights, batches and seeds for all arms; times are measured with the arms interleaved, before anything trains. The first
arm is the baseline. On a built-in shape (random weights) only cost, memory and numerics mean something. A folder that was
interrupted is continued with --resume, finished runs are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from curvelora.errors import UserError
from curvelora_eval.lab.folder import read_record
from curvelora_training.bench.arms import parse_arms
from curvelora_training.bench.options import (
    add_arm_arguments,
    add_folder_arguments,
    add_timing_arguments,
    rounds_from,
)
from curvelora_training.bench.settings import PROBES, add_model_arguments, add_training_arguments, settings_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_arguments(parser)
    add_training_arguments(parser)
    add_folder_arguments(parser)
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="show this sweep's map in the report")
    parser.add_argument("--no-cost", action="store_true", help="leave the timing out")
    parser.add_argument("--no-sharpness", action="store_true", help="leave the Hessian's eigenvalue out")
    batches = f"held-out batches for it, {PROBES} at most (default %(default)s)"
    parser.add_argument("--sharpness-batches", type=int, default=2, metavar="N", help=batches)
    parser.add_argument("--no-spectra", action="store_true", help="leave the spectra out")
    add_arm_arguments(parser)
    add_timing_arguments(parser, 5, 2)


def run(args: argparse.Namespace) -> int:
    """Check everything, measure, train, report; exit code 1 where a run failed."""
    settings = settings_from(args, lambda: parse_arms(args.arms, args.arm), args.out, [lambda: rounds_from(args)])
    if not 1 <= args.sharpness_batches <= PROBES:
        raise UserError(f"--sharpness-batches is a number from 1 to {PROBES}, not {args.sharpness_batches}")
    settings.sharpness, settings.spectra = not args.no_sharpness, not args.no_spectra
    settings.sharpness_batches = args.sharpness_batches
    if settings.sharpness and not settings.random and (liger := [arm.key for arm in settings.arms if arm.liger]):
        raise UserError(
            f"arm {liger[0]}: liger-kernel's backward passes cannot be differentiated, as sharpness needs: add --no-sharpness"
        )
    if args.sweep is not None:
        read_record(args.sweep, "sweep.json", "sweep")  # not only after hours of training
    from curvelora_training.bench.compare import compare

    return compare(
        settings,
        args.out,
        rounds=None if args.no_cost else rounds_from(args),
        update_std=args.std,
        resume=args.resume,
        overwrite=args.overwrite,
        jobs=args.jobs,
        sweep=args.sweep,
    )
