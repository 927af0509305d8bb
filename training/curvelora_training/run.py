"""One run, from a checked recipe to a run folder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainingArguments, set_seed

from curvelora.layers.decomposed import DecomposedConfig, share_factors
from curvelora.loading import WEIGHTS_FILE
from curvelora.merging import merged_form
from curvelora.output_change import OutputChange
from curvelora_eval.data import fingerprint, rows_fingerprint
from curvelora_eval.environment import describe_environment
from curvelora_eval.eval_command import prediction_lines
from curvelora_eval.evaluator import evaluate_rows
from curvelora_eval.models import load_base, load_processor, storage_of
from curvelora_training import fsdp
from curvelora_training.adalora import RankAllocation
from curvelora_training.checkpoint import read_manifest, step_of
from curvelora_training.config import Recipe
from curvelora_training.curve_schedule import CurveSchedule, has_schedule
from curvelora_training.distributed import (
    all_loaded,
    check_engine,
    engine_in_use,
    found_by_the_first,
    rank,
    trainer_arguments,
    world_size,
)
from curvelora_training.effects import describe_start, last_spline, measure_gap, measure_start, merges_approximately
from curvelora_training.garbage import long_lived
from curvelora_training.keep_best import KeepBest, best_checkpoint
from curvelora_training.kept_products import keep_products
from curvelora_training.kernel_choice import choose_kernels
from curvelora_training.lease import Lease
from curvelora_training.loading import load_into_shares
from curvelora_training.model_card import model_card
from curvelora_training.nonfinite import Guard, Numbered, WithRows
from curvelora_training.prepare import Prepared, attach
from curvelora_training.run_folder import RunFolder
from curvelora_training.saving import save_adapter
from curvelora_training.signals import ASKED
from curvelora_training.stopping import StopWhenAsked, evaluation_left, stop_before_training, with_the_first
from curvelora_training.trainer import AdapterTrainer, AtTheStart, Fence, RunLog, StepTimer, peak_memory
from curvelora_training.zero3 import (
    announce_parameters,
    by_blocks,
    for_what_trains,
    idle_keys,
    keep_adapters_whole,
    loading_into_shares,
    stage_of,
)


def train(prepared: Prepared, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Train the adapter and write the run folder.

    Args:
        prepared: with `load_and_prepare(..., resume=True)` where a run is resumed.
        resume: continue from the newest whole checkpoint; from the start where there is none.
        overwrite: replace a run that the folder holds.

    Raises:
        UserError: the folder holds a run already, is held by another attempt, or cannot be written; a checkpoint cannot be
            continued from or written; another engine ran than was asked for; or the training stopped being finite.
        Stopped: a signal asked for it.
    """
    lease = Lease(prepared.recipe.output)
    try:
        return _train(prepared, resume, overwrite, lease)
    finally:
        lease.release()


@dataclass
class Engine:
    """The engine, and how it holds the base.

    Attributes:
        asked: what is to run.
        arguments: that of `TrainingArguments`; another one where DeepSpeed is for what trains alone.
        base: whole on every process, or in shares that are gathered by ZeRO-3's two ways or by FSDP2.
    """

    asked: dict[str, Any]
    arguments: dict[str, Any]
    base: Literal["whole", "blocks", "modules", "fsdp"]


@dataclass
class Parts:
    """What the phases of a run share."""

    folder: RunFolder
    lease: Lease
    engine: Engine
    model: PeftModel
    rows: dict[str, Dataset]
    processor: Any
    collate: Callable
    timer: StepTimer
    log: RunLog
    guard: Guard
    stopping: StopWhenAsked


def _train(prepared: Prepared, resume: bool, overwrite: bool, lease: Lease) -> RunFolder:
    recipe, task = prepared.recipe, prepared.task
    folder = RunFolder(recipe.output)
    folder.fence = lease.check
    engine = _engine(prepared)  # first: it brings the process group up
    settings = training_arguments(recipe, folder, bool(prepared.rows.get("validation")))
    arguments = TrainingArguments(**settings, **engine.arguments)
    # Without a launcher the trainer would spread one process over all GPUs (DataParallel) and multiply the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    found_by_the_first(lambda: folder.check_free(resume, overwrite))
    if resume and folder.is_complete():
        if rank() == 0:
            print(f"{folder.path} is complete: there is nothing to resume")
        return folder
    lease.check_free()

    # Before the folder is touched: weights that are missing or damaged leave it as it was.
    set_seed(recipe.seed)
    processor = load_processor(recipe.model, task)
    model = _load(prepared, arguments, engine)
    all_loaded()
    rows = {name: task.encode(found, processor) for name, found in prepared.rows.items() if name != "test"}
    stop_before_training(arguments.device)
    lease.take()
    checkpoint, arguments.eval_on_start = found_by_the_first(lambda: _open_folder(prepared, folder, resume, overwrite))
    log = RunLog(folder, getattr(torch, recipe.model.dtype))
    watchers = StepTimer(), log, Guard(recipe.training, folder), StopWhenAsked()
    parts = Parts(folder, lease, engine, model, rows, processor, task.collator(processor), *watchers)
    trainer = _trainer(prepared, arguments, parts)
    shift = _run(prepared, trainer, parts, checkpoint)
    _finish(prepared, trainer, parts, shift)
    return folder


