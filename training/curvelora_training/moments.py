"""The optimiser's state by parameter name, whole, whatever the engine: what Adam remembers of a parameter, and its steps.

A tensor `KEY:NAME` has the shape of the parameter NAME or, of an optimiser that quantises its state, the one it chose. KEY is the
optimiser's own (exp_avg, exp_avg_sq and step of PyTorch's AdamW; state1, absmax1, ... of bitsandbytes'). A plain number among
them is a tensor of no dimension of int64 or float64. A parameter that no gradient has reached, of which the optimiser remembers
nothing, has an empty tensor `none:NAME`: what is missing is an error.

Under ZeRO the state lies in flat tensors that cross parameters, each process having a part; DeepSpeed's `safe_get_full_...` and
`safe_set_full_...` put a parameter's together and take it apart. An optimiser that has not made a step has no state there yet, so
it is made first: without that a resumed run would begin with moments of zero, and say nothing. What was put in is therefore read
back and compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from curvelora.errors import UserError

Tensors = dict[str, torch.Tensor]
NOTHING = "none"


def zero_engine(trainer: Trainer) -> Any | None:
    """DeepSpeed's engine where it shards the optimiser, else None (stage 0 leaves it as it is)."""
    engine = trainer.model_wrapped
    stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0
    return engine if stage else None


def base_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimiser under the wrappers of Accelerate and DeepSpeed."""
    found = trainer.optimizer
    while hasattr(found, "optimizer"):
        found = found.optimizer
    return found


def trainable(trainer: Trainer) -> dict[str, nn.Parameter]:
    """The parameters that train, by their names in the model (without what an engine wraps around it)."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather_moments(trainer: Trainer, keep: bool = True) -> Tensors:
    """Everything the optimiser remembers, on the CPU. Every process must call it, as under ZeRO all have a part.

    Args:
        keep: whether this process wants it; it gets nothing otherwise, and copies nothing.
    """
    if (engine := zero_engine(trainer)) is not None:
        return _gather_from_zero(trainer, engine, keep)
    if not keep:
        return {}
    state = base_optimizer(trainer).state
    return {
        f"{key}:{name}": _as_tensor(value)
        for name, parameter in trainable(trainer).items()
        for key, value in (state.get(parameter) or {NOTHING: torch.empty(0)}).items()
    }


def restore_moments(trainer: Trainer, tensors: Tensors) -> None:
    """Put back what `gather_moments` gave, also where another engine or number of processes gave it.

    Raises:
        UserError: a parameter is missing in it, or what the optimiser has now is not what was put in.
    """
    names = trainable(trainer)
    moments: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(":")
        if name not in moments:
            raise UserError(f"its optimiser has {name}, which does not train here")
        moments[name][kind] = tensor
    if lacking := next((name for name, found in moments.items() if not found), None):
        raise UserError(f"its optimiser has nothing for {lacking}, which trains here")
    if (engine := zero_engine(trainer)) is not None:
        _restore_to_zero(trainer, engine, moments)
    else:
        _restore_plain(base_optimizer(trainer), {names[name]: found for name, found in moments.items()})
    now = gather_moments(trainer)
    for key, tensor in tensors.items():
        if key.startswith(f"{NOTHING}:"):
            continue
        if key not in now or not torch.equal(now[key], tensor.to(now[key].dtype)):
            raise UserError(f"the engine did not take the checkpoint's {key}: it would train on from another state")


def _restore_plain(optimizer: torch.optim.Optimizer, moments: dict[nn.Parameter, dict[str, Any]]) -> None:
    """Through the optimiser's own loader, which knows where its tensors belong."""
    held = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held["state"] = {
        i: {k: _as_value(v) for k, v in moments[p].items()} for i, p in enumerate(order) if NOTHING not in moments[p]
    }
    optimizer.load_state_dict(held)


def _flat_parts(engine: Any) -> list[torch.Tensor]:
    """The flat tensors that the base optimiser of ZeRO really steps, in this process's part."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _link(engine: Any) -> None:
    """Have the parameters of stages 1 and 2 know the optimiser's state.

    DeepSpeed (0.19) does it once, after the first step of the first parameter group, when the other groups have none yet.
    """
    zero = engine.optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _gather_from_zero(trainer: Trainer, engine: Any, keep: bool) -> Tensors:
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(engine)
    state, parts = base_optimizer(trainer).state, _flat_parts(engine)
    held = state[parts[0]]
    if not held:  # no step was made, or each was left out
        return {f"{NOTHING}:{name}": torch.zeros(0) for name in trainable(trainer)}
    keys = [k for k, v in held.items() if torch.is_tensor(v) and v.shape == parts[0].shape]
    numbers = {key: value for key, value in held.items() if key not in keys}  # the steps, alike in all parts
    tensors = {}
    for name, parameter in trainable(trainer).items():
        for key in keys:
            whole = safe_get_full_optimizer_state(parameter, key)  # every process's part is in it
            if keep:
                tensors[f"{key}:{name}"] = whole.cpu().clone()
        if keep:
            tensors |= {f"{key}:{name}": _as_tensor(value) for key, value in numbers.items()}
    return tensors


def _restore_to_zero(trainer: Trainer, engine: Any, moments: dict[str, dict[str, torch.Tensor]]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    state, names = base_optimizer(trainer).state, trainable(trainer)
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in names.items()}
    moments = {name: held for name, held in moments.items() if NOTHING not in held}  # the others begin at zero, as here
    if not moments:
        for parameter in names.values():
            safe_set_full_fp32_param(parameter, _whole(parameter))
        return
    first = next(iter(moments.values()))
    keys = [key for key in first if all(_has(held, key, shapes[name]) for name, held in moments.items())]
    if blocks := [key for key, value in first.items() if key not in keys and value.dim() > 0]:
        raise UserError(f"its optimiser keeps {blocks[0]} by blocks, which ZeRO's parts cut through")
    for part in _flat_parts(engine):  # as a first step would have made it
        state[part] = {key: _as_value(value) for key, value in first.items() if key not in keys}
        state[part] |= {key: torch.zeros_like(part) for key in keys}
    _link(engine)
    for name, parameter in names.items():
        # what the engine steps is a copy of the parameter, made before its value was loaded
        safe_set_full_fp32_param(parameter, _whole(parameter))
        for key in keys if name in moments else ():
            safe_set_full_optimizer_state(parameter, moments[name][key].to(parameter.device), key)


def _has(held: dict[str, torch.Tensor], key: str, shape: torch.Size) -> bool:
    return key in held and held[key].shape == shape


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.data
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.data.clone()


def _as_tensor(value: Any) -> torch.Tensor:
    """A copy on the CPU, of a number as a tensor of 64 bits."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _as_value(tensor: torch.Tensor) -> Any:
    """What `_as_tensor` was given."""
    number = tensor.dim() == 0 and tensor.dtype in (torch.int64, torch.float64)
    return tensor.item() if number else tensor.clone()
