"""Everything that can go wrong before a weight is loaded, found in one pass: files, columns, labels, targets, ranks, folders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from curvelora.errors import UserError, nearest
from curvelora.methods.bitfit import check_has_biases, is_bitfit
from curvelora_eval.data import load_rows
from curvelora_eval.files import check_folder
from curvelora_eval.models import head_modules, shape_model
from curvelora_eval.tasks import LabelledTask, Task, make_task
from curvelora_training import fsdp
from curvelora_training.adalora import fit_schedule
from curvelora_training.config import Recipe, RecipeError, load_recipe
from curvelora_training.curve_schedule import check_schedules
from curvelora_training.distributed import accelerate_asks_for_deepspeed, deepspeed_settings, world_size
from curvelora_training.kernel_choice import check_fp8
from curvelora_training.liger import check_liger
from curvelora_training.resuming import check_same_recipe, with_its_steps
from curvelora_training.run_length import optimiser_steps
from curvelora_training.zero3 import by_blocks, check_by_modules, stage_of, why_not

T = TypeVar("T")
PEFT_TASK = {
    "causal_lm": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "sequence_classification": TaskType.SEQ_CLS,
    "regression": TaskType.SEQ_CLS,
    "image_classification": None,
}


@dataclass
class Prepared:
    """A checked recipe with its rows, and the model's shapes with the adapter on them (meta device, no weights)."""

    recipe: Recipe
    task: Task
    rows: dict[str, Dataset]
    peft_config: PeftConfig
    shapes: PeftModel


class _Collector:
    """Run checks that are independent of each other and keep what each of them says."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __call__(self, check: Callable[..., T], *args: Any) -> T | None:
        try:
            return check(*args)
        except UserError as error:
            self.problems.append(str(error))
            return None


def load_and_prepare(path: Path, overrides: list[str], resume: bool = False) -> Prepared:
    """Read a recipe and check everything; errors of form and errors of content come in one message.

    Args:
        resume: the run in the output folder is to be continued, on as many processes as there are now.

    Raises:
        RecipeError: every problem that was found.
        UserError: the recipe cannot be read at all, or the run cannot be continued with it.
    """
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        if error.remainder is None:
            raise
        try:
            prepare(error.remainder, str(path))
        except RecipeError as more:
            raise RecipeError(str(path), [*error.problems, *more.problems]) from error
        raise
    if not resume:
        return prepare(recipe, str(path))
    prepared = prepare(with_its_steps(recipe), str(path))
    check_same_recipe(prepared.recipe)  # after the task has learnt its labels, which belong to it
    return prepared


def prepare(recipe: Recipe, source: str = "the recipe") -> Prepared:
    """Check the recipe against its files, rows and the model's shapes.

    Raises:
        RecipeError: every problem that was found, in one message.
    """
    collect = _Collector()
    task = make_task(recipe.task)
    stage = collect(lambda: stage_of(deepspeed_settings(recipe.training.deepspeed, recipe.model.dtype)))
    # also where its file is no good, and so no stage is known
    deepspeed = stage is not None or recipe.training.deepspeed is not None or accelerate_asks_for_deepspeed()
    collect(_check_combinations, recipe, task, deepspeed, stage)
    collect(task.check_metrics)
    collect(check_folder, Path(recipe.output))
    rows = {}
    for name in ("train", "validation", "test"):
        spec = getattr(recipe.data, name)
        if spec is not None:
            rows[name] = collect(load_rows, spec)
    if isinstance(task, LabelledTask) and rows["train"] is not None:
        collect(task.learn_labels, rows["train"])
    if not isinstance(task, LabelledTask) or recipe.task.labels is not None:
        for name, found in rows.items():
            if found is not None:
                collect(task.check, found, f"data.{name}")
    peft_config = shapes = None
    base = collect(shape_model, recipe.model, task)
    if base is not None:
        peft_config = collect(adapter_config, recipe, task, base)
        if peft_config is not None:
            if rows["train"] is not None:
                steps = optimiser_steps(recipe.training, len(rows["train"]))
                collect(fit_schedule, peft_config, steps)
                collect(check_schedules, peft_config, steps)
            collect(_check_weights, base, peft_config)
            settings = deepspeed_settings(recipe.training.deepspeed, recipe.model.dtype) if stage == 3 else None
            by_modules = stage == 3 and not by_blocks(recipe, settings, world_size(), base)
            if by_modules:
                collect(check_by_modules, recipe, base, task.new_head)
            if recipe.training.kernels == "fp8" and peft_config is not None:
                collect(check_fp8, peft_config, recipe.model.dtype, by_modules or fsdp.fsdp_asked())
            with torch.device("meta"):  # the adapter needs no memory either
                shapes = collect(attach, base, peft_config)
        if recipe.training.liger:
            collect(_check_liger, base)
    if collect.problems:
        raise RecipeError(source, collect.problems)
    return Prepared(recipe, task, rows, peft_config, shapes)


def adapter_config(recipe: Recipe, task: Task, model: PreTrainedModel) -> PeftConfig:
    """The PEFT config of the run: the method's options, plus the head where the task adds one.

    Raises:
        UserError: a value that the method refuses, or no default targets for this architecture.
    """
    options = recipe.adapter_options()
    heads = head_modules(model) if task.new_head else []
    if heads:
        options["modules_to_save"] = list(dict.fromkeys([*(options.get("modules_to_save") or []), *heads]))
    config = recipe.method.build_config(**options)
    config.revision = recipe.model.revision  # for factors that are read from the checkpoint
    config.task_type = PEFT_TASK[recipe.task.kind]
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if config.target_modules is None and model.config.model_type not in known:
        raise UserError(
            f"adapter.target_modules: there is no default for the architecture {model.config.model_type!r}; "
            f"name some of its linear modules: {', '.join(linear_module_names(model))}"
        )
    return config


def attach(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put the adapter on `model`.

    Raises:
        UserError: the targets match nothing (the message lists what exists), or the rank is above what a layer allows.
    """
    config = copy.deepcopy(config)  # PEFT writes into it, and a recipe's is used for the shapes and for the model
    names = linear_module_names(model)
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    try:
        wrapped = get_peft_model(model, config)
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # PEFT's word for a layer that a method does not take is a TypeError
        wanted = config.target_modules
        wanted = [wanted] if isinstance(wanted, str) else sorted(wanted or [])
        if "not found" in str(error) or "No modules were targeted" in str(error):
            hint = nearest(wanted[0], modules) if wanted else ""
            raise UserError(
                f"adapter.target_modules {', '.join(wanted)} match no module of this model{hint} "
                f"(its linear modules: {', '.join(names)})"
            ) from error
        raise UserError(f"the adapter does not fit this model: {' '.join(str(error).split())}") from error
    _check_patterns(config, wrapped)
    if is_bitfit(config):
        check_has_biases(wrapped)
    if config.modules_to_save:
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))  # PEFT appends the heads that it knows
    for name, layer in wrapped.named_modules():
        ranks = getattr(layer, "r", None)  # PEFT's layers; this project's refuse a rank above the limit themselves
        if isinstance(layer, BaseTunerLayer) and isinstance(ranks, dict) and hasattr(layer, "in_features"):
            limit, rank = min(layer.in_features, layer.out_features), max(ranks.values())
            if rank > limit:
                option = "init_r" if hasattr(config, "init_r") else "r"
                raise UserError(
                    f"adapter.{option}: rank {rank} is above min(d_in, d_out)={limit} of "
                    f"{name.removeprefix('base_model.model.')} ({layer.out_features} x {layer.in_features}): write "
                    f"{option} <= {limit} or leave this module out"
                )
    return wrapped


