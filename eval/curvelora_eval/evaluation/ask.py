"""From arguments to a plan: everything that can be checked is checked here, before any weights load, and said at once."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from safetensors import safe_open

from curvelora.errors import UserError
from curvelora.loading import check_fits
from curvelora_eval import benchmarks
from curvelora_eval.benchmarks import quirks
from curvelora_eval.benchmarks.protocols import GenerateProtocol, HeadProtocol
from curvelora_eval.evaluation.arms import BASELINE, Arm, labels, read_arm
from curvelora_eval.evaluation.checkpoint_hash import checkpoint_folder, checkpoint_hash
from curvelora_eval.evaluation.finished import labels_of, read_results
from curvelora_eval.evaluation.own_classes import own_classes
from curvelora_eval.evaluation.problems import Problems
from curvelora_eval.evaluation.question import Question
from curvelora_eval.files import check_folder
from curvelora_eval.models import HEADS, load_config, load_processor, shape_model
from curvelora_eval.predict.base import padding_token
from curvelora_eval.spec import ModelSpec, TaskKind, TaskSpec
from curvelora_eval.tasks import make_task

OWN_ROWS = {"column": "--column", "labels": "--labels", "metrics": "--metrics", "max_new_tokens": "--max-new-tokens"}


@dataclass(frozen=True)
class Plan:
    """What is asked of which models, checked.

    Args:
        model: the base.
        arms: the adapters, and the bare model where that was asked for.
        questions: the tasks.
        notes: sentences for the user.
    """

    model: ModelSpec
    arms: list[Arm]
    questions: list[Question]
    notes: list[str]


def ask(args: argparse.Namespace) -> Plan:
    """Resolve and check the arguments of `curvelora eval --task NAME,...`.

    Raises:
        UserError: all that is wrong, a line each.
    """
    problems = Problems()
    _check_numbers(args, problems)
    questions = _questions(args, problems)
    arms = _arms(args, problems)
    with problems.collect():
        check_folder(args.out)
    spec = None
    with problems.collect():
        spec = model_spec(args, arms)
    if spec is not None:
        arms = [replace(arm, notes=base_notes(arm, spec)) for arm in arms]
        with problems.collect():
            arms = [arm if arm.folder else replace(arm, classes=own_classes(spec)) for arm in arms]
        _check_models(spec, arms, questions, problems)
    problems.refuse()
    return Plan(spec, arms, questions, [note for arm in arms for note in arm.notes])


def _check_numbers(args: argparse.Namespace, problems: Problems) -> None:
    for name, least in (("limit", 1), ("batch_size", 1), ("batch_check", 0), ("max_length", 1)):
        if (number := getattr(args, name)) is not None and number < least:
            problems.add(f"--{name.replace('_', '-')} must be at least {least}, not {number}")
    for name, option in OWN_ROWS.items():
        if getattr(args, name):
            problems.add(f"{option} is for rows of your own (--data): a named task's protocol says this already")


def _questions(args: argparse.Namespace, problems: Problems) -> list[Question]:
    chosen: tuple[str, ...] = ()
    with problems.collect():
        names = [name.strip() for name in args.legacy_quirks.split(",")] if args.legacy_quirks else []
        chosen = tuple(quirk.name for quirk in quirks.choose(names))
    questions = []
    for name in dict.fromkeys(name.strip() for name in args.task.split(",")):
        with problems.collect():
            if name in get_args(TaskKind):
                raise UserError(f"--task {name} is a task kind, for rows of your own: name their file with --data")
            benchmark = benchmarks.get(name)
            protocol = benchmark.protocol(args.protocol)
            template = protocol.template(args.template)
            data = Path(args.data_dir) if args.data_dir else None
            limit = args.limit if args.limit and args.limit > 0 else None  # another number has been complained of
            loaded = benchmarks.load(benchmark, data, args.split, limit)
            protocol.check(loaded.rows)
            if args.max_length is not None and not isinstance(protocol, HeadProtocol):
                raise UserError(
                    f"--max-length is for heads, and protocol {protocol.name} of task {name} never cuts its inputs: leave it out"
                )
            questions.append(Question(benchmark, protocol, template, loaded, chosen, args.limit, args.max_length))
    return questions


def _arms(args: argparse.Namespace, problems: Problems) -> list[Arm]:
    arms = []
    names: list[str] = []
    for folder in args.adapter:
        with problems.collect():
            arms.append(read_arm(folder.name, folder))
    there = read_results(args.out) if arms else {}
    with problems.collect():
        names = labels([arm.folder for arm in arms], [labels_of(there, arm.content()) for arm in arms])
    arms = [replace(arm, label=name) for name, arm in zip(names, arms, strict=False)]
    return [Arm(BASELINE), *arms] if args.baseline or not args.adapter else arms


def model_spec(args: argparse.Namespace, arms: list[Arm]) -> ModelSpec:
    """The base: the adapters' own, with what the command line says instead. A revision goes with its path.

    Raises:
        UserError: nobody says what it is, or the adapters were trained on different ones.
    """
    stored = {arm.label: arm.stored[0] for arm in arms if arm.stored}
    found: dict[str, Any] = asdict(next(iter(stored.values()))) if stored else {}
    for name in ("model", "dtype", "quantization"):
        key = "path" if name == "model" else name
        if given := getattr(args, name):
            found[key] = given
        elif (
            len(values := {label: getattr(spec, key) for label, spec in stored.items()})
            and len(set(values.values())) > 1
        ):
            shown = ", ".join(f"{label}: {value}" for label, value in values.items())
            raise UserError(
                f"the adapters were trained with different bases ({shown}): say which to take with --{name}"
            )
    if "path" not in found:
        raise UserError("the base model is not known: give --model")
    found["revision"] = next((spec.revision for spec in stored.values() if spec.path == found["path"]), None)
    # Never from the folder: an adapter from elsewhere must not switch this on.
    return ModelSpec(**found | {"trust_remote_code": args.trust_remote_code})


def base_notes(arm: Arm, spec: ModelSpec) -> tuple[str, ...]:
    """A sentence where an adapter is put on another base than it was trained on.

    Two folders are the same base where their contents are. Where one is not here, its name has to do.
    """
    path = getattr(arm.config, "base_model_name_or_path", None)
    trained = arm.stored[0] if arm.stored else ModelSpec(path=path, revision=spec.revision) if path else None
    if trained is None:
        return ()
    if Path(trained.path).is_dir() and Path(spec.path).is_dir():
        same = Path(trained.path).samefile(spec.path) or checkpoint_hash(trained) == checkpoint_hash(spec)
    elif trained.path == spec.path:
        same = trained.revision == spec.revision
    else:
        same = Path(trained.path).name == Path(spec.path).name
    return () if same else (f"{arm.label} was trained on {_said(trained)}, and is put on {_said(spec)}",)


def _said(spec: ModelSpec) -> str:
    return spec.path + (f" at revision {spec.revision}" if spec.revision else "")


def _check_models(spec: ModelSpec, arms: list[Arm], questions: list[Question], problems: Problems) -> None:
    """The checkpoint is there with its tokenizer, and every adapter fits every model class that it is asked in."""
    with problems.collect():
        load_config(spec, make_task(TaskSpec(kind="causal_lm")))
        tokenizer = load_processor(spec, make_task(TaskSpec(kind="causal_lm")))
        if any(isinstance(question.protocol, GenerateProtocol | HeadProtocol) for question in questions):
            padding_token(tokenizer)
        seen = set()
        for arm in arms:
            for question in questions:
                with problems.collect():
                    if not arm.folder and isinstance(question.protocol, HeadProtocol):
                        _check_head(spec, question)
                    task = question.task_spec(arm)
                    key = (arm.label, task.kind, len(task.labels or ()))
                    if key in seen:
                        continue
                    seen.add(key)
                    if arm.folder:
                        check_fits(shape_model(spec, make_task(task)), arm.folder)


def _check_head(spec: ModelSpec, question: Question) -> None:
    """Raise `UserError` where a bare model has no trained head: random answers are no baseline."""
    folder = checkpoint_folder(spec)
    names: list[str] = []
    for path in folder.glob("*.safetensors") if folder else ():
        with safe_open(str(path), framework="pt") as file:
            names += file.keys()
    if names and not any(set(name.split(".")) & (set(HEADS) - {"pooler"}) for name in names):
        raise UserError(
            f"{spec.path} has no head that was trained for {question.benchmark.name}, so the bare model has no answer: leave "
            "--baseline out, or give an adapter that brings one"
        )
