"""What a trainer puts into a checkpoint, and how it takes it back; the files themselves: `checkpoint.py`.

The adapter and the optimiser's state are whole, by name, so a run that was stopped on N processes resumes on M. Full fine-tuning
under ZeRO is the exception: its state would not fit on one process, so DeepSpeed saves it in shares, for as many processes.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINER_STATE_NAME

from curvelora.errors import UserError
from curvelora.loading import WEIGHTS_FILE
from curvelora_training.adalora import RANKED, RankAllocation
from curvelora_training.checkpoint import read_manifest, seal, temporary_for
from curvelora_training.distributed import agree, everyones, rank, world_size
from curvelora_training.moments import gather_moments, restore_moments, trainable, zero_engine
from curvelora_training.rng import read_rng, rng_state, set_rng_state, write_rng
from curvelora_training.run_folder import whole_or_none

MOMENTS, METHOD, SCHEDULER = "moments.safetensors", "method.safetensors", "scheduler.json"


def in_shares(trainer: Trainer) -> bool:
    """Whether the optimiser's state stays in shares in a checkpoint: full fine-tuning under ZeRO."""
    full = _model(trainer).peft_config["default"].peft_type.value.lower() == "full"
    return full and zero_engine(trainer) is not None


def save(trainer: Trainer, final: Path) -> None:
    """Write the checkpoint `final`, whole or not at all. Every process must call it; the first one writes.

    The others wait for it in `agree`, for as long as it takes; nothing that they need for that is lost in a time-out.

    Raises:
        UserError: on every process, where one of them could not do its part.
    """
    temporary, problem = temporary_for(final), None
    shares = in_shares(trainer)
    try:
        with whole_or_none(temporary):
            trainer.save_model(str(temporary))  # agrees, so the folder is there for all
            if shares:
                trainer.model_wrapped.save_checkpoint(str(temporary), exclude_frozen_parameters=True)
            tensors = {} if shares else gather_moments(trainer, rank() == 0)
            states = everyones(rng_state())  # of all processes, so also: all are done
            if rank() == 0:
                _write_rest(trainer, temporary, tensors, states)
                seal(temporary, final, _facts(trainer, shares))
    except UserError as error:
        problem = error
    agree(problem)
    if shares and rank() == 0 and world_size() > 1:
        print(
            f"{final} is in shares, as DeepSpeed saves full fine-tuning: it resumes on {world_size()} processes only",
            flush=True,
        )


def restore(trainer: Trainer, folder: Path, schedule_goes_on: bool = False) -> None:
    """Continue from a checkpoint that was checked: weights, optimiser, scheduler. Every process calls it, with its engine there.

    Args:
        schedule_goes_on: learning rates (and the loss scale) stay where they are, as of a run that goes back while it trains.

    Raises:
        UserError: on every process, where one of them could not take something back.
    """
    problem, schedule = None, _schedule(trainer) if schedule_goes_on else None
    try:
        if (stage := read_manifest(folder)["shares"]) is not None:
            if not in_shares(trainer) or zero_engine(trainer).zero_optimization_stage() != stage:
                raise UserError(f"it is in shares of ZeRO-{stage}, which no other engine can read: take that one")
            deepspeed_load_checkpoint(trainer.model_wrapped, str(folder), load_module_strict=False)
        else:
            _load_weights(trainer, folder)
            restore_moments(trainer, load_file(folder / MOMENTS))
        _restore_scheduler(trainer, schedule or json.loads((folder / SCHEDULER).read_text(encoding="utf-8")))
    except UserError as error:
        problem = UserError(f"{folder} cannot be continued from: {error}")
    agree(problem)


def restore_rng(folder: Path) -> None:
    """Continue this process's random numbers. Of another number of processes they cannot be the same: dropout will differ."""
    set_rng_state(read_rng(folder / "rng", rank(), read_manifest(folder)["processes"]))