def _check_patterns(config: PeftConfig, wrapped: PeftModel) -> None:
    """Raise `UserError` where a rank, alpha or the like is given for what is not adapted."""
    adapted = [*wrapped.base_model.targeted_module_names, *wrapped.base_model.targeted_parameter_names]
    for option in ("rank_pattern", "alpha_pattern", "lambda_pattern", "n_frequency_pattern"):
        for key in getattr(config, option, None) or {}:
            if not any(get_pattern_key([key], name) == key for name in adapted):
                last = dict.fromkeys(name.rpartition(".")[2] for name in adapted)
                raise UserError(
                    f"adapter.{option}: {key!r} matches nothing that is adapted{nearest(key, last)} (adapted: {', '.join(last)})"
                )


def linear_module_names(model: nn.Module) -> list[str]:
    """The last name parts of the model's linear modules, in order of appearance."""
    found = (
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    )
    return list(dict.fromkeys(found))


def trainable_table(prepared: Prepared) -> str:
    """What would train: a line each kind of module, and the total beside the whole model's."""
    counts: dict[str, tuple[int, int]] = {}
    total = trainable = 0
    for name, parameter in prepared.shapes.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
            tensors, entries = counts.get(key := _group(name), (0, 0))
            counts[key] = (tensors + 1, entries + parameter.numel())
    width = max(map(len, [*counts, "module"]))
    lines = [f"{'module':<{width}}  {'tensors':>8}  {'parameters':>14}"]
    lines += [f"{name:<{width}}  {tensors:>8}  {entries:>14,}" for name, (tensors, entries) in counts.items()]
    lines.append(f"trains {trainable:,} of {total:,} parameters ({100 * trainable / total:.3f} %)")
    return "\n".join(lines)


def _group(name: str) -> str:
    """`base_model.model.bert.encoder.layer.3.attention.self.query.loran_A.default` -> `query.loran_A`."""
    parts = [p for p in name.split(".") if p not in ("default", "weight", "bias", "modules_to_save")]
    return ".".join(parts[-2:]) if parts[-1].rpartition("_")[0] else parts[-1]


