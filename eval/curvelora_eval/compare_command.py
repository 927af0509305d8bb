"""Compare evaluations row by row: is B better than A, or can these rows not tell?

Each argument is a folder that `curvelora eval --out` wrote: one evaluation, or several tasks. Folders with commas between
them are one arm, trained with several seeds. Every later arm is compared with the first. Example:

    curvelora compare out/lora out/sinter --out out/sinter-or-lora
    curvelora compare out/lora-seed-0,out/lora-seed-1 out/sinter-seed-0,out/sinter-seed-1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from curvelora.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora compare`."""
    parser.add_argument(
        "arms", nargs="+", metavar="DIR[,DIR...]", help="an evaluation, or one a seed, with commas between"
    )
    parser.add_argument("--task", metavar="NAME[,NAME...]", help="compare these tasks only")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write compare.json, compare.md and compare.svg here")
    parser.add_argument("--resamples", type=int, default=2000, help="draws of the bootstrap (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, write the files and return exit code 0. Raises UserError as it does."""
    from curvelora_eval.compare.build import compare, load_arms
    from curvelora_eval.compare.forest import forest_plot
    from curvelora_eval.compare.text import markdown, terminal
    from curvelora_eval.files import check_folder, make_folder, write_json, write_text

    if args.resamples < 100:
        raise UserError(
            f"--resamples must be at least 100, not {args.resamples}: fewer give no 95 % interval worth the name"
        )
    if args.seed < 0:
        raise UserError(f"--seed must be at least 0, not {args.seed}")
    if args.out:
        check_folder(args.out)
    only = None if args.task is None else [name.strip() for name in args.task.split(",") if name.strip()]
    if only == []:
        raise UserError("--task names no task: write names with commas between them, or leave it out for all tasks")
    arms = load_arms(args.arms, only)
    result = compare(arms, resamples=args.resamples, seed=args.seed)
    print(terminal(result))
    if args.out:
        out = make_folder(args.out)
        plot = forest_plot(result)
        if plot:
            write_text(out / "compare.svg", plot)
        write_text(out / "compare.md", markdown(result, plot is not None))
        write_json(out / "compare.json", result)
        print(f"written: {out / 'compare.json'}, compare.md" + (", compare.svg" if plot else ""))
    return 0
