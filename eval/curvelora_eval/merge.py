"""Merge an adapter into its unquantised base, and measure on a probe what that changes.

Three changes are kept apart: of the method (the adapter against its merged form, no weight rounded), of the merge (the adapter
against the checkpoint that was written), and, where the adapter was trained on a quantised base, of both and the other base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from curvelora.errors import UserError
from curvelora.loading import load_adapter
from curvelora.merging import Merge, allow_approximate
from curvelora.method import Method
from curvelora.methods.bitfit import is_bitfit
from curvelora.output_change import Comparison, OutputChange, Outputs, merge_gap, outputs
from curvelora.registry import METHODS
from curvelora_eval.merge_probe import Probe
from curvelora_eval.models import load_base, load_config
from curvelora_eval.spec import ModelSpec
from curvelora_eval.tasks import Task
from curvelora_eval.tasks.base import compute_context, device_of
from curvelora_eval.trained_on import TrainedOn

FULL = 1 << 20  # bytes; a disk with less is called full


def method_of(config: PeftConfig, storage: str = "none") -> Method | None:
    """The registry's entry for a saved config that was trained on a base in `storage`; None for one that PEFT alone knows."""
    method = METHODS.get(str(config.peft_type.value).lower())
    if method is not METHODS["full"] and getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
        return METHODS["bitfit" if is_bitfit(config) else "linear_probing"]
    if switched := next((m for m in METHODS.values() if _is_switched_to(m, config)), None):
        return switched
    by_storage = (m for m in METHODS.values() if m.required_quantization == storage)  # QLoRA is LoRA on NF4
    return next((m for m in by_storage if method and m.config_class is method.config_class), method)


def _is_switched_to(method: Method, config: PeftConfig) -> bool:
    """Whether `method` is a config class with switches set, as DoRA is LoRA's with `use_dora`, and `config` has them set."""
    switches = [name for name in method.internal_options if method.defaults.get(name) is True]
    return isinstance(config, method.config_class) and bool(switches) and all(getattr(config, s) for s in switches)


def check_mergeable(folder: Path, config: PeftConfig, approximate: bool) -> None:
    """Raise `UserError` where the adapter in `folder` cannot be merged, or only approximately and that was not asked for."""
    method = method_of(config)
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "merge_and_unload"):
        raise UserError(
            f"{folder} cannot be merged: {config.peft_type.value} changes no weight of the base; keep it as an adapter"
        )
    if method is None:
        return
    kind, name = method.merge(config), title_of(method)
    why = getattr(config, "why_not_exact", "") or kind.meaning
    if kind is Merge.IMPOSSIBLE:
        raise UserError(f"{folder} cannot be merged: in {name} as set here {why}; keep it as an adapter")
    if kind is Merge.APPROXIMATE and not approximate:
        raise UserError(
            f"{folder} merges only approximately: in {name} as set here {why}, which is another function; add --approximate to "
            "merge it all the same (the gap is then measured and written down), or keep it as an adapter"
        )


def title_of(method: Method) -> str:
    """The method's name as people write it, for example "LoRAN"."""
    return method.title.partition(":")[0]


