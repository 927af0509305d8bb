"""Train every method under every engine, on every base, and compare it with one process on the same global batches.

    curvelora matrix --processes 2 --out runs/matrix
    curvelora matrix --processes 2 --methods qlora,loran --stages 0,1,2,3 --bases bf16,nf4 --out runs/matrix

Starts torchrun itself: all cells of one kind share a process group, and LoRAN runs under each launcher too. What DIR has finished
is kept. After --time-limit no new cell begins and the exit code is 3: the same command goes on from there. Exit code 1 means that
a cell differs or failed. Combinations that cannot work have to be refused before anything is loaded, which is checked as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from curvelora.errors import UserError, nearest

NOT_FINISHED = 3
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
RESULTS, PAGE = Path("docs/results/distributed"), Path("docs/distributed_matrix.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("cells")
    every = "A,B,..."
    group.add_argument("--methods", metavar=every, help="see `curvelora methods` (default all)")
    stages = "0 (DistributedDataParallel), 1, 2, 3, 1_offload and the like, fsdp2 (default %(default)s)"
    group.add_argument("--stages", default="0,1,2,3,fsdp2", metavar=every, help=stages)
    group.add_argument("--bases", default="fp32,bf16,nf4", metavar=every, help="also int8 (default %(default)s)")
    group.add_argument("--tasks", metavar=every, help="classifier, lm (default both; with --model lm)")
    launchers = "with which LoRAN runs too, on the first task and base (default %(default)s; none: '')"
    group.add_argument("--launchers", default=",".join(LAUNCHERS), metavar=every, help=launchers)
    group = parser.add_argument_group("what trains")
    group.add_argument("--processes", type=int, default=2, metavar="N", help="of the process group (default 2)")
    own = "a checkpoint without dropout (default: tiny models with random weights, made on the spot)"
    group.add_argument("--model", metavar="PATH", help=own)
    group.add_argument("--data", metavar="TEXT", help="UTF-8 text with paragraphs (default: Shakespeare)")
    group.add_argument("--targets", metavar="NAMES", help="modules to adapt (with --model; default PEFT's)")
    group.add_argument("--seed", type=int, default=42, metavar="N", help="(default 42)")
    configs = "folder of the engines' files (default %(default)s)"
    group.add_argument("--configs", type=Path, default=Path("ds_configs"), metavar="DIR", help=configs)
    group = parser.add_argument_group("runs")
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="cells, runs and results.json")
    limit = "after which no new cell begins (default %(default)s)"
    group.add_argument("--time-limit", type=float, default=540, metavar="SECONDS", help=limit)
    group.add_argument("--again", action="store_true", help="make the cells anew that differ or failed")
    group.add_argument("--overwrite", action="store_true", help="replace what DIR holds")
    record = f"keep the results as {RESULTS}/NAME.json and write {PAGE} again"
    group.add_argument("--record", metavar="NAME", help=record)


def run(args: argparse.Namespace) -> int:
    """Check the options, make the cells, write results.json and the tables."""
    until = time.time() + args.time_limit
    chosen = choose(args)
    from curvelora_eval.environment import describe_environment
    from curvelora_eval.files import make_folder, write_json, write_text
    from curvelora_training.matrix.cells import Cell, all_cells, launched_cells
    from curvelora_training.matrix.matrix import FINE, open_matrix
    from curvelora_training.matrix.page import count_by_status, page, section

    if args.overwrite and (args.out / "matrix.json").is_file():
        shutil.rmtree(args.out)
    targets = args.targets.split(",") if args.targets else None
    matrix, settings = open_matrix(
        args.out,
        args.processes,
        args.configs,
        chosen["tasks"],
        model=args.model,
        data=args.data,
        targets=targets,
        seed=args.seed,
    )
    environment = describe_environment()
    matrix.until, matrix.commit = until, environment["commit"]
    matrix.say = lambda text: print(text, flush=True)
    cells = all_cells(*(chosen[name] for name in ("tasks", "bases", "methods", "engines")))
    shown = Cell(chosen["tasks"][0], chosen["bases"][0], "loran", "alone")
    cells += launched_cells(shown, chosen["launchers"], chosen["engines"])
    if args.again:
        matrix.forget([c for c in cells if (matrix.record(c) or {"status": FINE[0]})["status"] not in FINE])
    print(
        f"{len(cells)} cells, {sum(matrix.record(c) is not None for c in cells)} of them are there already", flush=True
    )
    matrix.make(cells)
    found = [record for cell in cells if (record := matrix.record(cell)) is not None]
    commits = sorted({str(record["commit"]) for record in found})
    results = {
        "schema": 1,
        "kind": "distributed_matrix",
        "settings": settings | chosen,
        "environment": environment,
        "commits": commits,
        "cells": found,
    }
    write_json(args.out / "results.json", results)
    print("\n" + "\n".join(section(results, args.out.name, [])))
    counts = ", ".join(f"{count} {status}" for status, count in count_by_status(found).items())
    print(f"{counts or 'none'} of {len(cells)} cells; results: {args.out / 'results.json'}")
    if args.record:
        make_folder(RESULTS)
        write_text(RESULTS / f"{args.record}.json", compact(results))
        write_text(PAGE, page(RESULTS))
        print(f"kept: {RESULTS / args.record}.json, {PAGE}")
    if len(found) < len(cells):
        print(f"the time limit of {args.time_limit:g} s is over: the same command goes on from here")
        return NOT_FINISHED
    return 1 if any(record["status"] not in FINE for record in found) else 0


def choose(args: argparse.Namespace) -> dict[str, list[str]]:
    """The values of every axis.

    Raises:
        UserError: everything that is wrong with the options, in one message.
    """
    from curvelora import METHODS
    from curvelora_training.matrix.cells import BASES
    from curvelora_training.matrix.ground import TASKS

    problems: list[str] = []

    def pick(option: str, text: str | None, known: Any) -> list[str]:
        found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip())) if text else list(known)
        for part in found:
            if part not in known:
                problems.append(f"{option}: there is no {part!r}{nearest(part, known)} (known: {', '.join(known)})")
        return found

    files = sorted(path.stem.removeprefix("zero") for path in args.configs.glob("zero*.json"))
    if not files:
        problems.append(
            f"--configs: {args.configs} holds no zero1.json and the like: run in the repository, or name its ds_configs folder"
        )
    stages = pick("--stages", args.stages, ["0", *files, "fsdp2"])
    chosen = {
        "tasks": pick("--tasks", args.tasks, TASKS if args.model is None else ["lm"] if args.tasks is None else TASKS),
        "bases": pick("--bases", args.bases, BASES),
        "methods": pick("--methods", args.methods, METHODS),
        "engines": [{"0": "ddp", "fsdp2": "fsdp2"}.get(stage, f"zero{stage}") for stage in stages],
        "launchers": pick("--launchers", args.launchers, LAUNCHERS) if args.launchers else [],
    }
    if args.processes < 2:
        problems.append(
            f"--processes must be at least 2, not {args.processes}: one process is what they are compared with"
        )
    if not args.time_limit > 0:
        problems.append("--time-limit must be above 0 seconds")
    if args.targets and args.model is None:
        problems.append("--targets is for --model: the tiny models have their own")
    if args.model is not None and not (Path(args.model) / "config.json").is_file():
        problems.append(f"--model: {args.model} is no checkpoint folder (it has no config.json)")
    if problems:
        raise UserError("; ".join(problems))
    return chosen


def compact(results: dict[str, Any]) -> str:
    """JSON with a line for each cell."""
    cells = ",\n".join(json.dumps(cell, allow_nan=False) for cell in results["cells"])
    head = json.dumps({k: v for k, v in results.items() if k != "cells"}, indent=1, allow_nan=False)
    return f'{head[:-2]},\n "cells": [\n{cells}\n ]\n}}\n'
