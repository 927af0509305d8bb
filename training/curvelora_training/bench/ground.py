"""What all arms of a comparison stand on: one frozen base, one source of batches, the names of new heads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from curvelora_eval.data import load_rows
from curvelora_eval.lab.spectra import Subspaces
from curvelora_eval.models import HEADS, head_modules, load_base, load_processor
from curvelora_eval.spec import DataSpec, ModelSpec, TaskSpec
from curvelora_eval.tasks import make_task
from curvelora_training.bench.adapted import arm_model, switch
from curvelora_training.bench.arms import Arm
from curvelora_training.bench.devices import Device
from curvelora_training.bench.random_base import random_model
from curvelora_training.bench.settings import LabSettings
from curvelora_training.bench.shapes import shape_config
from curvelora_training.bench.sources import RandomTokens, Source, TaskRows, TextBlocks, read_text
from curvelora_training.bench.trial import Optimisation, Trial
from curvelora_training.config import Recipe, load_recipe


@dataclass
class Ground:
    """See the module. `seconds` is how long the base took to be ready."""

    settings: LabSettings
    base: PreTrainedModel
    source: Source
    heads: list[str]
    device: Device
    seconds: float
    subspaces: dict[tuple[str, int], Subspaces] = field(default_factory=dict)
    """Of the base weights that were looked at: the same for every arm and seed, and dear."""

    def trial(self, arm: Arm, seed: int, at_peak: bool = False) -> Trial:
        """A new trial of `arm`: its adapter at its start, its optimiser, its dropout stream.

        Args:
            at_peak: the learning rate is at its peak from the first step to the last, as long as it may go on.
        """
        s = self.settings
        model = arm_model(self.base, arm, s.options(), self.heads, seed, s.random)
        if s.checkpointing:
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            inner.enable_input_require_grads()
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": s.reentrant})
        computed = switch(model, arm)
        return Trial(model, self.optimisation(arm, at_peak), self.device, self.heads, arm.fp32, seed, computed)

    def optimisation(self, arm: Arm, at_peak: bool) -> Optimisation:
        """How `arm` is trained; at_peak: as for `trial`."""
        s = self.settings
        warmup = round(s.warmup * s.steps) if s.warmup < 1 else round(s.warmup)
        return Optimisation(
            learning_rate=arm.learning_rate or s.learning_rate,
            head_learning_rate=s.head_learning_rate,
            weight_decay=s.weight_decay,
            steps=s.steps,
            warmup=0 if at_peak else warmup,
            schedule="constant" if at_peak else s.schedule,
            max_grad_norm=s.max_grad_norm,
        )


def build_ground(settings: LabSettings, device: torch.device) -> Ground:
    """Load or draw the base and make the batches.

    Raises:
        UserError: weights, rows or text cannot be read, or do not fit the model.
    """
    started = time.perf_counter()
    config = shape_config(settings.model)
    if config is not None:
        config.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
        base = random_model(config, settings.base, device)
        source: Source = RandomTokens(config.vocab_size, settings.batch_size, settings.length)
        heads = []
    elif settings.recipe is not None:
        base, source, heads = _from_recipe(settings, device)
    else:
        task = make_task(TaskSpec(kind="causal_lm", max_length=settings.length))
        spec = model_spec(settings)
        base, heads = load_base(spec, task, device), []
        text, _ = read_text(settings.data)
        source = TextBlocks(text, load_processor(spec, task), settings.batch_size, settings.length)
    base.config.use_cache = False
    box = Device(device)
    box.synchronise()
    return Ground(settings, base, source, heads, box, time.perf_counter() - started)


def model_spec(settings: LabSettings, recipe: Recipe | None = None) -> ModelSpec:
    """The base as the evaluation package loads it."""
    return ModelSpec(
        path=settings.model,
        dtype="float32" if settings.base == "fp32" else "bfloat16",
        quantization="nf4" if settings.base == "nf4" else "none",
        attention=recipe.model.attention if recipe else "auto",
        revision=recipe.model.revision if recipe else None,
    )


def _from_recipe(settings: LabSettings, device: torch.device) -> tuple[PreTrainedModel, Source, list[str]]:
    recipe = load_recipe(Path(settings.recipe), settings.overrides)
    task, spec = make_task(recipe.task), model_spec(settings, recipe)
    parts: dict[str, DataSpec | None] = {"train": recipe.data.train, "held": recipe.data.validation or recipe.data.test}
    rows = {name: load_rows(part) for name, part in parts.items() if part is not None}
    if hasattr(task, "learn_labels"):
        task.learn_labels(rows["train"])
    for name, found in rows.items():
        task.check(found, f"data.{name}")
    processor = load_processor(spec, task)
    base = load_base(spec, task, device, head_names(task))
    encoded = {name: task.encode(found, processor) for name, found in rows.items()}
    source = TaskRows(encoded["train"], encoded.get("held"), settings.batch_size, task.collator(processor))
    return base, source, head_modules(base) if task.new_head else []


def head_names(task: object) -> tuple[str, ...]:
    """Modules whose weights may be missing in the checkpoint, because they train in full."""
    return HEADS if getattr(task, "new_head", False) else ()
