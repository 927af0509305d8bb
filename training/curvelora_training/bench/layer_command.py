"""Time one linear layer under each arm, forward and backward, arms interleaved; the first arm is the baseline."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from curvelora.errors import UserError
from curvelora_eval.files import make_folder, write_json
from curvelora_training.bench.arms import FULL, parse_arms
from curvelora_training.bench.options import add_arm_arguments, add_timing_arguments, rounds_from
from curvelora_training.bench.random_base import BASES
from curvelora_training.distributed import world_size

LAYERS = "4096x4096,11008x4096,4096x11008"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    shapes = "d_out x d_in of each layer (default %(default)s)"
    parser.add_argument("--shapes", default=LAYERS, metavar="OUTxIN,...", help=shapes)
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="rows of x (default %(default)s)")
    parser.add_argument(
        "--base", choices=BASES, default="nf4", help="how the frozen weight is stored (default %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=64, metavar="R", help="of every arm (default %(default)s)")
    parser.add_argument(
        "--alpha", type=float, default=16.0, metavar="A", help="scale s = alpha / r (default %(default)s)"
    )
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="on the adapters' input (default 0)")
    out = Path("runs/bench/layer.json")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help="result (default %(default)s)")
    add_arm_arguments(parser)
    add_timing_arguments(parser, 10, 10)


def run(args: argparse.Namespace) -> int:
    """Measure, write the record, print a table a layer."""
    arms, rounds, shapes = parse_arms(args.arms, args.arm), rounds_from(args), parse_shapes(args.shapes)
    if args.tokens < 1 or args.rank < 1 or not 0 < args.alpha < math.inf or not 0 <= args.dropout < 1:
        raise UserError("--tokens and --rank must be at least 1, --alpha positive, --dropout from 0 to below 1")
    if any(arm.method == FULL for arm in arms):
        raise UserError(
            "the arm full belongs to `bench compare`: a single layer with all weights trained is no adapter"
        )
    if whole := [arm.key for arm in arms if arm.liger or arm.keep]:
        raise UserError(
            f"arm {whole[0]}: @liger and @keep are for what lies around linear layers: leave them to `bench step`"
        )
    if world_size() > 1:
        raise UserError("`bench layer` measures one device: start it without a launcher")
    make_folder(args.out.parent)
    from curvelora_training.bench.cost import table
    from curvelora_training.bench.layer import measure_layers
    from curvelora_training.bench.processes import join

    options = {"r": args.rank, "alpha": args.alpha, "dropout": args.dropout}
    record = measure_layers(shapes, arms, args.base, args.tokens, options, args.std, rounds, join())
    write_json(args.out, record)
    for layer in record["layers"]:
        print(f"\n{layer['d_out']} x {layer['d_in']} on {record['device']}, std(BA) = {args.std:g}\n{table(layer)}")
    print(f"\nwritten: {args.out}")
    return 0


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """`11008x4096,...` -> (d_out, d_in) each. Raises `UserError` for anything else."""
    shapes = []
    for part in text.split(","):
        d_out, cross, d_in = part.strip().partition("x")
        if not cross or not d_out.isdecimal() or not d_in.isdecimal() or 0 in (int(d_out), int(d_in)):
            raise UserError(f"--shapes {part!r} is not understood: write OUTxIN, for example 11008x4096")
        shapes.append((int(d_out), int(d_in)))
    return shapes
