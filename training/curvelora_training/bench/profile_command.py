"""Say where the GPU's time of a training step goes, by kind of kernel, for each arm; needs one GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from curvelora.errors import UserError
from curvelora_eval.files import make_folder, write_json
from curvelora_training.bench.arms import parse_arms
from curvelora_training.bench.options import add_arm_arguments
from curvelora_training.bench.settings import add_model_arguments, settings_from
from curvelora_training.distributed import world_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_arguments(parser)
    out = Path("runs/bench/profile.json")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help="result (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="profiled steps (default %(default)s)")
    std = "standard deviation of the entries of BA (default %(default)s)"
    parser.add_argument("--std", type=float, default=1e-2, metavar="S", help=std)
    add_arm_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the record, print a table an arm."""
    import torch

    steps = args.steps
    settings = settings_from(args, lambda: parse_arms(args.arms, args.arm), None, [])
    if steps < 1 or args.std <= 0:
        raise UserError("--steps must be at least 1 and --std positive")
    if not torch.cuda.is_available() or world_size() > 1:
        raise UserError("bench profile needs one GPU and no launcher: it reads the times of a GPU's kernels")
    make_folder(args.out.parent)
    from curvelora_training.bench.ground import build_ground
    from curvelora_training.bench.processes import join
    from curvelora_training.bench.profile import measure_profile

    record = measure_profile(build_ground(settings, join()), args.std, steps)
    write_json(args.out, record)
    print(f"\nwritten: {args.out}")
    return 0
