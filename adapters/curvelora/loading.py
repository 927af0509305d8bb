"""Load a saved adapter after checking everything that can be checked from its files.

PEFT's own `from_pretrained` loads these adapters too; this adds the checks: safetensors only, whole, and made for this model.
"""

from __future__ import annotations

import json
from pathlib import Path

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
        UserError: no such folder or file, damaged JSON, or a method that neither PEFT nor this package knows.
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
        return PeftConfig.from_pretrained(str(folder))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        hint = nearest(str(peft_type).lower(), METHODS)
        raise UserError(
            f"{path} names the method {peft_type!r}, which cannot be loaded here{hint} ({error})"
        ) from error


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
    stored = stored_shapes(folder)
    config.inference_mode = not trainable
    try:
        wrapped = PeftModel(model, config, adapter_name)
    except ValueError as error:
        raise UserError(f"the adapter in {folder} does not fit this model: {error}") from error
    needed = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(wrapped, adapter_name=adapter_name).items()
    }
    _compare(folder, stored, needed)
    from safetensors.torch import load_file

    set_peft_model_state_dict(wrapped, load_file(str(Path(folder) / WEIGHTS_FILE)), adapter_name=adapter_name)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a head on a half-precision base would lose small updates
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
