"""Merge an adapter into its unquantised base: a plain checkpoint that needs neither PEFT nor this package.

The base model and the task are read from the adapter's own folder (task.json, written by training); any of them can be given
here instead. Logits are compared on some rows before and after, and what changed is printed and written to merge.json. The
folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from curvelora.errors import UserError
from curvelora_eval.spec import DataSpec, ModelSpec, TaskKind, TaskSpec, write_task
from curvelora_eval.wording import percent

if TYPE_CHECKING:
    from curvelora.output_change import OutputChange
    from curvelora_eval.merge import Plan
    from curvelora_eval.merge_probe import Probe
    from curvelora_eval.tasks import Task

ROWS = 64  # of --data: their logits are kept in memory
AGREEMENT, RELATIVE = 0.99, 0.05  # a merged model that is further away than this should be evaluated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora merge`."""
    parser.add_argument("--adapter", required=True, type=Path, help="folder of a saved adapter")
    parser.add_argument("--out", required=True, type=Path, help="folder for the merged checkpoint; new or empty")
    parser.add_argument(
        "--approximate", action="store_true", help="merge also where that gives another function (AuroRA, dynamic mode)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to merge (default: the GPU if there is one)")
    rows = parser.add_argument_group("rows on which the models are compared (default: a few fixed sentences or images)")
    rows.add_argument("--data", help="file, folder or hub name with labelled rows")
    rows.add_argument("--split", help="split of a data set that has several")
    rows.add_argument("--limit", type=int, help=f"compare on the first so many rows (default {ROWS})")
    rows.add_argument("--batch-size", type=int, default=8, help="rows a batch (default 8)")
    base = parser.add_argument_group("model and task (default: what the adapter was trained with, unquantised)")
    base.add_argument("--model", help="folder or hub name of the unquantised base model")
    base.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="dtype of the merged checkpoint")
    base.add_argument("--task", choices=get_args(TaskKind), help="task kind")
    base.add_argument(
        "--column", action="append", default=[], metavar="ROLE=COLUMN", help="column or template of a role; repeatable"
    )
    base.add_argument("--labels", help="class names, comma-separated, in order of their index")
    base.add_argument("--max-length", type=int, help="cut inputs to this many tokens")
    base.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    # `resolve` asks for these, and merging has no use for them
    parser.set_defaults(quantization=None, metrics=None, max_new_tokens=None)


