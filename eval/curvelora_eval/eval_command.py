"""Score adapters (or a bare model), offline: on named tasks with frozen protocols, or on labelled rows of your own.

    curvelora eval --model M --adapter A --adapter B --task boolq,piqa --data-dir D --out DIR
    curvelora eval --adapter A --data rows.jsonl --out DIR

Named tasks (`curvelora tasks` lists them) write DIR/LABEL/TASK/evaluation.json and predictions.jsonl, and DIR/summary.md; the
same command goes on where it was killed. Rows of your own take model, task kind and columns from the adapter's folder (task.json,
written by training); any of them can be given here instead. Runs under `torchrun` or `accelerate launch` on several GPUs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from curvelora.errors import UserError
from curvelora_eval.evaluator import describe_interval, prediction_lines
from curvelora_eval.resolve import resolve
from curvelora_eval.spec import TaskKind

__all__ = ["add_arguments", "describe_interval", "prediction_lines", "resolve", "run"]

BATCH_CHECK = 8  # rows asked again alone, where nothing else is said
# options that rows of your own do not have
NAMED_ONLY = (
    "data_dir",
    "protocol",
    "template",
    "baseline",
    "merge_check",
    "batch_check",
    "legacy_quirks",
    "overwrite",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora eval`."""
    parser.add_argument(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        help="folder of a saved adapter; repeatable; without it the bare model is scored",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--task", help="named tasks, comma-separated, or the task kind of --data")
    parser.add_argument("--split", help="split of a data set that has several")
    parser.add_argument("--limit", type=int, help="score only the first so many rows")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="rows (choices, windows of a text) a batch (default 32)"
    )
    base = parser.add_argument_group("model (default: what the adapter was trained with)")
    base.add_argument("--model", help="folder or hub name of the base model")
    base.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="storage and compute dtype of the base"
    )
    base.add_argument("--quantization", choices=("none", "nf4", "int8"), help="storage of the base's linear layers")
    base.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    named = parser.add_argument_group("named tasks")
    named.add_argument("--data-dir", type=Path, help="folder with the tasks' data; without it the hub is asked")
    named.add_argument("--protocol", help="how the task is asked and scored (default: the task's first)")
    named.add_argument("--template", help="wording of the prompt (default: the protocol's first)")
    named.add_argument("--baseline", action="store_true", help="score the bare model beside the adapters")
    named.add_argument(
        "--merge-check", action="store_true", help="score each adapter that merges exactly in its merged form as well"
    )
    named.add_argument(
        "--batch-check",
        type=int,
        metavar="N",
        help=f"ask N rows again, each alone, and say whether the batch size matters (default {BATCH_CHECK}; 0: do not)",
    )
    named.add_argument(
        "--legacy-quirks", metavar="NAME,...", help="bring back defects of the papers' scripts, or all of them"
    )
    named.add_argument("--overwrite", action="store_true", help="replace results of other evaluations in --out")
    own = parser.add_argument_group("rows of your own")
    own.add_argument("--data", help="file, folder or hub name with the rows to score")
    own.add_argument(
        "--column", action="append", default=[], metavar="ROLE=COLUMN", help="column or template of a role; repeatable"
    )
    own.add_argument("--labels", help="class names, comma-separated, in order of their index")
    own.add_argument("--metrics", help="metric names, comma-separated")
    own.add_argument("--max-length", type=int, help="cut inputs to this many tokens (also for heads of named tasks)")
    own.add_argument("--max-new-tokens", type=int, help="generate at most this many tokens a row")


def run(args: argparse.Namespace) -> int:
    """Check everything, then load, predict, score and write."""
    if args.data:
        _check_kind(args)
        from curvelora_eval.own_rows import evaluate_own_rows

        return evaluate_own_rows(args)
    if not args.task:
        raise UserError(
            "there is nothing to score: name tasks (--task boolq,piqa; `curvelora tasks` lists them), or a file of your own rows "
            "(--data)"
        )
    if args.batch_check is None:
        args.batch_check = BATCH_CHECK
    from curvelora_eval.evaluation.ask import ask
    from curvelora_eval.evaluation.work import Work
    from curvelora_eval.predict.processes import join_processes

    processes = join_processes()
    Work(processes.each_after_first(lambda: ask(args)), args, processes).do()
    return 0


def _check_kind(args: argparse.Namespace) -> None:
    """Raise `UserError` where --data comes with what belongs to named tasks, or in several processes."""
    kinds = get_args(TaskKind)
    if args.task and args.task not in kinds:
        raise UserError(
            f"--data is for rows of your own, and {args.task!r} is no task kind ({', '.join(kinds)}): leave --data out to score "
            "a named task, whose rows are found below --data-dir"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--data is scored by one process, and several were started, each of which would score all rows and write the same "
            "files: start it without torchrun or accelerate launch"
        )
    for name in NAMED_ONLY:
        if getattr(args, name) is not None and getattr(args, name) is not False:
            raise UserError(
                f"--{name.replace('_', '-')} is for named tasks, and --data for rows of your own: give one of them"
            )
