"""Score an adapter (or a bare model) on labelled rows, offline.

The base model and the task are read from the adapter's own folder (task.json, written by training); any of them can be given
here instead. Writes evaluation.json and predictions.jsonl into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

from curvelora.errors import UserError
from curvelora_eval.spec import DataSpec, ModelSpec, TaskKind, TaskSpec, read_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora eval`."""
    parser.add_argument("--adapter", type=Path, help="folder of a saved adapter; without it the bare model is scored")
    parser.add_argument("--data", required=True, help="file, folder or hub name with the rows to score")
    parser.add_argument("--out", required=True, type=Path, help="folder for evaluation.json and predictions.jsonl")
    parser.add_argument("--split", help="split of a data set that has several")
    parser.add_argument("--limit", type=int, help="score only the first so many rows")
    parser.add_argument("--batch-size", type=int, default=32, help="rows a batch (default 32)")
    base = parser.add_argument_group("model and task (default: what the adapter was trained with)")
    base.add_argument("--model", help="folder or hub name of the base model")
    base.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="storage and compute dtype of the base"
    )
    base.add_argument("--quantization", choices=("none", "nf4", "int8"), help="storage of the base's linear layers")
    base.add_argument("--task", choices=get_args(TaskKind), help="task kind")
    base.add_argument(
        "--column", action="append", default=[], metavar="ROLE=COLUMN", help="column or template of a role; repeatable"
    )
    base.add_argument("--labels", help="class names, comma-separated, in order of their index")
    base.add_argument("--metrics", help="metric names, comma-separated")
    base.add_argument("--max-length", type=int, help="cut inputs to this many tokens")
    base.add_argument("--max-new-tokens", type=int, help="generate at most this many tokens a row")
    base.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def run(args: argparse.Namespace) -> int:
    """Check everything, then load, predict, score and write."""
    from curvelora.loading import WEIGHTS_FILE, check_fits, load_adapter, read_adapter_config, stored_shapes
    from curvelora_eval.data import fingerprint, load_rows
    from curvelora_eval.environment import describe_environment
    from curvelora_eval.evaluator import evaluate_rows
    from curvelora_eval.files import check_folder, make_folder, write_json, write_text
    from curvelora_eval.models import load_base, load_processor, shape_model
    from curvelora_eval.tasks import make_task

    for name in ("limit", "batch_size"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {number}")
    model_spec, task_spec = resolve(args)
    task = make_task(task_spec)
    task.check_metrics()
    trained: list[str] = []
    if args.adapter:
        trained = getattr(read_adapter_config(args.adapter), "modules_to_save", None) or []
        stored_shapes(args.adapter)
    check_folder(args.out)
    data = DataSpec(path=args.data, split=args.split, limit=args.limit)
    rows = load_rows(data)
    if task.new_head and task_spec.kind != "regression" and task_spec.labels is None:
        raise UserError(
            "the class names are not known: give them in order of their index, for example --labels negative,positive"
        )
    task.check(rows, args.data)
    if args.adapter:
        check_fits(shape_model(model_spec, task), args.adapter)
    processor = load_processor(model_spec, task)
    model = load_base(model_spec, task, trained=trained)
    if args.adapter:
        model = load_adapter(model, args.adapter)
    result, predicted = evaluate_rows(model, task, rows, processor, args.batch_size)
    result |= {
        "model": dataclasses.asdict(model_spec),
        "adapter": args.adapter and {"path": str(args.adapter), "sha256": fingerprint(args.adapter / WEIGHTS_FILE)},
        "dataset": {"path": args.data, "split": args.split, "sha256": fingerprint(args.data), "rows": len(rows)},
        **describe_environment(),
    }
    out = make_folder(args.out)
    write_text(out / "predictions.jsonl", prediction_lines(predicted.predictions, predicted.references))
    write_json(out / "evaluation.json", result)
    for name, value in result["metrics"].items():
        print(f"{name:<12} {describe_interval(value)}  ({len(rows)} rows)")
    print(f"written: {out / 'evaluation.json'}")
    return 0


def resolve(args: argparse.Namespace) -> tuple[ModelSpec, TaskSpec]:
    """The model and task to use: the adapter's own, with what the command line says instead.

    Raises:
        UserError: neither the adapter nor the command line says what the model or the task is, or a malformed --column.
    """
    stored = read_task(args.adapter) if args.adapter and args.adapter.is_dir() else None
    if stored is None and args.adapter and not args.adapter.is_dir():
        raise UserError(f"{args.adapter} is no folder: --adapter takes the folder of a saved adapter")
    if stored is None and not (args.model and args.task):
        where = f"{args.adapter} has no task.json" if args.adapter else "there is no --adapter to take them from"
        raise UserError(f"the base model and the task are not known ({where}): give --model and --task")
    model = dataclasses.asdict(stored[0]) if stored else {"path": args.model}
    task = dataclasses.asdict(stored[1]) if stored else {"kind": args.task}
    if args.task and args.task != task["kind"]:
        task = {"kind": args.task}  # columns, labels and metrics of another task mean nothing here
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


def prediction_lines(predictions: list[Any], references: list[Any]) -> str:
    """JSON lines, a row each: row, prediction, reference."""
    rows = zip(predictions, references, strict=True)
    return "".join(json.dumps({"row": i, "prediction": p, "reference": r}) + "\n" for i, (p, r) in enumerate(rows))


def describe_interval(value: dict[str, Any]) -> str:
    """`0.8260 [0.7920, 0.8590]`, or why there is no value."""
    if value["value"] is None:
        return f"undefined ({value.get('reason', 'no reason given')})"
    return f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