def run(args: argparse.Namespace) -> int:
    """Check everything, then load, compare, merge, compare and write."""
    import torch

    from curvelora.loading import check_fits, read_adapter_config, stored_shapes
    from curvelora_eval.eval_command import resolve
    from curvelora_eval.files import write_json, write_text
    from curvelora_eval.merge import Plan, check_base, check_mergeable, merge_into, whole_folder
    from curvelora_eval.models import default_device, load_processor, shape_model
    from curvelora_eval.tasks import make_task
    from curvelora_eval.trained_on import trained_on

    _check_numbers(args)
    model_spec, task_spec = resolve(args)
    config = read_adapter_config(args.adapter)
    check_mergeable(args.adapter, config, args.approximate)
    stored_shapes(args.adapter)
    _check_out(args.out)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and there is none here: leave it out")
    task = make_task(task_spec)
    if task.new_head and task_spec.kind != "regression" and task_spec.labels is None:
        raise UserError(
            "the class names are not known: give them in order of their index, for example --labels negative,positive"
        )
    base = dataclasses.replace(model_spec, quantization="none")
    check_base(base, task)
    check_fits(shape_model(base, task), args.adapter)
    probe = _probe(args, task)
    plan = Plan(
        adapter=args.adapter,
        config=config,
        base=base,
        trained_on=trained_on(args.adapter, task, args.trust_remote_code),
        task=task,
        probe=probe,
        processor=load_processor(base, task),
        device=torch.device(args.device) if args.device else default_device(),
    )
    merged = dataclasses.replace(base, path=str(args.out), revision=None, trust_remote_code=False)
    with whole_folder(args.out) as folder:
        changes = merge_into(plan, folder)
        record = merge_record(plan, changes)
        lines = summary(plan, changes)
        again = scoring(merged, task_spec)
        write_json(folder / "merge.json", record)
        write_text(folder / "README.md", model_card(plan, record, lines, again))
        write_task(folder, merged, task_spec)
    print("\n".join(lines))
    print(f"written: {args.out}\nscore it: {again}")
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("limit", "batch_size", "max_length"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {number}")
    for name in ("limit", "split"):
        if getattr(args, name) is not None and not args.data:
            raise UserError(f"--{name} says which rows of --data: give --data as well, or leave it out")


def _check_out(out: Path) -> None:
    """Raise `UserError` where `out` is not new or empty, or cannot be put in its place."""
    from curvelora_eval.files import check_folder

    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty, and nothing in it is replaced: name another output folder")
    place = out.resolve()
    if place.is_mount() or place == Path.cwd():
        raise UserError(f"{out} is the folder you are in or the root of a disk, and cannot be replaced: name one in it")
    check_folder(out)
    check_folder(place.parent)  # where it is written under a temporary name


def _probe(args: argparse.Namespace, task: Task) -> Probe:
    """The rows of --data, or the fixed ones."""
    from curvelora_eval.data import fingerprint, load_rows
    from curvelora_eval.merge_probe import Probe, fixed_probe

    if not args.data:
        return fixed_probe(task, args.batch_size)
    rows = load_rows(DataSpec(path=args.data, split=args.split, limit=args.limit or ROWS))
    task.check(rows, args.data)
    source = {"path": args.data, "split": args.split, "sha256": fingerprint(args.data), "rows": len(rows)}
    return Probe(task, rows, args.batch_size, source, labelled=True)


def merge_record(plan: Plan, changes: dict[str, OutputChange]) -> dict[str, Any]:
    """The content of merge.json, as in `docs/results_format.md`."""
    from curvelora.loading import WEIGHTS_FILE
    from curvelora_eval.data import fingerprint
    from curvelora_eval.environment import describe_environment

    drift: dict[str, Any] = dict.fromkeys(("gap", "merge", "trained"))
    for name, change in changes.items():  # JSON has no NaN and no infinity
        drift[name] = {k: v if v is None or math.isfinite(v) else None for k, v in change.as_dict().items()}
    before, method = plan.trained_on, plan.method
    return {
        "schema": 1,
        "kind": "merge",
        "base": {"path": plan.base.path, "revision": plan.base.revision},
        "adapter": {"path": str(plan.adapter), "sha256": fingerprint(plan.adapter / WEIGHTS_FILE)},
        "method": plan.name,
        "settings": method.settings(plan.config) if method else {},
        "merge": method.merge(plan.config).value if method else None,
        "trained_on": before
        and {
            "path": before.spec.path,
            "revision": before.spec.revision,
            "quantization": before.storage,
            "dtype": before.spec.dtype,
        },
        "merged_into": {"quantization": "none", "dtype": plan.base.dtype},
        "task": plan.task.spec.kind,
        "probe": plan.probe.source,
        "drift": drift,
        **describe_environment(),
    }


def summary(plan: Plan, changes: dict[str, OutputChange]) -> list[str]:
    """What was done and what it changed, in plain words."""
    dtype, before = plan.base.dtype, plan.trained_on
    where = before and ("it" if before.spec.path == plan.base.path else before.spec.path)
    note = f"; the adapter was trained on {where}" if before and (plan.from_quantised or where != "it") else ""
    note += f" in {before.storage}" if plan.from_quantised else ""
    kind = f", merge {plan.method.merge(plan.config).value}" if plan.method else ""
    source = plan.probe.source
    lines = [
        f"base: {plan.base.path}, unquantised, in {dtype}{note}",
        f"method: {plan.title}{kind}",
        f"compared on: {source['what'] if source['path'] is None else '{rows} rows of {path}'.format(**source)}",
    ]
    words = {
        "gap": "adapter and its merged form, before any weight is rounded",
        "merge": f"adapter and merged checkpoint, in {dtype}",
        "trained": f"as trained, on {before.storage} in {before.spec.dtype}, and merged checkpoint" if before else "",
    }
    unit = "tokens" if plan.task.spec.kind in ("causal_lm", "seq2seq") else "rows"
    lines += [f"{words[name]}: {describe_change(change, unit)}" for name, change in changes.items()]
    if plan.from_quantised and "trained" not in changes:
        lines.append(f"{words['trained']}: not measured, because {before.spec.path} cannot be loaded here")
    far = [change for change in changes.values() if is_far(change)]
    if far:
        lines.append("warning: the merged model does not act as the adapter did, so evaluate it before it is used")
    return lines


def describe_change(change: OutputChange, unit: str) -> str:
    """For example `logits differ by 0.31 % (at most 0.012), same answer on 99.2 % of 64 rows, loss 0.4312 -> 0.4315`."""
    if not math.isfinite(change.relative + change.largest):
        return f"the logits are not finite, over {change.positions} {unit}"
    text = f"logits differ by {percent(change.relative)} (at most {change.largest:.2g})"
    where = f"{change.positions} {unit}"
    text += f" over {where}" if change.agreement is None else f", same answer on {percent(change.agreement)} of {where}"
    if change.reference_loss is not None:
        text += f", loss {change.reference_loss:.4f} -> {change.changed_loss:.4f}"
    return text


def is_far(change: OutputChange) -> bool:
    """Whether a change is large enough to advise an evaluation."""
    if not math.isfinite(change.relative):
        return True
    return change.relative > RELATIVE if change.agreement is None else change.agreement < AGREEMENT


def scoring(merged: ModelSpec, task: TaskSpec) -> str:
    """The command that scores the merged checkpoint, with what it cannot know by itself."""
    words = ["curvelora", "eval", "--model", merged.path, "--dtype", merged.dtype, "--task", task.kind]
    words += [word for role, column in task.columns.items() for word in ("--column", f"{role}={column}")]
    words += ["--labels", ",".join(task.labels)] if task.labels else []
    words += ["--metrics", ",".join(task.metrics)] if task.metrics else []
    for name in ("max_length", "max_new_tokens"):
        if getattr(task, name) != getattr(TaskSpec(kind=task.kind), name):
            words += [f"--{name.replace('_', '-')}", str(getattr(task, name))]
    return f"{shlex.join(words)} --data ROWS --out SCORES"


def model_card(plan: Plan, record: dict[str, Any], lines: list[str], again: str) -> str:
    """Markdown with the metadata block that the hub reads."""
    method = plan.method
    settings = [f"| {key} | {value} |" for key, value in record["settings"].items()]
    return "\n".join(
        [
            *("---", f"base_model: {plan.base.path}", "library_name: transformers"),
            *(f"tags: [{plan.name}, curvelora]", "---", "", f"# {Path(plan.base.path).name} with a merged adapter", ""),
            *([f"{method.title}; {method.paper}.", "", f"    {method.formula}", ""] if method else []),
            *(
                "A plain transformers checkpoint: it needs neither PEFT nor curvelora. merge.json has the same as numbers.",
                "",
            ),
            *(f"- {line}" for line in lines),
            *(["", "| setting | value |", "|---|---|", *settings] if settings else []),
            *("", "Score it:", "", f"    {again}", ""),
        ]
    )
