"""Submit a run to SLURM: check it here, write its script into the run folder, hand it to sbatch.

    curvelora launch --recipe llama2_70b_samsum_loran --nodes 4 --gpus-per-node 8 --time 24:00:00
    curvelora launch --recipe my.yaml --nodes 2 --launcher deepspeed --engine zero3 output=runs/mine seed=43

The job saves before its time limit, is queued again and goes on by itself, until the run is complete. --print shows the script
and submits nothing; --dry-run says what was checked. What every job of a cluster needs (partition, account, module load) stands
in the site file, see --show-site. A step has the recipe's rows, batch_size x accumulation, on any number of processes; either of
the two among the overrides is taken as it stands.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from curvelora.errors import UserError
from curvelora_training.launch.job import LAUNCHERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a recipe of the project, or a file")
    group = parser.add_argument_group("size")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="(default 1)")
    group.add_argument("--gpus-per-node", type=int, metavar="N", help="one process each; 0 runs on CPUs")
    group.add_argument("--gpu-type", metavar="NAME", help="as the cluster names it, for example h100")
    group.add_argument("--processes-per-node", type=int, default=0, metavar="N", help="with --gpus-per-node 0")
    group.add_argument("--cpus-per-gpu", type=int, metavar="N", help="CPU cores of each process (default 8 with GPUs)")
    group.add_argument("--mem", metavar="SIZE", help="host memory of a node, for example 480G; 0 is all of it")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--launcher", choices=LAUNCHERS, default="torchrun", help="(default torchrun)")
    engine = "zero1, zero2, zero3, fsdp2 or another file of ds_configs; ddp (default, with deepspeed zero2)"
    group.add_argument("--engine", metavar="NAME", help=engine)
    group.add_argument("--output", metavar="DIR", help="the run folder, in place of the recipe's output")
    group.add_argument("--resume", action="store_true", help="continue the run that the folder holds")
    group.add_argument(
        "--evaluate-after",
        metavar="DATA",
        help="score these rows, not data.test, in a job of its own when the run is done",
    )
    group = parser.add_argument_group("queue")
    group.add_argument("--name", help="of the job (default: the recipe's file name)")
    for option in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{option}", metavar="NAME", help="as sbatch has it")
    group.add_argument("--time", metavar="LIMIT", help="of one job, HH:MM:SS or D-HH:MM:SS; the run may take longer")
    warning = "how long before the limit it saves and is queued again (default %(default)s)"
    group.add_argument("--warning-seconds", type=int, default=300, metavar="N", help=warning)
    bound = "starts that the script asks for, then it gives up; not SLURM's own, after a preemption (default 20)"
    group.add_argument("--max-requeues", type=int, default=20, metavar="N", help=bound)
    group.add_argument("--dependency", metavar="afterok:ID", help="start after another job")
    group = parser.add_argument_group("instead of submitting")
    group.add_argument("--print", action="store_true", dest="show", help="show the script")
    group.add_argument("--dry-run", action="store_true", help="check what can be checked here")
    unchecked = "leave out the checks of model and rows, which may lie where only compute nodes see them"
    group.add_argument("--unchecked", action="store_true", help=unchecked)
    group.add_argument("--show-site", action="store_true", help="show the site file's path, keys and values")


def run(args: argparse.Namespace) -> int:
    """Check, and show, check or submit. Exit code 2 where something is wrong, in words."""
    from curvelora_training.launch.site import load_site, site_path

    if args.show_site:
        state = "is read" if site_path().is_file() else "is not there, so these are the defaults"
        print(f"# {site_path()} {state}\n{load_site().as_yaml()}", end="")
        return 0
    if not args.recipe:
        raise UserError("--recipe is missing: name a recipe of the project, or a file")
    from curvelora_training.launch.plan import plan
    from curvelora_training.launch.render import render

    planned = plan(args)
    if args.show:
        print(render(planned.by_hand()), end="")
        print("\n".join(planned.notes), file=sys.stderr)
        return 0
    from curvelora_training.launch.checks import check_all
    from curvelora_training.launch.cluster import NO_SLURM
    from curvelora_training.launch.submission import submit_all

    if shutil.which("sbatch") is None and not args.dry_run:
        raise UserError(NO_SLURM)
    found = check_all(planned, resume=args.resume, contents=not args.unchecked, evaluate=args.evaluate_after)
    if args.dry_run:
        print("\n".join([*found.lines, *planned.notes, "nothing was submitted"]))
        return 2 if found.problems else 0
    found.report()
    return submit_all(planned, args.evaluate_after)
