"""List the named tasks, or explain one: splits, protocols and versions, source, an example.

With --data-dir every file that lies there is read and checked, and a smaller copy than the published one is named
"subset n of N".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from curvelora.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora tasks`."""
    parser.add_argument("name", nargs="?", help="explain this task")
    parser.add_argument("--data-dir", type=Path, help="folder with the tasks' data (layout: docs/tasks.md)")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of objects, or one object for NAME")
    parser.add_argument("--markdown", action="store_true", help="print the list as a Markdown table")


def run(args: argparse.Namespace) -> int:
    """Print the list or the explanation."""
    from curvelora_eval import benchmarks
    from curvelora_eval.benchmarks.describe import describe, explanation, markdown, table

    if args.markdown and (args.json or args.name):
        what = "--json" if args.json else f"the name {args.name}"
        raise UserError(
            f"--markdown prints the whole list as a table and does not go with {what}: leave one of them out"
        )
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise UserError(f"--data-dir {args.data_dir} is no folder: name the folder that holds the tasks' data")
    chosen = [benchmarks.get(name) for name in ([args.name] if args.name else benchmarks.BENCHMARKS)]
    described = [describe(benchmark, args.data_dir) for benchmark in chosen]
    if args.json:
        print(json.dumps(described[0] if args.name else described, indent=2))
    elif args.markdown:
        print(markdown(described))
    elif args.name:
        there = [name for name, split in described[0]["splits"].items() if split.get("found")]
        split = chosen[0].default_split if chosen[0].default_split in there else next(iter(there), None)
        loaded = benchmarks.load(chosen[0], args.data_dir, split, limit=1) if split else None
        print(explanation(chosen[0], described[0], loaded))
    else:
        print(table(described))
    return 0
