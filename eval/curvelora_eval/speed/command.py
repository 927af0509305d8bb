"""Rows a second of `curvelora eval`'s engine beside the batch-1 loop of the papers' scripts, on the same model and rows.

The loop answers a sample of the rows, one at a time; the engine answers all of them at each batch size. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from curvelora.errors import UserError
from curvelora_eval import language_model

KIND = "evaluation_speed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora bench eval`."""
    language_model.add_arguments(parser)
    parser.add_argument("--task", help="tasks with the protocol llm-adapters, comma-separated: boolq,gsm8k")
    parser.add_argument("--template", help="their template (default: the protocol's first)")
    parser.add_argument("--data-dir", type=Path, help="folder with the tasks' rows; without it they come from the hub")
    parser.add_argument("--rows", type=int, help="rows for the engine, the first so many (default: all)")
    parser.add_argument(
        "--original-rows", type=int, default=32, help="rows for the loop, drawn from those (default 32)"
    )
    parser.add_argument("--batch-sizes", default="32,128", help="of the engine, comma-separated (default 32,128)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print such files as Markdown instead")


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, measure task after task, write."""
    from curvelora_eval.speed.table import markdown

    if args.table:
        print(markdown([read(path) for path in args.table]))
        return 0
    sizes = check(args)
    from curvelora_eval import benchmarks
    from curvelora_eval.environment import describe_environment
    from curvelora_eval.files import check_folder, make_folder, write_json
    from curvelora_eval.speed.measure import measure

    chosen = [benchmarks.get(name) for name in args.task.split(",")]
    protocols = [one.protocol("llm-adapters") for one in chosen]  # whose scripts the loop is that of
    templates = [protocol.template(args.template) for protocol in protocols]
    spec = language_model.base_of(args)
    check_folder(args.out.parent)
    rows = benchmarks.load_all(chosen, args.data_dir, None, args.rows)
    model, tokenizer = language_model.load(spec, args.adapter)
    record = {
        "schema": 1,
        "kind": KIND,
        "model": vars(spec),
        "adapter": language_model.adapter_facts(args.adapter),
        "seed": args.seed,
        **describe_environment(),
        "tasks": [],
    }
    make_folder(args.out.parent)
    for one, protocol, template, loaded in zip(chosen, protocols, templates, rows, strict=True):
        record["tasks"].append(
            measure(model, tokenizer, one, loaded, protocol, template, args.original_rows, sizes, args.seed)
        )
        write_json(args.out, record)  # after every task: a machine may be taken back
    print(markdown([record]))
    print(f"written: {args.out}")
    return 0


def check(args: argparse.Namespace) -> list[int]:
    """The batch sizes.

    Raises:
        UserError: something is missing, or a number makes no sense.
    """
    for name in ("task", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing: it is needed unless --table prints what was measured before")
    for name in ("rows", "original_rows"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {number}")
    sizes = args.batch_sizes.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--batch-sizes takes whole numbers from 1 on, comma-separated, not {args.batch_sizes!r}")
    return [int(size) for size in sizes]


def read(path: Path) -> dict:
    """What an earlier run wrote.

    Raises:
        UserError: no such file, or another one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a speed file: {error}") from error
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise UserError(f"{path} is no speed file: `curvelora bench eval --out FILE` writes one")
    return record