def _facts(trainer: Trainer, shares: bool) -> dict[str, Any]:
    """For the manifest: what has to be known before anything is loaded."""
    args = trainer.args
    return {
        "step": trainer.state.global_step,
        "processes": world_size(),
        "batch_size": args.train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * world_size(),
        "shares": zero_engine(trainer).zero_optimization_stage() if shares else None,
    }


def _write_rest(trainer: Trainer, folder: Path, tensors: dict[str, torch.Tensor], states: list[Any]) -> None:
    if tensors:
        save_file(tensors, folder / MOMENTS)
    if (method := _method(trainer)) is not None:
        kept, rest = method.kept(_model(trainer))
        save_file(kept, folder / METHOD, metadata={"rest": rest})
    write_rng(folder / "rng", states)
    (folder / SCHEDULER).write_text(json.dumps(_schedule(trainer), indent=2) + "\n", encoding="utf-8")
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))


def _load_weights(trainer: Trainer, folder: Path) -> None:
    """Every trainable parameter, and the buffers that belong to the adapter, from the adapter's file."""
    names, model, own = trainable(trainer), _model(trainer), {}
    stored = load_file(folder / WEIGHTS_FILE)
    if (method := _method(trainer)) is not None:
        kept = load_file(folder / METHOD)
        own = {name.partition(":")[2]: tensor for name, tensor in kept.items() if name.startswith("weight:")}
        stored = {name: tensor for name, tensor in stored.items() if not RANKED.search(name)}
    with _gathered(list(names.values())), torch.no_grad():
        try:
            result = set_peft_model_state_dict(model, stored)
        except RuntimeError as error:
            raise UserError(f"its adapter does not fit: {' '.join(str(error).split())[:200]}") from error
        for name, tensor in own.items():
            names[name].copy_(tensor)
    if method is not None:  # after PEFT, which would cut the triplets to the pattern
        with safe_open(str(folder / METHOD), framework="pt") as file:
            method.restore(model, kept, file.metadata()["rest"])
    if lacking := names.keys() & set(result.missing_keys) - own.keys():
        raise UserError(f"it has no {min(lacking)}, which trains here")
    if foreign := [name for name in result.unexpected_keys if ".original_module." not in name]:
        raise UserError(f"it has {foreign[0]}, which the model has not")


def _model(trainer: Trainer) -> PeftModel:
    return trainer.accelerator.unwrap_model(trainer.model)


def _method(trainer: Trainer) -> RankAllocation | None:
    """What of the method itself goes on from step to step."""
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, RankAllocation)), None)


def _gathered(parameters: list[nn.Parameter]) -> Any:
    """Inside, parameters that ZeRO-3 holds in shares are whole; what is written into them is shared out afterwards."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0)


def _scheduler(trainer: Trainer) -> Any:
    """PyTorch's scheduler, also where Accelerate has wrapped it for DeepSpeed."""
    return getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)


def _scaler(trainer: Trainer) -> Any | None:
    """What scales the loss in float16."""
    return getattr(trainer.accelerator, "scaler", None)


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return _scheduler(trainer).optimizer.param_groups


def _schedule(trainer: Trainer) -> dict[str, Any]:
    """Learning rates, the scheduler's and the loss scaler's state, as plain data."""
    scaler = _scaler(trainer)
    return {
        "scheduler": _scheduler(trainer).state_dict(),
        "learning_rates": [group["lr"] for group in _groups(trainer)],
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def _restore_scheduler(trainer: Trainer, record: dict[str, Any]) -> None:
    _scheduler(trainer).load_state_dict(record["scheduler"])
    groups = _groups(trainer)
    if len(groups) != len(record["learning_rates"]):
        raise UserError(f"it has {len(record['learning_rates'])} parameter groups, and {len(groups)} train here")
    for group, rate in zip(groups, record["learning_rates"], strict=True):
        group["lr"] = rate  # the scheduler sets it at its next step only
    if record["scaler"] is not None and (scaler := _scaler(trainer)) is not None:
        scaler.load_state_dict(record["scaler"])
    if hasattr(trainer.model_wrapped, "global_steps"):  # DeepSpeed counts too
        trainer.model_wrapped.global_steps = trainer.state.global_step