def _check_weights(model: PreTrainedModel, config: PeftConfig) -> None:
    if getattr(model.config, "quantization_config", None) and getattr(config, "needs_unquantised_weight", False):
        raise UserError(
            f"adapter.method {config.peft_type.value.lower()} starts from the unquantised weights, and the checkpoint is "
            "quantised itself: take the unquantised checkpoint (model.quantization can quantise it while loading), or write "
            "adapter.svd_source: dequantised"
        )


def _check_liger(model: PreTrainedModel) -> None:
    try:
        check_liger(model)
    except UserError as error:
        raise UserError(f"training.liger: {error}") from error


def _check_combinations(recipe: Recipe, task: Task, deepspeed: bool, stage: int | None) -> None:
    problems = []
    method, model = recipe.method, recipe.model
    if method.required_quantization and model.quantization != method.required_quantization:
        problems.append(
            f"adapter.method {method.name} means an adapter on a base in {method.required_quantization}: "
            f"set model.quantization={method.required_quantization}, or take adapter.method=lora"
        )
    if model.quantization not in method.bases:
        problems.append(
            f"adapter.method {method.name} does not work on a base in {model.quantization} (it does in "
            f"{' and '.join(method.bases)}): set model.quantization={method.bases[0]}, or take another method"
        )
    if method.name == "dora" and model.quantization == "int8" and not torch.cuda.is_available():
        problems.append(
            "adapter.method dora on a base in int8 needs a GPU, because PEFT loses the scales of an int8 weight on a CPU: set "
            "model.quantization=nf4 or none"
        )
    if method.name == "adalora" and deepspeed:
        problems.append(
            "adapter.method adalora ranks by the gradients after each optimiser step, and DeepSpeed has cleared them by then: "
            "leave DeepSpeed out"
        )
    if method.name == "adalora" and not PEFT_TASK[recipe.task.kind] and recipe.adapter_options()["orth_reg_weight"]:
        problems.append(
            f"adapter.method adalora has a penalty that PEFT leaves out for task {recipe.task.kind}: write "
            "adapter.orth_reg_weight=0 to train without it, or take another method"
        )
    if method.name == "adalora" and recipe.training.on_nonfinite != "stop":
        problems.append(
            "adapter.method adalora counts every step in its budget and cannot leave one out or go back: leave "
            "training.on_nonfinite at stop"
        )
    if stage == 3:
        problems += why_not(recipe)
    if fsdp.fsdp_asked():
        problems += fsdp.why_not(recipe)
    if method.name == "bitfit" and model.dtype != "float32":
        problems.append(
            f"adapter.method bitfit trains biases in fp32, which a model in {model.dtype} cannot add to its own numbers: set "
            "model.dtype=float32, or take another method"
        )
    if method.name == "linear_probing" and not task.new_head:
        problems.append(
            f"adapter.method linear_probing trains a new head, and task {recipe.task.kind} has none: take another method"
        )
    if model.dtype == "float16" and not torch.cuda.is_available():
        problems.append("model.dtype float16 needs a GPU: write bfloat16 or float32")
    for name in ("max_length", "max_target_length", "max_new_tokens"):
        if getattr(recipe.task, name) < 1:
            problems.append(f"task.{name} must be at least 1, not {getattr(recipe.task, name)}")
    for name in ("validation", "test"):
        spec = getattr(recipe.data, name)
        if spec is not None and spec.task is not None and spec.split is None:
            problems.append(
                f"data.{name} names the task {spec.task} without a split, and train would be taken: name its split"
            )
    if recipe.training.keep_best and recipe.data.validation is None:
        problems.append("training.keep_best needs validation rows to compare by: name data.validation")
    if deepspeed and recipe.training.optimizer.endswith("_8bit") and method.name != "full":
        problems.append(
            f"training.optimizer {recipe.training.optimizer} keeps blocks of numbers that ZeRO's parts cut through, so no "
            "checkpoint could hold them by parameter: take adamw_torch, of which ZeRO shards the state"
        )
    if recipe.training.keep_products and not recipe.training.gradient_checkpointing:
        problems.append(
            "training.keep_products says what gradient checkpointing keeps: set training.gradient_checkpointing=true too, or "
            "leave it out"
        )
    if recipe.training.liger and (stage == 3 or fsdp.fsdp_asked()):
        problems.append(
            "training.liger takes weights without calling their layers, which gathers nothing of a base in shares: leave it out, "
            "or take ZeRO-2"
        )
    if recipe.training.group_by_length and recipe.task.kind == "image_classification":
        problems.append("training.group_by_length has no meaning for images, which are all of one size: leave it out")
    if problems:
        raise UserError("; ".join(problems))
