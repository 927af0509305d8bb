"""Load a saved adapter after checking everything that can be checked from its files.

PEFT's own `from_pretrained` loads these adapters too; this adds the checks: safetensors only, whole, and made for this model.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from curvelora.errors import UserError, nearest
from curvelora.registry import METHODS

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SHOWN = 3  # differences listed in a message


def read_adapter_config(folder: str | Path) -> PeftConfig:
    """Read `adapter_config.json`.

    Raises:
        UserError: no such folder or file, damaged JSON, a method that neither PEFT nor this package knows, or prompt learning.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter: there is no {CONFIG_FILE} in it")
    try:
        peft_type = json.loads(path.read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): save the adapter again") from error
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except UserError as error:
        raise UserError(f"{path} has a value that cannot be: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        hint = nearest(str(peft_type).lower(), METHODS)
        raise UserError(
            f"{path} names the method {peft_type!r}, which cannot be loaded here{hint} ({error})"
        ) from error
    if config.is_prompt_learning:  # `PeftModel`, which calls the base alone, would pass for a model with an adapter
        raise UserError(
            f"{folder} cannot be merged or loaded here: {peft_type} changes no weight of the base, it puts something learnt "
            "before the input; load it with PEFT's own PeftModel.from_pretrained"
        )
    return config


def stored_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, read from the header of the weights file; nothing is loaded and nothing can run.

    Raises:
        UserError: the file is missing, pickled, truncated or damaged.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        pickled = sorted(p.name for p in Path(folder).glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise UserError(
                f"{folder} holds pickled weights ({pickled[0]}), which can run code when loaded: save it as safetensors"
            )
        raise UserError(f"{folder} holds no adapter weights: there is no {WEIGHTS_FILE} in it")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is truncated, damaged or no safetensors file ({error}): copy or save it again"
        ) from error


def load_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", trainable: bool = False
) -> PeftModel:
    """Put the adapter in `folder` on `model`.

    Args:
        model: the base model; it is wrapped, and its linear layers are replaced in place.
        folder: where `save_pretrained` wrote the adapter.
        trainable: whether the adapter's tensors require gradients.

    Raises:
        UserError: a file is missing, pickled, truncated or damaged, or names or shapes differ from what `model` needs.
    """
    config = read_adapter_config(folder)
    config.inference_mode = not trainable
    wrapped = _put_on(model, config, folder, adapter_name)
    from safetensors.torch import load_file

    set_peft_model_state_dict(wrapped, load_file(str(Path(folder) / WEIGHTS_FILE)), adapter_name=adapter_name)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a head on a half-precision base would lose small updates
    return wrapped


def check_fits(shapes: nn.Module, folder: str | Path) -> None:
    """Look for everything that `load_adapter` looks for, before the base's weights are loaded.

    A method of PEFT's that cannot be put on a model without weights is left to `load_adapter`.

    Args:
        shapes: the base model on the meta device; it is wrapped.
        folder: as for `load_adapter`.

    Raises:
        UserError: as `load_adapter`.
    """
    config = read_adapter_config(folder)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # another init of PEFT's LoRA reads weights, and the shapes are the same
    try:
        with torch.device("meta"):  # the adapter needs no memory either
            _put_on(shapes, config, folder, "default")
    except (
        RuntimeError
    ):  # some methods of PEFT's read weights when they are made (BOFT, SHiRA), and there are none here
        return  # `load_adapter` looks again


def _put_on(model: nn.Module, config: PeftConfig, folder: str | Path, adapter_name: str) -> PeftModel:
    """`model` with an adapter whose tensors have the names and shapes of those in `folder`."""
    stored = stored_shapes(folder)
    try:
        wrapped = PeftModel(model, config, adapter_name)
    except ValueError as error:
        raise UserError(f"the adapter in {folder} does not fit this model: {error}") from error
    needed = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(wrapped, adapter_name=adapter_name).items()
    }
    _compare(folder, stored, needed)
    return wrapped


def _compare(folder: str | Path, stored: dict[str, tuple[int, ...]], needed: dict[str, tuple[int, ...]]) -> None:
    differences = [
        f"{name} is {_shape(stored[name])} in the file and {_shape(needed[name])} in the model"
        for name in needed
        if name in stored and stored[name] != needed[name]
    ]
    differences += [f"{name} is missing in the file" for name in needed if name not in stored]
    differences += [f"{name} is in the file but not in the model" for name in stored if name not in needed]
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise UserError(f"the adapter in {folder} belongs to another model: {'; '.join(differences[:SHOWN])}{more}")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
