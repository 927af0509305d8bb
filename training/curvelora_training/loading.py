"""A base model straight into shares: one block of layers at a time is read, quantised and shared out, so no process holds more.

transformers loads (and quantises) a model whole. Where its names are the checkpoint's and nothing else is to be done to the
weights, each tensor can be read when its turn comes; any other model is loaded whole by every process first, and then shared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from curvelora.checkpoint import stored_names, stored_tensor_shapes, tensor_files
from curvelora.errors import UserError
from curvelora.layers.base_weight import keep_4bit_layout
from curvelora_eval.models import attention, fill_in, load_base, load_config, quantisation_config
from curvelora_eval.spec import ModelSpec
from curvelora_eval.tasks import Task
from curvelora_training.distributed import agree
from curvelora_training.frozen_shares import FrozenShares, units_of

Places = dict[nn.Parameter, list[tuple[nn.Module, str]]]


def load_into_shares(spec: ModelSpec, task: Task, device: torch.device, trained: set[str]) -> PreTrainedModel:
    """The frozen base, of which every process of the default group holds a share. Arguments and errors as for `load_base`."""
    try:
        model, shares = _load(spec, task, device, trained)
        problem = None
    except UserError as error:
        problem = error
    agree(problem)  # before anything is gathered, for which all are needed
    shares.start()
    return model


def _load(spec: ModelSpec, task: Task, device: torch.device, trained: set[str]) -> tuple[PreTrainedModel, FrozenShares]:
    model = read = None
    # new heads are drawn, and a checkpoint that is quantised itself is not read tensor by tensor
    if not task.new_head and not getattr(load_config(spec, task), "quantization_config", None):
        model = _empty_model(spec, task, device)
        places = _places(model)
        read = _reader(model, places, spec)
    if read is None:
        model = load_base(spec, task, device, trained)
        shares = FrozenShares(units_of(model, trained), device)
        for unit in shares.units:
            shares.take(unit)
        return model, shares
    units = units_of(model, trained)
    names = {parameter: name for name, parameter in model.named_parameters()}
    shares = FrozenShares(units, device)
    for unit in units:
        unit.tensors = [_fill(places[p], read(names[p]), p, device) for p in unit.tensors]
        shares.take(unit)
    for parameter, name in names.items():
        module, attribute = places[parameter][0]
        if module._parameters[attribute] is parameter:  # in no unit: small, or it trains
            _fill(places[parameter], read(name), parameter, device)
    for buffer_owner in model.modules():
        for name, buffer in buffer_owner.named_buffers(recurse=False):
            setattr(buffer_owner, name, buffer.to(device))
    keep_4bit_layout(model)
    fill_in(model, spec, task)
    return model.eval(), shares


def _empty_model(spec: ModelSpec, task: Task, device: torch.device) -> PreTrainedModel:
    """The model with real buffers and its parameters on the meta device, its linear layers as quantisation wants them."""
    config = load_config(spec, task)
    dtype = getattr(torch, spec.dtype)
    pinned = {"code_revision": spec.revision} if spec.trust_remote_code and spec.revision else {}
    try:
        with init_empty_weights(include_buffers=False):
            model = task.auto_class.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention(spec, task, device),
                trust_remote_code=spec.trust_remote_code,
                **pinned,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"the model {spec.path} cannot be made: {' '.join(str(error).split())[:300]}") from error
    if spec.quantization != "none":
        quantiser = AutoHfQuantizer.from_config(quantisation_config(spec))
        quantiser.preprocess_model(model=model, device_map={"": device}, dtype=dtype)
        model.hf_quantizer, model.config.quantization_config = quantiser, quantiser.quantization_config
        model.is_loaded_in_4bit = True  # PEFT and the trainer ask for it
    model.tie_weights()
    if model.can_generate():
        with contextlib.suppress(OSError):  # it need not be there
            model.generation_config = GenerationConfig.from_pretrained(spec.path, revision=spec.revision)
    return model


def _reader(model: PreTrainedModel, places: Places, spec: ModelSpec) -> Callable[[str], Tensor] | None:
    """The function from a parameter's name to its tensor in the checkpoint; None where it takes more than reading."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    persistent = set(model.state_dict()) - {name for several in names.values() for name in several}
    if (
        persistent
        or getattr(model, "_keep_in_fp32_modules", None)
        or getattr(model, "_keep_in_fp32_modules_strict", None)
        or (spec.quantization != "none" and any(isinstance(m, Conv1D) for m in model.modules()))
    ):
        return None
    shapes = stored_tensor_shapes(spec.path, spec.revision)
    find = stored_names(model, shapes)
    stored: dict[str, str] = {}
    for parameter, own in names.items():
        # a tied weight that the checkpoint has twice is two, where the two differ
        several = set(map(find, own)) - {None}
        found = several.pop() if len(several) == 1 else None
        module, attribute = places[parameter][0]
        packed = isinstance(module, bnb.nn.Linear4bit) and attribute == "weight"
        shape = (module.out_features, module.in_features) if packed else tuple(parameter.shape)
        if found is None or shapes[found] != shape:
            return None
        stored[own[0]] = found
    files = tensor_files(spec.path, spec.revision)
    dtype = getattr(torch, spec.dtype)

    def read(name: str) -> Tensor:
        try:
            with safe_open(str(files[stored[name]]), framework="pt") as file:
                return file.get_tensor(stored[name]).to(dtype)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the weights of {spec.path} cannot be loaded: {' '.join(str(error).split())[:300]}"
            ) from error

    return read


def _places(model: nn.Module) -> Places:
    """Where each parameter is found: (module, its name there), several where it is tied."""
    found: Places = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(parameter, []).append((module, name))
    return found


def _fill(
    places: list[tuple[nn.Module, str]], value: Tensor, empty: nn.Parameter, device: torch.device
) -> nn.Parameter:
    """Put a frozen parameter with this value where the empty one is; quantised where that one would be."""
    kind: Any = type(empty)
    if kind is bnb.nn.Params4bit:
        filled = kind(value, requires_grad=False, **vars(empty)).to(device)
    else:
        filled = nn.Parameter(value.to(device), requires_grad=False)
    for module, name in places:
        module._parameters[name] = filled
    return filled
