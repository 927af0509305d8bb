"""transformers' Trainer with what adapters need: parameter groups, and records of loss, time, memory and resolvability."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curvelora.errors import UserError
from curvelora.grid_monitor import GridMonitor
from curvelora.resolvability import model_resolvability, summarise
from curvelora_eval.tasks.base import compute_context
from curvelora_training.checkpoint import PREFIX, delete_beyond
from curvelora_training.checkpointing import restore, restore_rng, save
from curvelora_training.distributed import agree, found_by_the_first
from curvelora_training.fsdp import data_parallel, is_shared
from curvelora_training.lease import Lease
from curvelora_training.nonfinite import ROW, Guard, poisoned
from curvelora_training.row_order import EpochOfRows, RowOrder
from curvelora_training.run_folder import RunFolder, whole_or_none
from curvelora_training.saving import check_saved
from curvelora_training.stopping import EvaluationCut

WARM_UP_STEPS = 3  # left out of the step time: first calls allocate, compile and fill caches


class AdapterTrainer(Trainer):
    """Trainer with a learning rate and weight decay of their own for the head.

    Args:
        head: {"lr": ..., "weight_decay": ...} for parameters under `modules_to_save`.
        timer: is told the rows of every batch.
        shapes: the model with its adapter on the meta device, with which every adapter that is saved is compared.
        token_loss: whether the model's loss is a mean over tokens that takes the number of tokens of the whole step.
        guard: looks at every step before it is applied.
        lease: is confirmed before every checkpoint.
        **kwargs: as for `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        head: dict[str, float],
        token_loss: bool,
        timer: StepTimer,
        shapes: PeftModel,
        guard: Guard,
        lease: Lease,
        **kwargs: Any,
    ) -> None:
        self.head = head
        self.timer = timer
        self.shapes = shapes
        self.guard = guard
        self.lease = lease
        super().__init__(*args, **kwargs)
        self.saved: tuple[int, int | None] | None = None  # step and best step of the last checkpoint
        self.epoch_of_rows = EpochOfRows()
        self.add_callback(timer)
        self.add_callback(guard)
        self.add_callback(self.epoch_of_rows)
        # Trainer guesses this from the signature of forward, and where it guesses wrong (BERT, T5, ViT: they accept the
        # argument and ignore it) accumulated gradients are summed instead of averaged.
        self.model_accepts_loss_kwargs = token_loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what the recipe says) over adapter and head, with and without weight decay."""
        if self.optimizer is None:
            groups = parameter_groups(model or self.model, self.args, self.head, self.get_decay_parameter_names)
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the base class does it, counting the rows of this process."""
        self.timer.count(len(inputs["labels"]))
        rows = inputs.pop(ROW)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.note(self, rows, loss)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """As the base class does it, with a gradient that shows whether it is finite."""
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return loss if return_outputs else poisoned(loss)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class does it, for every step before its update, which the guard may refuse."""
        norm = super()._get_grad_norm(*args, **kwargs)
        self.guard.look(self, norm)
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the base class does it; nothing where it was cut short."""
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationCut:
            return {}

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As the base class does it, in the precision of training also where the engine's own forward is not used."""
        with compute_context(self.accelerator.unwrap_model(model)):
            return super().prediction_step(model, *args, **kwargs)

    def over_processes(self, value: float) -> float:
        """The sum of `value` over all processes; every process must call it."""
        return float(self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.args.device), "sum"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the base class does it, and reads what it wrote: `UserError`, on every process, where that is not the adapter."""
        folder, problem = Path(output_dir or self.args.output_dir), None
        try:
            with whole_or_none(folder):
                if getattr(self.model_wrapped, "zero_optimization_stage", int)() == 3:
                    super().save_model(str(folder), _internal_call)  # which gathers what trains
                else:  # the base class would copy all of the base into host memory
                    self._save(str(folder))
                if self.args.should_save:
                    check_saved(folder, self.shapes)
        except UserError as error:
            problem = error
        agree(problem)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter and its tokenizer; not the training arguments, a pickle of what config.yaml says."""
        if not self.args.should_save:
            return
        # not the base's embeddings under an adapter, which PEFT adds by default: they are frozen
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
        if (tokenizer := getattr(self.data_collator, "tokenizer", None)) is not None:
            tokenizer.save_pretrained(output_dir)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RowOrder:
        """The same steps for any number of processes that share them."""
        rows, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        grouped = args.train_sampling_strategy == "group_by_length"
        lengths = [len(row) for row in rows["input_ids"]] if grouped else None
        seed = args.seed if args.data_seed is None else args.data_seed
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.epoch_of_rows.order = RowOrder(len(rows), step, seed, lengths)
        return self.epoch_of_rows.order

    def _save_checkpoint(self, *_: Any, **__: Any) -> None:
        """Write a checkpoint, then delete older ones; a checkpoint that cannot be written in full leaves all as it was."""
        now = self.state.global_step, self.state.best_global_step
        if self.saved == now:
            return  # an epoch that ends with a step that was saved
        self.lease.confirm()
        self.store_flos()
        folder = Path(self.args.output_dir)
        save(self, folder / f"{PREFIX}{self.state.global_step}")
        if (most := self.args.save_total_limit) is not None:
            found_by_the_first(lambda: delete_beyond(folder, most, {self.state.best_global_step}))
        self.saved = now

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As the base class does it, but with our own checkpoints: all comes back when the engine is there, whichever it is."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            restore(self, Path(resume_from_checkpoint))
            self.saved = self.state.global_step, self.state.best_global_step
        return prepared

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """As the base class does it, but for a base in torch's shares, which Accelerate does not wrap."""
        if training and model is self.model and any(map(is_shared, model.parameters())):
            return data_parallel(model, self.accelerator)
        return super()._wrap_model(model, training, *args, **kwargs)

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """Nothing, before there is an engine."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_rng(Path(checkpoint))


def parameter_groups(
    model: nn.Module, args: TrainingArguments, head: dict[str, float], decaying: Any
) -> list[dict[str, Any]]:
    """The optimiser's groups: adapter and head, each split into parameters that decay and those that do not (biases, norms)."""
    decay_names = set(decaying(model))
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "head" if ".modules_to_save." in name else "adapter"
            groups.setdefault((part, name in decay_names), []).append(parameter)
    settings = {"adapter": {"lr": args.learning_rate, "weight_decay": args.weight_decay}, "head": head}
    return [
        {
            "params": parameters,
            "lr": settings[part]["lr"],
            "weight_decay": settings[part]["weight_decay"] if decays else 0.0,
        }
        for (part, decays), parameters in groups.items()
    ]


class AtTheStart(TrainerCallback):
    """Calls `check()` when training begins, so that a wrong engine costs no run."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.check()


class Fence(TrainerCallback):
    """Ends the run before it logs, on every process, where another attempt has taken over."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def on_log(self, *_: Any, **__: Any) -> None:
        self.lease.confirm()


class StepTimer(TrainerCallback):
    """Wall time and rows of every optimiser step, from the first forward to the update, with the device synchronised."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.rows: list[int] = []
        self._rows = 0
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)
        self.rows.append(self._rows)
        self._rows = 0

    def count(self, rows: int) -> None:
        """Add the rows of one batch to the step that runs."""
        self._rows += rows

    def summary(self) -> dict[str, Any]:
        """`step_seconds` (median, 10th and 90th percentile) and `examples_per_second`, without the first steps.

        Rows are those of this process; both values are None where no step was made.
        """
        first = WARM_UP_STEPS if len(self.seconds) > WARM_UP_STEPS else 0
        measured = self.seconds[first:]
        if not measured:
            return {"step_seconds": None, "examples_per_second": None}
        low, median, high = np.percentile(measured, [10, 50, 90])
        return {
            "step_seconds": {"median": float(median), "p10": float(low), "p90": float(high), "steps": len(measured)},
            "examples_per_second": sum(self.rows[first:]) / sum(measured),
        }


class RunLog(TrainerCallback):
    """Writes metrics.jsonl: the trainer's logs with the time, resolvability of weight-space adapters, spline inputs of AuroRA.

    Args:
        folder: the run folder.
        dtype: dtype of the model's matrix products.
    """

    def __init__(self, folder: RunFolder, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.resolvability: dict[str, Any] | None = None
        self.grid: GridMonitor | None = None
        self._started = time.perf_counter()

    def measure(self, model: nn.Module) -> dict[str, Any] | None:
        """Resolvability over all weight-space layers, or None where there is none."""
        measured = model_resolvability(model, self.dtype)
        return summarise(measured) if measured else None

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Count where AuroRA's spline is asked from now on."""
        self.grid = GridMonitor(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log whenever a checkpoint is written: a logged loss is a mean since the last line, and a resumed run starts anew."""
        control.should_log = control.should_log or control.should_save
        return control

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        model: nn.Module,
        **_: Any,
    ) -> None:
        # The trainer's last call sums the run up; result.json does that.
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        record = {"step": state.global_step, "seconds": round(time.perf_counter() - self._started, 3), **logs}
        if "loss" in logs:
            self.resolvability = self.measure(model)
            for name in ("forward", "derivative", "std_u"):
                if self.resolvability is not None:
                    record[f"resolvability_{name}"] = self.resolvability[name]
            shares = self.grid.take() if self.grid else None
            record |= {f"spline_{name}": share for name, share in (shares or {}).items()}
        self.folder.log(record)


def peak_memory() -> dict[str, Any]:
    """The process's highest memory use so far, in bytes, and of what kind it is."""
    if torch.cuda.is_available():
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "peak_memory_kind": "device allocated"}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_bytes": kilobytes * 1024, "peak_memory_kind": "host resident set"}