def check_base(spec: ModelSpec, task: Task) -> None:
    """Raise `UserError` where there is no such base, or where its checkpoint is quantised itself; loads no weights."""
    if getattr(load_config(spec, task), "quantization_config", None):
        raise UserError(
            f"the checkpoint {spec.path} is quantised itself, and a merged weight would be rounded to that again: give the "
            "checkpoint that it was made from as --model"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is merged into what.

    Args:
        adapter, config: the adapter's folder and its config.
        base: the unquantised base that takes the adapter.
        trained_on: the base as it was in training; None where that is not known.
        task: decides the model class.
        probe: the rows to compare on.
        processor: the base's tokenizer or image processor; it goes into the checkpoint.
        device: where the models run.
    """

    adapter: Path
    config: PeftConfig
    base: ModelSpec
    trained_on: TrainedOn | None
    task: Task
    probe: Probe
    processor: Any
    device: torch.device

    @property
    def method(self) -> Method | None:
        """The registry's entry; None for a method that PEFT alone knows."""
        return method_of(self.config, self.trained_on.storage if self.trained_on else "none")

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name if self.method else str(self.config.peft_type.value).lower()

    @property
    def title(self) -> str:
        """The same as people write it."""
        return title_of(self.method) if self.method else self.name

    @property
    def from_quantised(self) -> bool:
        """Whether the adapter was trained on a quantised base."""
        return self.trained_on is not None and self.trained_on.quantised

    @property
    def approximate(self) -> bool:
        """Whether merging gives another function."""
        return self.method is not None and self.method.merge(self.config) is Merge.APPROXIMATE

    def load(self, spec: ModelSpec) -> PeftModel:
        """The adapter on the base that `spec` describes."""
        trained = getattr(self.config, "modules_to_save", None) or []
        return load_adapter(load_base(spec, self.task, self.device, trained=trained), self.adapter)


def merge_into(plan: Plan, folder: Path) -> dict[str, OutputChange]:
    """Write the merged checkpoint and its processor into `folder`, and compare it as it reads back (docs/results_format.md).

    Only one model is in memory at a time; of the others there are the probe's logits.

    Returns:
        The changes by name: gap (approximate merges only), merge, trained (an adapter of a quantised base that can be loaded).

    Raises:
        UserError: a model cannot be loaded, the adapter does not fit, the sum is not finite, or PEFT cannot merge it.
    """
    batches = plan.probe.batches(plan.processor)
    before: dict[str, list[Outputs]] = {}
    changes: dict[str, OutputChange] = {}
    if plan.from_quantised:
        with contextlib.suppress(UserError):  # that base cannot be loaded here: then this change is not measured
            before["trained"] = list(_outputs(plan.load(plan.trained_on.spec), batches))
        gc.collect()  # modules refer to each other, and the next model needs the memory
    model = plan.load(plan.base)
    before["merge"] = list(_outputs(model, batches))
    if plan.approximate:
        with compute_context(model):
            changes["gap"] = merge_gap(model, _moved(batches, device_of(model)))
    merged = merge_weights(model, plan.adapter)
    _save(merged, plan.processor, folder)
    del model, merged
    gc.collect()
    written = load_base(dataclasses.replace(plan.base, path=str(folder), revision=None), plan.task, plan.device)
    comparisons = {name: Comparison() for name in before}
    for i, after in enumerate(_outputs(written, batches)):
        for name, comparison in comparisons.items():
            comparison.add(before[name][i], after)
    changes |= {name: comparisons[name].result() for name in ("merge", "trained") if name in comparisons}
    if not plan.probe.labelled:
        changes = {k: dataclasses.replace(v, reference_loss=None, changed_loss=None) for k, v in changes.items()}
    return changes


def merge_weights(model: PeftModel, adapter: Path) -> PreTrainedModel:
    """The base with the adapter in its weights and the new modules in their places."""
    _untie(model)
    try:
        # whether approximate was asked for has been checked, and what PEFT says of tied weights has been taken care of
        with allow_approximate(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
            return model.merge_and_unload(safe_merge=True)
    except UserError:
        raise
    except (ValueError, NotImplementedError) as error:  # how PEFT says so of methods and layers that it cannot merge
        raise UserError(f"{adapter} cannot be merged: {' '.join(str(error).split())}") from error


def _untie(model: nn.Module) -> None:
    """Give an adapted layer that shares its weight, as an output layer often does with the embeddings, one of its own.

    Else the update would be added to both; PEFT writes into the config that they differ now.
    """
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
            base = module.get_base_layer()
            if holders[id(getattr(base, "weight", None))] > 1:
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write both into `folder`, which is made. A full disk is an OSError, a SafetensorError or (tokenizers) a plain Exception."""
    try:
        folder.mkdir(parents=True)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    except Exception as error:
        free = shutil.disk_usage(next(p for p in folder.parents if p.exists())).free
        why = "No space left on device" if free < FULL else " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder} cannot be written ({why}): nothing was left there") from error


def _outputs(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> Iterator[Outputs]:
    with compute_context(model):  # as in evaluation
        yield from outputs(model, _moved(batches, device_of(model)))


def _moved(batches: list[dict[str, torch.Tensor]], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    return ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """The name of a temporary folder beside `target`, which takes its place at the end; removed when anything fails.

    Raises:
        UserError: the folder cannot be put in its place, or as raised inside, with `target` for the temporary name.
    """
    place = target.resolve()
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if place.exists():
            place.rmdir()  # it was empty when that was checked; if it is not now, this fails
        temporary.rename(place)
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(target))) from error
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