def _engine(prepared: Prepared) -> Engine:
    recipe = prepared.recipe
    asked = trainer_arguments(recipe.training, recipe.model.dtype)
    if by_blocks(recipe, asked.get("deepspeed"), world_size(), prepared.shapes.get_base_model()):
        if rank() == 0 and (idle := idle_keys(asked["deepspeed"])):
            print(f"ZeRO-3 gathers this base by blocks: there is nothing for {', '.join(idle)} to act on", flush=True)
        return Engine(asked, asked | {"deepspeed": for_what_trains(asked["deepspeed"])}, "blocks")
    if stage_of(asked.get("deepspeed")) == 3:
        return Engine(asked, asked, "modules")
    return Engine(asked, asked, "fsdp" if fsdp.fsdp_asked() else "whole")


def _load(prepared: Prepared, arguments: TrainingArguments, engine: Engine) -> PeftModel:
    """The model with its adapter, its base held as the engine does."""
    by_modules = engine.base == "modules"
    with loading_into_shares(arguments, prepared.recipe.model) if by_modules else contextlib.nullcontext():
        model = adapted_model(prepared, arguments.device, engine.base == "blocks")
    said = choose_kernels(model, prepared.recipe.training, engine.base == "fsdp")
    if said and rank() == 0:
        print(said, flush=True)
    if engine.base == "fsdp":
        fsdp.share_base(model)
    return model


def _open_folder(prepared: Prepared, folder: RunFolder, resume: bool, overwrite: bool) -> tuple[Path | None, bool]:
    """Make the run folder ready to be written; the first process's work.

    Returns: the checkpoint to continue from, and whether an evaluation has to be made up for first.
    """
    folder.open(resume, overwrite)
    checkpoint = folder.newest_checkpoint() if resume else None
    _announce(prepared, checkpoint, resume)
    if checkpoint is None:  # a run that is continued keeps its recipe, whose batches may be for other processes
        folder.write_text("config.yaml", prepared.recipe.as_yaml())
    folder.write_json("environment.json", describe_environment())
    folder.forget_after(step_of(checkpoint) if checkpoint else -1)
    return checkpoint, checkpoint is not None and evaluation_left(folder, step_of(checkpoint))


def _trainer(prepared: Prepared, arguments: TrainingArguments, parts: Parts) -> AdapterTrainer:
    """The trainer with what the method and the recipe add to it."""
    recipe, task = prepared.recipe, prepared.task
    trainer = AdapterTrainer(
        model=parts.model,
        args=arguments,
        train_dataset=Numbered(parts.rows["train"]),
        eval_dataset=parts.rows.get("validation"),
        data_collator=WithRows(parts.collate),
        callbacks=[Fence(parts.lease), parts.log],
        head=head_settings(recipe),
        token_loss=task.token_loss,
        timer=parts.timer,
        shapes=prepared.shapes,
        guard=parts.guard,
        lease=parts.lease,
    )
    if recipe.method.name == "adalora":
        trainer.add_callback(RankAllocation(task.token_loss))
    if has_schedule(prepared.peft_config):
        trainer.add_callback(CurveSchedule())
    if recipe.training.keep_best:
        trainer.add_callback(KeepBest())
    return trainer


