"""Which model and which task kind a command is about: the adapter's own, with what the command line says instead."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from curvelora.errors import UserError
from curvelora_eval.spec import ModelSpec, TaskSpec, read_task


def resolve(args: argparse.Namespace, adapter: Path | None = None) -> tuple[ModelSpec, TaskSpec]:
    """The model and task to use: the adapter's own, with what the command line says instead.

    Args:
        adapter: the one that this is about; None takes `args.adapter`, of several the first.

    Raises:
        UserError: neither the adapter nor the command line says what the model or the task is, or a malformed --column.
    """
    if adapter is None:
        adapter = args.adapter[0] if isinstance(args.adapter, list) and args.adapter else args.adapter or None
    stored = read_task(adapter) if adapter and adapter.is_dir() else None
    if stored is None and adapter and not adapter.is_dir():
        raise UserError(f"{adapter} is no folder: --adapter takes the folder of a saved adapter")
    if stored is None and not (args.model and args.task):
        where = f"{adapter} has no task.json" if adapter else "there is no --adapter to take them from"
        raise UserError(f"the base model and the task are not known ({where}): give --model and --task")
    model = dataclasses.asdict(stored[0]) if stored else {"path": args.model}
    task = dataclasses.asdict(stored[1]) if stored else {"kind": args.task}
    if args.task and args.task != task["kind"]:
        task = {"kind": args.task}  # columns, labels and metrics of another task mean nothing here
    if args.model and args.model != model["path"]:
        model["revision"] = None  # a commit of another repository
    model |= {k: v for k, v in (("path", args.model), ("dtype", args.dtype), ("quantization", args.quantization)) if v}
    # Never from the folder: an adapter from elsewhere must not switch this on.
    model["trust_remote_code"] = args.trust_remote_code
    task |= {k: v for k, v in (("max_length", args.max_length), ("max_new_tokens", args.max_new_tokens)) if v}
    columns = dict(task.get("columns") or {})
    for pair in args.column:
        role, separator, column = pair.partition("=")
        if not separator:
            raise UserError(f"--column takes ROLE=COLUMN, for example --column text=sentence, not {pair!r}")
        columns[role] = column
    task["columns"] = columns
    if args.labels:
        task["labels"] = args.labels.split(",")
    if args.metrics:
        task["metrics"] = args.metrics.split(",")
    return ModelSpec(**model), TaskSpec(**task)
