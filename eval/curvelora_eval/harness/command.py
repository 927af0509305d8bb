"""Run lm-evaluation-harness with an adapter (or a bare model), offline.

--task names our tasks: their rows and texts are written as lm-eval's local task files below --out, so lm-eval scores the same
requests as `curvelora eval` with protocol loglikelihood. --harness-task names lm-eval's own tasks, or those of a folder given
with --include. Writes tasks/, results.json and samples_TASK.jsonl into --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval import language_model

PINNED = "0.4.13"
INSTALL = f"pip install lm-eval=={PINNED}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora lm-eval`."""
    language_model.add_arguments(parser)
    parser.add_argument("--task", help="our tasks, comma-separated: boolq,arc_easy (`curvelora tasks` lists them)")
    parser.add_argument(
        "--data-dir", type=Path, help="folder with the rows of our tasks; without it they come from the hub"
    )
    parser.add_argument("--harness-task", help="lm-eval's own tasks, or those of --include, comma-separated")
    parser.add_argument(
        "--include",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder of task files in lm-eval's format; repeatable. They can run Python code of that folder",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for task files, results and the scores of every row"
    )
    parser.add_argument("--split", help="split of our tasks (default: each task's own)")
    parser.add_argument("--limit", type=int, help="score only the first so many rows of each task")
    parser.add_argument(
        "--num-fewshot", type=int, help="examples before each row (default 0; lm-eval's tasks say themselves)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="requests a batch (default 32)")


def run(args: argparse.Namespace) -> int:
    """Check everything, write the task files, load, run lm-eval, keep what it says."""
    ours, theirs = check(args)
    from curvelora_eval import benchmarks
    from curvelora_eval.environment import describe_environment
    from curvelora_eval.files import check_folder, make_folder
    from curvelora_eval.harness import run as harness
    from curvelora_eval.harness.model import AdaptedModel
    from curvelora_eval.harness.task_files import loglikelihood, task_facts, task_name, write_task

    chosen = [benchmarks.get(name) for name in ours]
    for benchmark in chosen:
        loglikelihood(benchmark)
    spec = language_model.base_of(args)
    check_folder(args.out)
    rows = {benchmark.name: load_splits(benchmark, args) for benchmark in chosen}
    make_folder(args.out)
    for benchmark in chosen:
        write_task(args.out / "tasks", benchmark, rows[benchmark.name], args.num_fewshot or 0)
    names = [*map(task_name, chosen), *theirs]
    manager = harness.find_tasks(names, [*args.include, *([args.out / "tasks"] if chosen else [])])
    model, tokenizer = language_model.load(spec, args.adapter)
    facts: dict[str, Any] = {"model": vars(spec), "adapter": language_model.adapter_facts(args.adapter)}
    wrapped = AdaptedModel(model, tokenizer, args.batch_size, facts)
    started = time.perf_counter()
    results = harness.evaluate(wrapped, names, manager, args.num_fewshot, args.limit)
    facts |= {"seconds": time.perf_counter() - started, "requests_cut": wrapped.cut}
    facts["tasks"] = {task_name(one): task_facts(one, rows[one.name]["test"]) for one in chosen}
    kept = harness.keep(args.out, results, facts | describe_environment())
    print(harness.table(results, {task: about["rows_in_words"] for task, about in facts["tasks"].items()}))
    if wrapped.cut:
        print(
            f"{wrapped.cut} requests were longer than the model's {wrapped.max_length} tokens: lm-eval cut their beginning off"
        )
    print(f"written: {kept}")
    return 0


def check(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(our tasks, lm-eval's tasks) that are asked for.

    Raises:
        UserError: lm-eval is not installed, there is no task, a number makes no sense, or several processes were started.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"lm-evaluation-harness is not installed, and this command runs it: {INSTALL}")
    given = (args.task, args.harness_task)
    ours, theirs = ([name.strip() for name in (text or "").split(",") if name.strip()] for text in given)
    if not ours and not theirs:
        raise UserError("there is no task to run: name ours with --task, or lm-eval's own with --harness-task")
    for name, least in (("limit", 1), ("batch_size", 1), ("num_fewshot", 0)):
        if (number := getattr(args, name)) is not None and number < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {number}")
    if missing := [folder for folder in args.include if not folder.is_dir()]:
        raise UserError(f"{missing[0]} is no folder: --include takes a folder of task files")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("lm-eval runs a loaded model in one process: start this without a launcher")
    return ours, theirs


def load_splits(benchmark: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The rows to score as "test", and with --num-fewshot those of the training split as "fewshot".

    Raises:
        UserError: no such split, rows that cannot be read or scored, or no training rows to take examples from.
    """
    from curvelora_eval import benchmarks

    splits = {"test": benchmarks.load(benchmark, args.data_dir, args.split, args.limit)}
    if args.num_fewshot:
        if "train" not in benchmark.splits:
            raise UserError(f"{benchmark.name} has no split train to take --num-fewshot examples from: leave it at 0")
        splits["fewshot"] = benchmarks.load(benchmark, args.data_dir, "train", None)
    for loaded in splits.values():
        benchmark.protocols["loglikelihood"].check(loaded.rows)
    return splits


if __name__ == "__main__":
    import sys

    from curvelora.cli import run_guarded, run_module

    sys.exit(run_guarded(lambda: run_module(sys.modules[__name__], "curvelora lm-eval", sys.argv[1:])))