def _run(prepared: Prepared, trainer: AdapterTrainer, parts: Parts, checkpoint: Path | None) -> OutputChange | None:
    """All steps that are left; returns what the untrained adapter did to the outputs, None where a run is continued."""
    recipe, shift = prepared.recipe, None
    by_modules = parts.engine.base == "modules"

    def look_at_the_start() -> None:
        # in batches of training's size: those fit, and evaluation's may not where a model has no test rows
        nonlocal shift
        shift = measure_start(parts.model, parts.rows["train"], parts.collate, recipe.training.batch_size)
        if rank() == 0:
            print(describe_start(shift), flush=True)
            if recipe.training.max_steps != 0:  # an untrained run has no log
                parts.folder.log({"step": 0, "seconds": 0.0, "start_shift": shift.as_dict()})

    def with_the_engine() -> None:
        check_engine(engine_in_use(trainer), parts.engine.asked)
        keep_products(parts.model, recipe.training.keep_products)
        if by_modules:  # weights in shares can only be used from now on
            if recipe.method.name != "full":
                keep_adapters_whole(trainer.model_wrapped)
            if checkpoint is None:
                look_at_the_start()

    trainer.add_callback(AtTheStart(with_the_engine))
    trainer.add_callback(parts.stopping)  # last: it undoes what others plan for the end of an epoch
    if by_modules:
        announce_parameters(parts.model)
    elif checkpoint is None:
        look_at_the_start()
    if recipe.training.max_steps != 0:
        try:
            with long_lived():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            # ends the line of a progress bar that was stopped midway, so that the error has one of its own
            for callback in trainer.callback_handler.callbacks:
                if (bar := getattr(callback, "training_bar", None)) is not None:
                    bar.close()
        parts.stopping.leave(parts.folder, trainer.state.global_step)
    ASKED.let_through(world_size() == 1)
    return shift


def _finish(prepared: Prepared, trainer: AdapterTrainer, parts: Parts, shift: OutputChange | None) -> None:
    """Save the adapter, score the unseen rows, and write what came of the run."""
    folder, can_merge = parts.folder, parts.engine.base == "whole"  # a weight in shares cannot be changed
    result = summary(prepared, trainer, parts.timer, parts.log) | {
        "engine": engine_in_use(trainer),
        "start_shift": shift.as_dict() if shift else folder.logged("start_shift"),
        "merge_gap": None,
        "spline": last_spline(folder),
        "nonfinite": parts.guard.summary(),
        "best_checkpoint": best_checkpoint(prepared.recipe.training, trainer.state),
    }
    parts.lease.confirm()
    save_adapter(trainer, prepared, folder)
    if can_merge:
        with_the_first(lambda: _score(prepared, parts, result, can_merge))
    else:  # every process has a share of the weights, so all of them score the same rows
        _score(prepared, parts, result, can_merge)


def _score(prepared: Prepared, parts: Parts, result: dict[str, Any], can_merge: bool) -> None:
    """Score the unseen rows, and write the results on the first process."""
    recipe, folder = prepared.recipe, parts.folder
    if can_merge and merges_approximately(recipe, parts.model):
        # after the summary, whose peak memory is that of training
        test = prepared.rows.get("test")
        probe = prepared.task.encode(test, parts.processor) if test else parts.rows["train"]
        result["merge_gap"] = measure_gap(parts.model, probe, parts.collate, recipe.training.batch_size).as_dict()
    evaluation = score_unseen(prepared, parts.model, parts.processor, folder, can_merge)
    if rank() == 0:
        folder.write_text("adapter/README.md", model_card(recipe, result, evaluation))
        folder.write_json("result.json", result)
        print(f"written: {folder.path}")


def training_arguments(recipe: Recipe, folder: RunFolder, has_validation: bool) -> dict[str, Any]:
    """The recipe's training section in transformers' terms."""
    spec = recipe.training
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    # renamed in transformers 5.23
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {
        "output_dir": str(folder.checkpoints),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "learning_rate": spec.learning_rate,
        "weight_decay": spec.weight_decay,
        "num_train_epochs": spec.epochs,
        "max_steps": spec.max_steps or -1,
        "per_device_train_batch_size": spec.batch_size,
        "per_device_eval_batch_size": spec.eval_batch_size,
        "gradient_accumulation_steps": spec.accumulation,
        "lr_scheduler_type": spec.schedule,
        "warmup_steps": spec.warmup,
        "max_grad_norm": spec.max_grad_norm,
        "optim": spec.optimizer,
        checkpointing: spec.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if spec.gradient_checkpointing else None,
        "train_sampling_strategy": "group_by_length" if spec.group_by_length else "random",
        "logging_strategy": "steps",
        "logging_steps": spec.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "ddp_timeout": math.ceil(spec.timeout_minutes * 60),
        "eval_strategy": ("steps" if spec.evaluate_every else "epoch") if has_validation else "no",
        "eval_steps": spec.evaluate_every,
        "save_strategy": "steps" if spec.save_every else "epoch",
        "save_steps": spec.save_every or 500,
        "save_total_limit": spec.keep_checkpoints,
        "remove_unused_columns": False,
        # frozen factors are buffers, the same in every process: DDP would send them again before every pass
        "ddp_broadcast_buffers": False,
        "label_names": ["labels"],
        "report_to": [],
        "disable_tqdm": rank() != 0,
    }


