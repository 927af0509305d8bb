"""Write the plain LoRA that is nearest to an adapter as an adapter of PEFT's own, and say how near it is.

The factors and their errors are `curvelora.extraction`'s; here are the model around them and the folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from curvelora.errors import UserError
from curvelora.extraction import LowRank, nearest_factors, rank_for, squared_singular_values, weight_change
from curvelora.layers.base_weight import is_transposed
from curvelora.loading import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, stored_shapes
from curvelora.merging import Merge
from curvelora_eval.files import write_json
from curvelora_eval.merge import method_of, title_of, whole_folder
from curvelora_eval.spec import TASK_FILE

EXTRACT_FILE = "extract.json"
OWN_FILES = frozenset([CONFIG_FILE, WEIGHTS_FILE, EXTRACT_FILE, TASK_FILE])
PREFIX = "base_model.model."
# shares of the energy for which the rank that keeps them is stated; the last is all of it to a relative error of 1e-5
ENERGIES = {"rank_99": 0.99, "rank_999": 0.999, "rank_all": 1 - 1e-10}


@dataclass(frozen=True)
class LayerResult:
    """What extraction made of one layer.

    Args:
        found: the factors as they are written.
        energy: the share of ||dW||^2 that the best factors of this rank keep; 1 where dW is zero.
        ranks: the ranks that would keep the shares in `ENERGIES`.
    """

    found: LowRank
    energy: float
    ranks: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as in extract.json."""
        return {
            "d_out": self.found.B.shape[0],
            "d_in": self.found.A.shape[1],
            "norm": self.found.norm,
            "relative_error": self.found.relative_error,
            "energy": self.energy,
            **self.ranks,
        }


def check_extractable(folder: Path, config: PeftConfig) -> None:
    """Raise `UserError` where no LoRA can stand for the adapter in `folder`, as far as its config tells."""
    method = method_of(config)
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "merge_and_unload"):
        raise UserError(
            f"no LoRA can be extracted from {folder}: {config.peft_type.value} changes no weight of the base; keep it as it is"
        )
    if method is not None and method.name == "full":
        raise UserError(
            f"no LoRA can be extracted from {folder}: full fine-tuning changes every weight, embeddings and norms too; serve the "
            "model that `curvelora merge` writes"
        )
    if method is not None and method.merge(config) is not Merge.EXACT:
        raise UserError(
            f"no LoRA can be extracted from {folder}: in {title_of(method)} as set here "
            f"{getattr(config, 'why_not_exact', '') or method.merge(config).meaning}, so no weight acts as it does; serve it "
            "as an adapter, or train a method that is linear in the input (loran, or aurora with mode: static)"
        )
    if getattr(config, "bias", "none") not in ("none", False, None):
        raise UserError(
            f"the adapter in {folder} trains biases too (bias: {config.bias}), which a plain LoRA has not: merge it instead"
        )
    if getattr(config, "layer_replication", None):
        raise UserError(
            f"the adapter in {folder} is for a base with repeated layers (layer_replication), which a plain LoRA "
            "does not repeat: merge it instead"
        )


def adapted_layers(model: PeftModel, adapter: str = "default") -> dict[str, BaseTunerLayer]:
    """Layer name, as in the base model -> adapted layer.

    Raises:
        UserError: there is none, or something else is trained that a plain LoRA cannot carry (single tokens).
    """
    layers: dict[str, BaseTunerLayer] = {}
    for name, module in model.named_modules():
        name = name.removeprefix(PREFIX)
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise UserError(
                f"the adapter trains single tokens of module {name!r}, which a plain LoRA cannot carry: merge it instead"
            )
        if isinstance(module, BaseTunerLayer) and adapter in module._get_available_adapters():
            layers[name] = module
    if not layers:
        raise UserError("the adapter changes no layer of the base, so there is no LoRA to extract: keep it as it is")
    return layers


def trained_modules(model: PeftModel, folder: Path) -> dict[str, Tensor]:
    """The tensors of `modules_to_save`, by their names in the weights file of `folder` and as they are stored there."""
    heads = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))
    if not heads:
        return {}
    with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(heads)}  # noqa: SIM118 (no mapping)


def extract(
    layers: dict[str, BaseTunerLayer], rank: int | None, energy: float | None, dtype: torch.dtype
) -> dict[str, LayerResult]:
    """The nearest factors of every layer, all of one rank, so that servers without ranks per layer take them.

    Args:
        rank: k; None for the smallest with which every layer keeps `energy`.
        energy: share of each layer's ||dW||^2, in (0, 1); used where `rank` is None.
        dtype: of the factors.

    Returns:
        Layer name -> result, on the CPU. Only one layer's dW is in memory at a time: it is formed once for the spectrum, which
        decides the rank, and once for the factors.

    Raises:
        UserError: as `weight_change` and `nearest_factors`.
    """
    if rank is not None:  # before hours of work
        _check_rank(layers, rank)
    squares = {
        name: squared_singular_values(weight_change(layer, name)).cpu() for name, layer in _shown(layers, "spectra")
    }
    wanted = max(1, *(rank_for(values, energy) for values in squares.values())) if rank is None else rank
    results = {}
    for name, layer in _shown(layers, "factors"):
        delta, values = weight_change(layer, name), squares[name]
        found = nearest_factors(delta, min(wanted, *delta.shape), name, dtype)
        total, kept = values.sum().item(), values[:wanted].sum().item()
        ranks = {key: rank_for(values, share) for key, share in ENERGIES.items()}
        results[name] = LayerResult(_padded(found, wanted), min(1.0, kept / total) if total else 1.0, ranks)
    return results


