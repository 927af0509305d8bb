"""`curvelora eval --data`: an adapter, or a bare model, on labelled rows of the user's own."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from curvelora.errors import UserError
from curvelora.loading import WEIGHTS_FILE, check_fits, load_adapter, read_adapter_config, stored_shapes
from curvelora_eval.data import fingerprint, load_rows
from curvelora_eval.environment import describe_environment
from curvelora_eval.evaluation.arms import labels
from curvelora_eval.evaluator import describe_interval, evaluate_rows, prediction_lines
from curvelora_eval.files import check_folder, make_folder, write_json, write_text
from curvelora_eval.models import load_base, load_processor, shape_model
from curvelora_eval.resolve import resolve
from curvelora_eval.spec import DataSpec
from curvelora_eval.tasks import make_task


def evaluate_own_rows(args: argparse.Namespace) -> int:
    """One adapter after another; several write into a folder each, by their labels."""
    if len(args.adapter) < 2:
        return _one(args, args.adapter[0] if args.adapter else None, args.out)
    for label, adapter in zip(labels(args.adapter), args.adapter, strict=True):
        print(label)
        _one(args, adapter, args.out / label)
    return 0


def _one(args: argparse.Namespace, adapter: Path | None, folder: Path) -> int:
    """Check everything, then load, predict, score and write."""
    for name in ("limit", "batch_size"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {number}")
    model_spec, task_spec = resolve(args, adapter)
    task = make_task(task_spec)
    task.check_metrics()
    trained: list[str] = []
    if adapter:
        trained = getattr(read_adapter_config(adapter), "modules_to_save", None) or []
        stored_shapes(adapter)
    check_folder(folder)
    data = DataSpec(path=args.data, split=args.split, limit=args.limit)
    rows = load_rows(data)
    if task.new_head and task_spec.kind != "regression" and task_spec.labels is None:
        raise UserError(
            "the class names are not known: give them in order of their index, for example --labels negative,positive"
        )
    task.check(rows, args.data)
    if adapter:
        check_fits(shape_model(model_spec, task), adapter)
    processor = load_processor(model_spec, task)
    model = load_base(model_spec, task, trained=trained)
    if adapter:
        model = load_adapter(model, adapter)
    result, predicted = evaluate_rows(model, task, rows, processor, args.batch_size)
    result |= {
        "model": dataclasses.asdict(model_spec),
        "adapter": adapter and {"path": str(adapter), "sha256": fingerprint(adapter / WEIGHTS_FILE)},
        "dataset": {"path": args.data, "split": args.split, "sha256": fingerprint(args.data), "rows": len(rows)},
        **describe_environment(),
    }
    out = make_folder(folder)
    write_text(out / "predictions.jsonl", prediction_lines(predicted.predictions, predicted.references))
    write_json(out / "evaluation.json", result)
    for name, value in result["metrics"].items():
        print(f"{name:<12} {describe_interval(value)}  ({len(rows)} rows)")
    print(f"written: {out / 'evaluation.json'}")
    return 0