def head_settings(recipe: Recipe) -> dict[str, float]:
    """Learning rate and weight decay of the head: its own, or the adapter's."""
    spec = recipe.training
    return {
        "lr": spec.learning_rate if spec.head_learning_rate is None else spec.head_learning_rate,
        "weight_decay": spec.weight_decay if spec.head_weight_decay is None else spec.head_weight_decay,
    }


def adapted_model(prepared: Prepared, device: torch.device, blocks: bool = False) -> PeftModel:
    """The base with the adapter on it; what trains is fp32, whatever the base is stored in.

    Args:
        blocks: every process keeps a share of each of the base's blocks.
    """
    config = prepared.peft_config
    load = load_into_shares if blocks else load_base
    base = load(prepared.recipe.model, prepared.task, device, set(config.modules_to_save or ()))
    base.config.use_cache = False  # no generation while training; warnings otherwise
    if world_size() > 1 and isinstance(config, DecomposedConfig) and not config.factors_stored:
        # each process decomposes its part of the layers
        waiting = copy.copy(config)
        waiting.factors_stored = True
        model = attach(base, waiting)
        share_factors(model, base)
        model.peft_config["default"].factors_stored = False
    else:
        model = attach(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # A head that was created in bf16 would lose its small updates to rounding.
            parameter.data = parameter.data.float()
    return model


def summary(prepared: Prepared, trainer: AdapterTrainer, timer: StepTimer, log: RunLog) -> dict[str, Any]:
    """result.json: how the run went."""
    recipe, state = prepared.recipe, trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    trainable = {
        n: p.numel()
        for n, p in prepared.shapes.named_parameters()
        if p.requires_grad and recipe.training.max_steps != 0
    }
    times = timer.summary()
    rate = times["examples_per_second"]
    return {
        "schema": 1,
        "kind": "training",
        "status": "untrained" if recipe.training.max_steps == 0 else "completed",
        "name": recipe.name or Path(recipe.output).name,
        "method": recipe.method.name,
        "settings": recipe.adapter_options(),
        "task": recipe.task.kind,
        "trainable_parameters": sum(trainable.values()),
        "adapter_parameters": sum(count for name, count in trainable.items() if ".modules_to_save." not in name),
        "total_parameters": sum(p.numel() for p in prepared.shapes.parameters()),
        "steps": state.global_step,
        "examples": int(trainer.over_processes(sum(timer.rows))),
        "train_seconds": sum(timer.seconds),
        "step_seconds": times["step_seconds"],
        "examples_per_second": None if rate is None else trainer.over_processes(rate),
        **peak_memory(),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "resolvability": log.measure(trainer.accelerator.unwrap_model(trainer.model)),
        "seed": recipe.seed,
        "compute_dtype": recipe.model.dtype,
        "quantization": storage_of(recipe.model, prepared.shapes.config),
        "error": None,
    }


def score_unseen(
    prepared: Prepared, model: PeftModel, processor: Any, folder: RunFolder, can_merge: bool
) -> dict[str, Any] | None:
    """Score the test rows once; the first process writes evaluation.json and predictions.jsonl. None without test rows."""
    rows, spec = prepared.rows.get("test"), prepared.recipe.data.test
    if rows is None:
        return None
    size = prepared.recipe.training.eval_batch_size
    result, predicted = evaluate_rows(model, prepared.task, rows, processor, size)
    if can_merge and merges_approximately(prepared.recipe, model):
        # another function, so it gets scores of its own
        with merged_form(model):
            merged, _ = evaluate_rows(model, prepared.task, rows, processor, size)
        result["merged_form"] = {"metrics": merged["metrics"]}
    if rank() != 0:
        return None
    result |= {
        "model": dataclasses.asdict(prepared.recipe.model),
        "adapter": {"path": str(folder.adapter), "sha256": fingerprint(folder.adapter / WEIGHTS_FILE)},
        "dataset": {"path": spec.path, "split": spec.split, "sha256": rows_fingerprint(spec), "rows": len(rows)},
        **describe_environment(),
    }
    folder.write_text("predictions.jsonl", prediction_lines(predicted.predictions, predicted.references))
    folder.write_json("evaluation.json", result)
    return result


def _announce(prepared: Prepared, checkpoint: Path | None, resume: bool) -> None:
    recipe = prepared.recipe
    rows = ", ".join(f"{len(found)} {name}" for name, found in prepared.rows.items())
    print(f"{recipe.name or recipe.output}: {recipe.method.title}; {rows} rows")
    if checkpoint is not None:
        processes = read_manifest(checkpoint)["processes"]
        print(f"resuming from {checkpoint}, written by {processes} process{'es' * (processes > 1)}", flush=True)
    elif resume:
        print("no whole checkpoint to resume from: starting from the beginning", flush=True)