def _shown(layers: dict[str, BaseTunerLayer], what: str) -> Iterable[tuple[str, BaseTunerLayer]]:
    """The layers with a progress bar, on a terminal only: a large model takes a while."""
    return tqdm(layers.items(), desc=what, unit="layer", disable=None)


def _check_rank(layers: dict[str, BaseTunerLayer], rank: int) -> None:
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        if weight.ndim == 2 and rank > (limit := min(weight.shape)):
            raise UserError(
                f"--rank {rank} is above min(d_in, d_out)={limit} of module {name!r}: write --rank {limit} or less, "
                "or --rank auto"
            )


def _padded(found: LowRank, rank: int) -> LowRank:
    """The same update with `rank` rows and columns, on the CPU: zeros fill up a layer that is narrower than that."""
    A, B = found.A.cpu(), found.B.cpu()
    more = rank - len(A)
    if more:
        A, B = torch.cat([A, A.new_zeros(more, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), more)], 1)
    return LowRank(A, B, found.norm, found.error)


def overall(results: dict[str, LayerResult]) -> dict[str, float]:
    """Norm, relative error and energy of all layers together, as if their updates were one long vector."""
    total = sum(result.found.norm**2 for result in results.values())
    error = sum(result.found.error**2 for result in results.values())
    kept = sum(result.energy * result.found.norm**2 for result in results.values())
    return {
        "norm": total**0.5,
        "relative_error": (error / total) ** 0.5 if total else 0.0,
        "energy": kept / total if total else 1.0,
    }


def lora_config(original: PeftConfig, layers: dict[str, BaseTunerLayer], rank: int, base: str) -> LoraConfig:
    """PEFT's config for the factors: scale 1, and the layers by their full names.

    Args:
        original: the config of the adapter; its task type, base and trained modules are kept.
        base: the base's name, for an adapter that does not say its own.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        fan_in_fan_out=any(is_transposed(layer.get_base_layer()) for layer in layers.values()),
        modules_to_save=sorted(getattr(original, "modules_to_save", None) or []) or None,
        task_type=original.task_type,
        auto_mapping=original.auto_mapping,
        base_model_name_or_path=original.base_model_name_or_path or base,
        revision=original.revision,
        inference_mode=True,
    )
    config.target_modules = sorted(layers)  # a list, so that the same adapter gives the same file
    return config


def write_adapter(
    folder: Path, config: LoraConfig, results: dict[str, LayerResult], heads: dict[str, Tensor], record: dict[str, Any]
) -> None:
    """Write the config, the factors with the trained modules (safetensors), and extract.json into `folder`, which is made.

    Raises:
        UserError, OSError: the disk is full, or the folder cannot be written.
    """
    tensors = dict(heads)
    for name, result in results.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = result.found.A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = result.found.B.contiguous()
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise UserError(f"{folder / WEIGHTS_FILE} cannot be written ({error}): nothing was left there") from error
    write_json(folder / EXTRACT_FILE, record)


def check_written(shapes: nn.Module, folder: Path) -> None:
    """Raise `UserError` where PEFT looks for other tensors than those in `folder`.

    It takes every layer whose name ends as a target's does, so a name that is the end of another one brings a second layer.

    Args:
        shapes: the base model on the meta device; it is wrapped.
    """
    with torch.device("meta"):
        wrapped = PeftModel(shapes, read_adapter_config(folder))
    # without embeddings: for a target named lm_head PEFT would save the base's own weight as well
    needed = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    stored = stored_shapes(folder)
    if other := sorted(set(needed) ^ set(stored)):
        raise UserError(
            f"PEFT would not find the adapted layers again by their names (it differs in {other[0]}), so this LoRA would "
            "not load as it was made: merge the adapter instead"
        )


def check_target(out: Path, adapter: Path, overwrite: bool) -> None:
    """Raise `UserError` where `out` must not be written: it holds the adapter itself, or files that are not to be replaced."""
    if out.resolve() == adapter.resolve():
        raise UserError(f"--out {out} is the adapter itself: name another folder")
    if not out.is_dir():
        return
    if out.resolve().is_mount() or out.resolve() == Path.cwd():
        raise UserError(f"{out} is the folder you are in or the root of a disk, and cannot be replaced: name one in it")
    present = sorted(path.name for path in out.iterdir())
    if present and not overwrite:
        raise UserError(
            f"{out} is not empty: name another output folder, or add --overwrite to replace an extracted adapter"
        )
    if present and EXTRACT_FILE not in present:
        raise UserError(
            f"{out} was not written by this command (there is no {EXTRACT_FILE} in it): name another folder"
        )
    if foreign := [name for name in present if name not in OWN_FILES]:
        raise UserError(
            f"{out} also holds {foreign[0]}, which --overwrite would delete: move it, or name another folder"
        )


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """As `whole_folder`, for a `target` that may have files: they stay until the new ones are written, and if that fails."""
    place = target.resolve()
    aside = place.with_name(f".{place.name}.{os.getpid()}.old")
    try:
        with whole_folder(target) as folder:
            yield folder
            if place.exists():
                place.rename(aside)
    except BaseException:
        if aside.exists():
            aside.rename(place)
        raise
    shutil.rmtree(aside, ignore_errors=True)
