"""Train one method over a grid: amplitude x frequency, ranks, learning rates or activations; with heat maps.

Every cell is a run of `curvelora bench compare` without its timing: same base, same batches, same seed. The baseline (QLoRA) and
LoRAN's identity run beside the grid. Runs can be packed on a device (--jobs), and a sweep that was interrupted continues with
--resume. --grid paper is the grid of the LoRAN paper's summary (3 x 3), --grid wide holds it within five decades (6 x 6).
"""

from __future__ import annotations

import argparse
import math
import re

from curvelora.errors import UserError
from curvelora_training.bench.options import add_folder_arguments
from curvelora_training.bench.settings import add_model_arguments, add_training_arguments, settings_from

GRIDS = {
    "paper": {"amplitude": [1e-5, 5e-5, 1e-4], "frequency": [5e3, 1e4, 5e4]},
    "wide": {"amplitude": [1e-5, 5e-5, 1e-4, 1e-3, 1e-2, 1e-1], "frequency": [1e2, 1e3, 5e3, 1e4, 5e4, 1e5]},
}
AXES = {"amplitude": float, "frequency": float, "rank": int, "learning_rate": float, "activation": str}
FLAGS = {axis: f"--{axis}" for axis in AXES} | {"rank": "--ranks", "learning_rate": "--learning-rates"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_arguments(parser)
    add_training_arguments(parser)
    add_folder_arguments(parser)
    share = "make only the I-th of N shares of the runs (I from 0), beside others that make theirs, as a job array does"
    parser.add_argument("--share", metavar="I/N", help=share)
    group = parser.add_argument_group("grid")
    group.add_argument("--method", default="loran", metavar="ARM", help="the arm that is varied (default loran)")
    group.add_argument("--grid", choices=sorted(GRIDS), help="a ready-made amplitude x frequency grid")
    for axis, flag in FLAGS.items():
        group.add_argument(flag, dest=f"axis_{axis}", metavar="V,V,...", help=f"values of {axis.replace('_', ' ')}")


def run(args: argparse.Namespace) -> int:
    """Check everything, make the runs, write sweep.json and report.html; exit code 1 where a run failed."""
    from curvelora_training.bench.sweep import sweep, sweep_arms

    settings = settings_from(args, lambda: sweep_arms(args.method, axes_from(args)), args.out)
    axes = axes_from(args)
    settings.sharpness = settings.spectra = False
    settings.looks = min(settings.looks, 4)
    if settings.random:
        raise UserError("a sweep compares what is learnt, and a built-in shape has random weights: name a checkpoint")
    share = share_from(args)
    return sweep(settings, axes, args.out, resume=args.resume, overwrite=args.overwrite, jobs=args.jobs, share=share)


def share_from(args: argparse.Namespace) -> tuple[int, int]:
    """(index, number of shares); (0, 1) is all. Raises `UserError` for another text, or without --resume."""
    if args.share is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", args.share)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--share {args.share!r} is no share: write 0/8 for the first of eight, up to 7/8")
    if not args.resume or args.overwrite:
        raise UserError("--share goes with --resume, as one of them begins the folder and the others go on in it")
    return int(found[1]), int(found[2])


def axes_from(args: argparse.Namespace) -> dict[str, list]:
    """Axis -> values. Raises `UserError` for values that are no numbers, and where no axis is given."""
    axes: dict[str, list] = {axis: list(values) for axis, values in GRIDS.get(args.grid, {}).items()}
    for axis, kind in AXES.items():
        text = getattr(args, f"axis_{axis}")
        if text is None:
            continue
        try:
            axes[axis] = list(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))
        except ValueError as error:
            example = "8,64" if kind is int else "1e-5,1e-3"
            raise UserError(f"{FLAGS[axis]} {text!r} is no list of numbers: write for example {example}") from error
    if any(not 0 < rate < math.inf for rate in axes.get("learning_rate", [])):
        raise UserError("--learning-rates must be positive")
    if not axes or not all(axes.values()):
        raise UserError(
            "a sweep needs values: write --grid paper, --grid wide, or for example --amplitude 1e-5,1e-3 --ranks 8,64"
        )
    return axes
