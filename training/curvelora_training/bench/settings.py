"""What a comparison or a sweep runs on, from the command line or a recipe, as one plain record that its workers read back."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoModelForCausalLM

from curvelora.errors import UserError
from curvelora.layers.base_weight import linear_shape
from curvelora_eval.files import check_folder
from curvelora_eval.models import check_checkpoint, shape_model
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import make_task
from curvelora_training.bench.arms import FULL, Arm
from curvelora_training.bench.random_base import BASES
from curvelora_training.bench.shapes import shape_config
from curvelora_training.bench.sources import read_text
from curvelora_training.config import load_recipe
from curvelora_training.liger import check_liger
from curvelora_training.prepare import linear_module_names

# the seven linear layers of a Llama block, and what else architectures call theirs
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ENCODER_LINEARS = ("query", "value")
SEEDS = 1 << 31  # the generators of CPUs take 32 bits, and a higher seed would be one of the lower ones again
NOT_ADAPTED = ("lm_head", "embed_out", "classifier", "score", "pooler")


PROBES = 4  # held-out batches whose layer inputs are looked at


@dataclass(kw_only=True)
class LabSettings:
    """One comparison. Lengths are in tokens, rates are AdamW's peaks."""

    __pydantic_config__ = {"extra": "forbid"}

    model: str
    """A built-in shape, a config.json, or a checkpoint."""
    base: Literal["nf4", "bf16", "fp32"] = "nf4"
    """How the frozen linear layers are stored."""
    recipe: str | None = None
    """Where model, task, rows and rates come from, instead of a text."""
    overrides: list[str] = field(default_factory=list)
    data: str | None = None
    """A text file for a causal language model; None takes the text that comes with the package."""
    steps: int = 100
    seeds: list[int] = field(default_factory=lambda: [42])
    batch_size: int = 4
    length: int = 128
    rank: int = 64
    alpha: float = 16
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)
    learning_rate: float = 2e-4
    head_learning_rate: float | None = None
    warmup: float = 0.06
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpointing: bool = False
    reentrant: bool = False
    """With checkpointing: torch's reentrant kind of it."""
    recorded: bool = True
    """Replay the steps of the runs as CUDA graphs where that can be done; see `step_graph`."""
    held_out_batches: int = 16
    looks: int = 20
    """At about so many steps of a run presence is measured and the path of dW is recorded."""
    sharpness: bool = True
    sharpness_batches: int = 2
    """Held-out batches that the sharpness is of."""
    spectra: bool = True
    arms: list[Arm] = field(default_factory=list)
    title: str = ""

    @property
    def random(self) -> bool:
        """Whether the base has random weights."""
        return shape_config(self.model) is not None

    @property
    def baseline(self) -> str:
        """The arm that every ratio is taken to: the first one."""
        return self.arms[0].key

    def options(self) -> dict[str, Any]:
        """The adapter options that all arms share, each as far as its method has them."""
        targets = list(self.target_modules)
        return {"r": self.rank, "alpha": self.alpha, "dropout": self.dropout, "target_modules": targets}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, path: Path) -> LabSettings:
        """Read back what `as_dict` gave. Raises `UserError` where the file is damaged."""
        try:
            return TypeAdapter(cls).validate_python(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, ValidationError) as error:
            raise UserError(
                f"{path} holds no settings of a comparison ({' '.join(str(error).split())[:200]})"
            ) from error


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say on what model and in what batches; shared by `bench step`, `bench compare` and `sweep`."""
    group = parser.add_argument_group("model and batches")
    group.add_argument("--model", metavar="SHAPE_OR_PATH", help="built-in shape, config.json, or checkpoint folder")
    group.add_argument(
        "--config",
        metavar="RECIPE",
        help="take model, task, rows and rates from a recipe (not its epochs, seed and row order)",
    )
    group.add_argument(
        "--base", choices=BASES, help="how frozen linear layers are stored (default nf4, with double quantisation)"
    )
    group.add_argument(
        "--data", metavar="TEXT", help="UTF-8 text (also .gz) for a causal language model (default: Shakespeare)"
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="rows a step and process (default 4)")
    group.add_argument("--length", type=int, metavar="N", help="tokens a row (default 128 on weights, 2048 on shapes)")
    group.add_argument("--rank", type=int, metavar="R", help="rank of every arm (default 64)")
    group.add_argument(
        "--alpha", type=float, metavar="A", help="scale s = alpha / r (default 16; RanLoRA keeps its own 2r)"
    )
    group.add_argument("--dropout", type=float, metavar="P", help="on the adapters' input (default 0)")
    targets = "comma-separated modules to adapt (default: a decoder's linear layers, an encoder's query and value)"
    group.add_argument("--targets", metavar="NAMES", help=targets)
    group.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations (default on shapes)"
    )
    group.add_argument(
        "--reentrant",
        action=argparse.BooleanOptionalAction,
        help="with --checkpointing, torch's reentrant kind (default the other one)",
    )
    group.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe values, with --config")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how to train."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps", type=int, metavar="N", help="optimiser steps of every run (default 100; 0: cost only)"
    )
    group.add_argument("--seeds", metavar="A-B", help="for example 42-46 or 42,43 (default 42)")
    group.add_argument("--learning-rate", type=float, metavar="LR", help="of every arm (default 2e-4)")
    group.add_argument("--max-grad-norm", type=float, metavar="G", help="clipping by global norm (default 1; 0: none)")
    group.add_argument("--warmup", type=float, metavar="W", help="share of the steps, or their number (default 0.06)")
    group.add_argument("--schedule", choices=("linear", "constant"), help="after the warm-up (default linear, to 0)")


def settings_from(
    args: argparse.Namespace,
    arms: Callable[[], list[Arm]],
    out: Path | None = None,
    more: Sequence[Callable[[], Any]] = (),
) -> LabSettings:
    """Check the command line, all of it before any model is loaded, and return the settings.

    Args:
        arms: reads the arms; what it says is wrong comes in the same message.
        more: further checks, alike.

    Raises:
        UserError: everything that is wrong, in one message.
    """
    problems: list[str] = []
    for check in more:
        problems += _take(check)
    named: list[Arm] = []
    problems += _take(lambda: named.extend(arms()))
    values: dict[str, Any] = {"arms": named, "overrides": list(args.overrides or [])}
    if args.config:
        problems += _take(lambda: values.update(_from_recipe(args.config, values["overrides"])))
        values["recipe"] = args.config
    elif args.overrides:
        problems.append(f"{args.overrides[0]!r} is a recipe value, which needs --config")
    if args.model:
        values["model"] = args.model
    if not values.get("model") and not args.config:
        problems.append("--model is missing: name a shape (see --help), a config.json or a checkpoint folder")
    plain = ("base", "data", "batch_size", "length", "rank", "alpha", "dropout", "checkpointing", "reentrant")
    training = ("steps", "learning_rate", "max_grad_norm", "warmup", "schedule", "recorded")
    given = {name: getattr(args, name, None) for name in (*plain, *training)}
    values |= {name: value for name, value in given.items() if value is not None}
    if getattr(args, "seeds", None):
        problems += _take(lambda: values.update(seeds=parse_seeds(args.seeds)))
    if args.targets:
        values["target_modules"] = [t for t in args.targets.split(",") if t]
    problems += _out_of_range(values)
    if getattr(args, "jobs", 1) < 1:
        problems.append("--jobs must be at least 1")
    if values.get("data"):
        problems += _take(lambda: read_text(values["data"]))
    if out is not None:
        problems += _take(lambda: check_folder(out))
    if any(arm.method == FULL for arm in named[:1]):
        problems.append("the first arm is what the others are compared with: name qlora or lora first, and full later")
    task = values.pop("task", TaskSpec(kind="causal_lm"))
    if values.get("model"):
        problems += _take(lambda: problems.extend(_complete(values, task)))
    if problems:
        raise UserError("; ".join(problems))
    settings = LabSettings(**values)
    settings.title = f"{named[0].label} and its rivals on {Path(settings.model).stem}"
    return settings


def _out_of_range(values: dict[str, Any]) -> list[str]:
    problems = []
    for name in ("batch_size", "length", "rank"):
        if values.get(name, 1) < 1:
            problems.append(f"{_flag(name)} must be at least 1, not {values[name]}")
    for name in ("steps", "max_grad_norm", "warmup"):
        if not 0 <= values.get(name, 0) < math.inf:
            problems.append(f"{_flag(name)} must not be negative, nor infinite, not {values[name]}")
    for name in ("learning_rate", "alpha"):
        if not 0 < values.get(name, 1) < math.inf:
            problems.append(f"{_flag(name)} must be positive, not {values[name]}")
    if not 0 <= values.get("dropout", 0) < 1:
        problems.append(f"--dropout is a share from 0 to below 1, not {values['dropout']}")
    if values.get("schedule", "linear") not in ("linear", "constant"):
        problems.append(
            f"the recipe's schedule {values['schedule']} is not one that is compared here: add --schedule linear or constant"
        )
    return problems


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_seeds(text: str) -> list[int]:
    """`42-46` or `1,2,5-7` -> the numbers. Raises `UserError` for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"--seeds {text!r} is not understood: write 42-46, or 42,43")
        if int(last or first) >= SEEDS:
            raise UserError(f"--seeds {text!r}: a seed must be below {SEEDS}")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


