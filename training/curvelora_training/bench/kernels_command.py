"""Time the fused kernels of a LoRAN layer on NF4 beside the matrix products of its pass, with errors to fp64; needs a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from curvelora.activations import NAMES, Activation
from curvelora.errors import UserError
from curvelora.kernels.choice import MAX_RANK, why_nowhere
from curvelora_eval.files import make_folder, write_json
from curvelora_training.bench.layer_command import LAYERS, parse_shapes

TUNABLE = ("merged_weight", "gradients", "first_readings", "second_readings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    shapes = "d_out x d_in of each layer (default %(default)s)"
    parser.add_argument("--shapes", default=LAYERS, metavar="OUTxIN,...", help=shapes)
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="rows of x (default %(default)s)")
    parser.add_argument("--rank", type=int, default=64, metavar="R", help="of A and B (default %(default)s)")
    parser.add_argument("--std", type=float, default=1e-2, help="of the entries of BA (default %(default)s)")
    parser.add_argument("--activation", choices=NAMES, default="sinter", help="f (default %(default)s)")
    parser.add_argument("--amplitude", type=float, default=5e-5, help="a of Sinter (default %(default)s)")
    tune = f"kernels of which many tiles are tried, the fastest timed: any of {','.join(TUNABLE)}"
    parser.add_argument("--tune", default="", metavar="NAME,...", help=tune)
    out = Path("runs/bench/kernels.json")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help="result (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure and write."""
    import torch

    shapes = parse_shapes(args.shapes)
    if any(d_in % 64 for _, d_in in shapes):
        raise UserError("--shapes: d_in has to be a multiple of 64, the block of NF4")
    if not 1 <= args.rank <= MAX_RANK or args.tokens < 1 or args.std <= 0:
        raise UserError(f"--rank is from 1 to {MAX_RANK}, --tokens at least 1 and --std positive")
    tune = tuple(name for name in args.tune.split(",") if name)
    if not set(tune) <= set(TUNABLE):
        raise UserError(f"--tune takes {', '.join(TUNABLE)} with commas between them, not {args.tune!r}")
    if args.activation == "identity":
        raise UserError("--activation identity has no gradient kernel: its gradients are LoRA's")
    if not torch.cuda.is_available():
        raise UserError("bench kernels needs a GPU: on a CPU the kernels run in an interpreter only, for tests")
    if (reason := why_nowhere(torch.device("cuda", 0))) is not None:
        raise UserError(f"bench kernels: {reason}")
    make_folder(args.out.parent)
    from curvelora_training.bench.kernels import measure_kernels

    activation = Activation(args.activation, args.amplitude)
    device = torch.device("cuda", 0)
    record = measure_kernels(shapes, args.tokens, args.rank, args.std, activation, tune, device)
    write_json(args.out, record)
    print(f"\nwritten: {args.out}")
    return 0
