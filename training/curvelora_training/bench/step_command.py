"""Time whole training steps of each arm on a model or a built-in shape, arms interleaved; the first arm is the baseline.

Runs on a CPU, on one GPU, and under torchrun, accelerate launch or deepspeed in plain data parallelism.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from curvelora_eval.files import make_folder, write_json
from curvelora_training.bench.arms import parse_arms
from curvelora_training.bench.options import add_arm_arguments, add_timing_arguments, rounds_from
from curvelora_training.bench.settings import add_model_arguments, settings_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_arguments(parser)
    out = Path("runs/bench/step.json")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help="result (default %(default)s)")
    add_arm_arguments(parser)
    add_timing_arguments(parser, 5, 2)


def run(args: argparse.Namespace) -> int:
    """Measure, write the record, print the table."""
    settings = settings_from(args, lambda: parse_arms(args.arms, args.arm), None, [lambda: rounds_from(args)])
    rounds = rounds_from(args)
    make_folder(args.out.parent)
    from curvelora_training.bench.cost import measure_steps, table
    from curvelora_training.bench.ground import build_ground
    from curvelora_training.bench.processes import join, say
    from curvelora_training.distributed import leave, rank

    ground = build_ground(settings, join())
    say(f"{settings.model} ({settings.base}) ready in {ground.seconds:.1f} s")
    for record in measure_steps(ground, rounds, args.std, say):
        if rank() == 0:  # after every round: a run that is stopped keeps what it measured
            write_json(args.out, record)
    if rank() == 0:
        where = f"{record['processes']} x {record['device']}"
        print(f"\n{settings.model} on {where}, std(BA) = {args.std:g}\n{table(record)}\n\nwritten: {args.out}")
    leave()
    return 0