def _take(check: Any) -> list[str]:
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []


def _from_recipe(path: str, overrides: list[str]) -> dict[str, Any]:
    recipe = load_recipe(Path(path), overrides)
    training, options = recipe.training, recipe.adapter_options()
    for what, found, usable in (
        ("model.quantization", recipe.model.quantization, ("none", "nf4")),
        ("model.dtype", recipe.model.dtype, ("bfloat16", "float32")),
        ("training.optimizer", training.optimizer, ("adamw_torch", "adamw_torch_fused")),
    ):
        if found not in usable:
            raise UserError(f"{what} is {found}, and a comparison knows {' and '.join(usable)}: override it")
    if training.accumulation != 1:
        raise UserError(
            f"training.accumulation is {training.accumulation}, and a comparison steps after every batch: write "
            f"training.accumulation=1 and training.batch_size={training.accumulation * training.batch_size}"
        )
    base = "nf4" if recipe.model.quantization == "nf4" else "fp32" if recipe.model.dtype == "float32" else "bf16"
    values = {
        "model": recipe.model.path,
        "task": recipe.task,
        "base": base,
        "batch_size": training.batch_size,
        "length": recipe.task.max_length,
        "learning_rate": training.learning_rate,
        "head_learning_rate": training.head_learning_rate,
        "weight_decay": training.weight_decay,
        "warmup": 0.0 if training.schedule == "constant" else training.warmup,
        "schedule": training.schedule.removesuffix("_with_warmup"),
        "max_grad_norm": training.max_grad_norm,
        "checkpointing": training.gradient_checkpointing,
    }
    named = {"rank": options.get("r"), "alpha": options.get("alpha"), "dropout": options.get("dropout")}
    values |= {name: value for name, value in named.items() if isinstance(value, int | float)}
    if isinstance(options.get("target_modules"), list):
        values["target_modules"] = options["target_modules"]
    if training.max_steps:
        values["steps"] = training.max_steps
    return values


