"""Look at all nodes of a job before it begins: one line a node, and the reasons where it should not begin.

    curvelora preflight --run-folder runs/mine                      this machine alone
    torchrun ... -m curvelora_training.preflight --run-folder DIR   all processes of a job, with the job's own launcher
    srun ... python -m curvelora_training.preflight --run-folder DIR

Checks: all processes come; the same code and versions everywhere; a GPU for each process, which nothing else uses; the run folder
is the same for all nodes, can be written and has room; clocks agree; an all-reduce between all processes gives the right sum.
Exit codes: 0 all is well, 2 it is not, with every reason. (torchrun and accelerate end with 1 then.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from curvelora.errors import UserError

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    folder = "checked for being shared, for room and speed; made for that where it is not there, and removed again"
    parser.add_argument("--run-folder", type=Path, metavar="DIR", help=folder)
    gpus = "that every node has to show (default: one a process, where there are any)"
    parser.add_argument("--expect-gpus", type=int, metavar="N", help=gpus)
    disk = "free space that the run folder has to have (default %(default)g)"
    parser.add_argument("--min-disk", type=float, default=5.0, metavar="GIB", help=disk)
    skew = "that clocks may be apart (default %(default)g)"
    parser.add_argument("--max-skew", type=float, default=2.0, metavar="SECONDS", help=skew)
    timeout = "that a process is waited for, and that the all-reduce may take (default %(default)g)"
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help=timeout)
    sizes = "bytes of the all-reduces, such as 1M,64M,1G (default 1M,64M,256M on GPUs, 64K,1M,16M without)"
    parser.add_argument("--sizes", metavar="A,B,...", help=sizes)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what was found, also where it is refused")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed's launcher adds it


def run(args: argparse.Namespace) -> int:
    """Check, print a line a node and the all-reduce, and write the record. Raises `UserError` with all reasons to refuse."""
    sizes = _sizes(args)
    from curvelora_training.preflight.check import Asked, Machine, check
    from curvelora_training.preflight.judge import Bounds
    from curvelora_training.preflight.meeting import Absent, Meeting
    from curvelora_training.preflight.page import lines, record_of
    from curvelora_training.preflight.place import find_place, open_store

    bounds = Bounds(args.expect_gpus, int(args.min_disk * UNITS["G"]), args.max_skew)
    place = find_place()
    meeting = Meeting(open_store(place, args.timeout), place, args.timeout)
    try:
        fine, found = check(meeting, Asked(args.run_folder, bounds, sizes), Machine())
        if found is None:  # the first process speaks for all
            return 0 if fine else 2
        print("\n".join(lines(found)), flush=True)
        if args.json is not None:
            from curvelora_eval.files import make_folder, write_json

            make_folder(args.json.parent)
            write_json(args.json, record_of(found, place))
    except Absent:
        if meeting.first:
            raise
        return 2
    finally:
        meeting.part()
    if not fine:
        refusals = found.verdict.refusals
        count = "one reason" if len(refusals) == 1 else f"{len(refusals)} reasons"
        raise UserError(f"preflight refuses, for {count}:\n" + "\n".join(f"  - {text}" for text in refusals))
    return 0


def _sizes(args: argparse.Namespace) -> tuple[int, ...] | None:
    """The sizes in bytes; `UserError` with everything that is wrong with the options."""
    problems = [
        f"--{name.replace('_', '-')} is {value:g}: write a number above 0"
        for name in ("timeout", "max_skew")
        if not (value := getattr(args, name)) > 0
    ]
    problems += [
        f"--{name.replace('_', '-')} is {value:g}: write 0 or more"
        for name in ("min_disk", "expect_gpus")
        if (value := getattr(args, name)) is not None and not value >= 0
    ]
    found = []
    for part in args.sizes.split(",") if args.sizes is not None else []:
        text = part.strip().upper().removesuffix("B").removesuffix("I")
        unit = UNITS.get(text[-1:], 1)
        number = text[:-1] if text[-1:] in UNITS else text
        if number.isdecimal() and 4 <= int(number) * unit <= 4 * UNITS["G"]:
            found.append(int(number) * unit)
        else:
            problems.append(f"--sizes: {part.strip()!r} is no size from 4 bytes to 4G: write 1M,64M,1G or the like")
    if problems:
        raise UserError("; ".join(problems))
    return tuple(sorted(found)) or None
