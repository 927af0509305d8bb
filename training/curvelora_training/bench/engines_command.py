"""Time training steps under DeepSpeed's ZeRO stages on a built-in shape, by `torchrun`; the memory that each needs.

    torchrun --standalone --nproc-per-node 2 -m curvelora_training.bench engines --model llama2-7b --base nf4 --stages 2,3

Records are added to the file of --out, each when it is there; those that it holds already are not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from curvelora.errors import UserError
from curvelora_eval.files import make_folder, write_json
from curvelora_training.bench.arms import Arm, parse_arms
from curvelora_training.bench.options import add_arm_arguments
from curvelora_training.bench.random_base import BASES
from curvelora_training.bench.shapes import SHAPES, shape_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model", default="llama2-7b", metavar="SHAPE", help=f"one of {', '.join(SHAPES)}, or a config.json"
    )
    parser.add_argument("--base", choices=BASES, default="nf4", help="how the base is stored (default %(default)s)")
    parser.add_argument("--stages", default="2,3", metavar="N,...", help="ZeRO stages (default %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=4, metavar="N", help="rows a process and step (default %(default)s)"
    )
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens a row (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps (default %(default)s)")
    parser.add_argument("--rank", type=int, default=64, metavar="R", help="of the adapters (default %(default)s)")
    keep = "layers that keep the results of large products, where the others make all again (default %(default)s)"
    parser.add_argument("--keep-products", type=int, default=0, metavar="N", help=keep)
    parser.add_argument(
        "--target-modules", metavar="A,B,...", help="modules to adapt (default: all linear layers of Llama)"
    )
    out = Path("runs/bench/engines.json")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help="result (default %(default)s)")
    parser.add_argument(
        "--table", action="store_true", help="print the table of --out, in Markdown, and measure nothing"
    )
    add_arm_arguments(parser)


LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def run(args: argparse.Namespace) -> int:
    """Measure and write."""
    if args.table:
        from curvelora_eval.lab.folder import read_record
        from curvelora_training.bench.engines_table import engines_table

        print(engines_table(read_record(args.out.parent, args.out.name, "engines")["records"]))
        return 0
    arms = parse_arms(args.arms, args.arm)
    try:
        stages = [int(stage) for stage in args.stages.split(",")]
    except ValueError:
        stages = []
    if not stages or not set(stages) <= {0, 1, 2, 3}:
        raise UserError(f"--stages are ZeRO's 0, 1, 2 and 3 with commas between them, not {args.stages!r}")
    if min(args.rows, args.length, args.steps, args.rank) < 1:
        raise UserError("--rows, --length, --steps and --rank must be at least 1")
    if args.keep_products < 0:
        raise UserError("--keep-products is a number of layers, at least 0")
    if 3 in stages and (liger := [arm.key for arm in arms if arm.liger]):
        raise UserError(
            f"arm {liger[0]}: Liger's kernels take weights without calling their layers, which gathers nothing of a base in "
            "shares: leave @liger or stage 3 out"
        )
    config = shape_config(args.model)
    if config is None:
        raise UserError(f"--model {args.model}: only shapes are measured here: {', '.join(SHAPES)}, or a config.json")
    make_folder(args.out.parent)
    from curvelora_training.bench.devices import Device
    from curvelora_training.bench.engines import measure_engines
    from curvelora_training.bench.processes import join_deepspeed, say
    from curvelora_training.distributed import leave, rank, world_size

    config.name = args.model
    device = join_deepspeed()
    held = json.loads(args.out.read_text(encoding="utf-8"))["records"] if args.out.is_file() else []
    key = ("model", "base", "arm", "stage", "processes", "rows", "length")
    options = {
        "r": args.rank,
        "alpha": 16,
        "dropout": 0.0,
        "target_modules": (args.target_modules or LINEAR).split(","),
    }

    def there(arm: Arm, stage: int) -> bool:
        kept = min(arm.keep or args.keep_products, config.num_hidden_layers)
        wanted = (args.model, args.base, arm.key, stage, world_size(), args.rows, args.length, kept)
        return any((*(record[k] for k in key), record.get("layers_keeping_products", 0)) == wanted for record in held)

    for stage in stages:
        left = [arm for arm in arms if not there(arm, stage)]
        if not left:
            continue
        sizes = (args.rows, args.length, args.steps)
        measured = measure_engines(
            config, args.base, left, stage, options, *sizes, Device(device), say, args.keep_products
        )
        for record in measured:
            held.append(record)
            if rank() == 0:
                write_json(args.out, {"schema": 1, "kind": "engines", "records": held})
    say(f"written: {args.out}")
    leave()
    return 0