def _complete(values: dict[str, Any], task: TaskSpec) -> list[str]:
    """Fill in what depends on the model, and check it against the model's shapes; no weight is loaded.

    Returns:
        What is wrong: a text or a recipe for random weights, no such modules, a rank above what a layer allows.

    Raises:
        UserError: no such model.
    """
    problems: list[str] = []
    if (config := shape_config(values["model"])) is not None:
        values.setdefault("length", 2048)
        values.setdefault("checkpointing", True)
        if values.get("recipe") or values.get("data"):
            problems.append(
                f"--model {values['model']} has random weights, so there is nothing to learn from --config or --data"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    else:
        spec = ModelSpec(path=values["model"])
        check_checkpoint(spec)
        model = shape_model(spec, make_task(task))
    if not values.get("checkpointing"):
        problems += [
            f"arm {arm.key!r}: products are kept under --checkpointing only" for arm in values["arms"] if arm.keep
        ]
        if values.get("reentrant"):
            problems.append("--reentrant is a kind of checkpointing: add --checkpointing")
    if liger := [arm.key for arm in values["arms"] if arm.liger]:
        problems += [f"arm {liger[0]!r}: {why}" for why in _take(lambda: check_liger(model))]
    names = linear_module_names(model)
    targets = values.get("target_modules") or _default_targets(names)
    values["target_modules"] = targets
    if unknown := [target for target in targets if target not in names]:
        return [
            *problems,
            f"--targets {', '.join(unknown)}: this model's linear modules are {', '.join(sorted(names))}",
        ]
    layers = ((n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in targets)
    limit, narrowest = min((min(linear_shape(module, name)), name) for name, module in layers)
    too_high: dict[int, list[str]] = {}
    for arm in values["arms"]:
        r = arm.options.get("r", values.get("rank", LabSettings.rank))
        if arm.method != FULL and r > limit:
            too_high.setdefault(r, []).append(arm.key)
    for r, keys in too_high.items():
        named = f"arm {keys[0]!r}" if len(keys) == 1 else f"arms {', '.join(keys)}"
        problems.append(f"{named}: rank {r} is above {limit}, which is all that {narrowest} allows")
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and values.get("length", LabSettings.length) > most:
        problems.append(f"--length {values.get('length')} is above the {most} positions that this model has")
    return problems


def _default_targets(names: list[str]) -> list[str]:
    """The linear layers of a Llama block, or an encoder's query and value, or whatever is linear and no head."""
    llama = [name for name in LINEARS if name in names]
    encoder = [name for name in ENCODER_LINEARS if name in names]
    return llama or encoder or sorted(set(names) - set(NOT_ADAPTED))
