"""One base model under many arms: every arm has modules of its own on the same frozen tensors."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from curvelora.errors import UserError
from curvelora.kernels import use_kernels
from curvelora.layers.adapter_layer import AdapterLayer
from curvelora.layers.decomposed import DecomposedLayer
from curvelora.registry import METHODS
from curvelora_eval.lab.updates import PEFT_PREFIX, adapted_layers, factors
from curvelora_training.bench.arms import FULL, Arm
from curvelora_training.bench.full import FullLinear
from curvelora_training.bench.random_base import STD
from curvelora_training.kept_products import keep_products
from curvelora_training.liger import use_liger

REMOVED_STD = 1e-3  # of C's entries where a base with random weights has no singular vectors worth computing


def arm_model(
    base: PreTrainedModel, arm: Arm, options: dict[str, Any], heads: list[str], seed: int, random: bool
) -> nn.Module:
    """`base` with the arm's adapter on it. The base's tensors are shared, its modules are copies.

    Args:
        options: the comparison's options, of which the arm takes those that its method has; its own ones win.
        heads: modules with new weights, which train in full and start anew from the seed.
        seed: of the adapter's start. Arms whose A is Kaiming-uniform start from the same A, layer by layer.
        random: the base has random weights, so what an init would take from its singular vectors is drawn instead.

    Raises:
        UserError: the method refuses the options or a layer.
    """
    model = float32_copy(base) if arm.fp32 else shared_copy(base)
    torch.manual_seed(seed)
    if arm.method == FULL:
        wrapped = _train_weights(model, options["target_modules"], heads)
    else:
        with next(model.parameters()).device:  # drawing 70B-sized adapters on the CPU takes minutes
            wrapped = get_peft_model(model, peft_config(arm, options, heads, random))
        _draw_factors(wrapped, arm, seed, random)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and any(f"{head}." in name for head in heads):
            draw = _generator(parameter, seed, name.removeprefix(PEFT_PREFIX).replace("modules_to_save.default.", ""))
            start = torch.randn(parameter.shape, generator=draw, device=draw.device)
            start *= getattr(base.config, "initializer_range", STD)  # T5 has none
            parameter.data = start * (parameter.dim() > 1)
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def switch(model: nn.Module, arm: Arm) -> dict[str, Any]:
    """Have `model`, from `arm_model`, computed as the arm says; gradient checkpointing is as it will be.

    Returns:
        fused_layers: how many adapter layers take fused kernels.
        unfused_layers: why the others do not -> how many.
        liger: whether liger-kernel's kernels are in it.
        kept_layers: how many layers keep the results of large products.

    Raises:
        UserError: Liger's kernels cannot be had, or no layer can keep its products.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    fused, reasons = use_kernels(model, "off" if arm.eager else "fp8" if arm.fp8 else "auto")
    if arm.liger:
        use_liger(inner, arm.keep > 0)
    kept = keep_products(inner, arm.keep) if arm.keep else 0
    return {"fused_layers": fused, "unfused_layers": dict(reasons), "liger": arm.liger, "kept_layers": kept}


def peft_config(arm: Arm, options: dict[str, Any], heads: list[str], random: bool) -> Any:
    """The PEFT config of an arm. Raises `UserError` for options that the method refuses."""
    method = METHODS[arm.method]
    known = method.option_types()
    chosen = {key: value for key, value in options.items() if key in known} | arm.options
    if arm.method == "ranlora" and "alpha" not in arm.options:
        chosen.pop("alpha", None)  # the paper's rule is 2r
    if heads:
        chosen["modules_to_save"] = heads
    config = method.build_config(**chosen)
    if random and getattr(config, "needs_unquantised_weight", False):
        config.factors_stored = True  # no weight is worth a decomposition: `_draw_factors` fills them
    return config


def shared_copy(base: PreTrainedModel) -> PreTrainedModel:
    """The same model in other modules: parameters and buffers are the base's own."""
    memo = {id(t): t for t in (*base.parameters(), *base.buffers())}
    for parameter in base.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            memo[id(state)] = state
    return copy.deepcopy(base, memo)


def float32_copy(base: PreTrainedModel) -> PreTrainedModel:
    """The same numbers, multiplied in fp32: unquantised tensors as fp32 copies, NF4 weights shared and dequantised to fp32."""
    model = shared_copy(base)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32
            module.weight = _dequantised_to_float32(module.weight)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
    model.tie_weights()
    model.config = copy.deepcopy(base.config)
    model.config.dtype = torch.float32
    shared = {tensor.data_ptr() for tensor in base.parameters()}
    model.copies = [p for p in model.parameters() if p.data_ptr() not in shared]
    return model


def _dequantised_to_float32(weight: bnb.nn.Params4bit) -> bnb.nn.Params4bit:
    """The same codes and scales in another parameter: bitsandbytes rounds to the dtype that the weight was quantised from."""
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    given = {
        name: getattr(weight, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    return bnb.nn.Params4bit(weight.data, requires_grad=False, quant_state=state, bnb_quantized=True, **given)


def _train_weights(model: PreTrainedModel, targets: list[str], heads: list[str]) -> nn.Module:
    found = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in targets]
    if not found:
        raise UserError(f"target_modules {', '.join(targets)} match no module of this model")
    for name, module in found:
        weight = module.weight
        if isinstance(module, bnb.nn.Linear4bit):
            weight = dequantize_bnb_weight(weight, state=weight.quant_state)
        model.set_submodule(name, FullLinear(weight, module.bias))
    for head in heads:
        layer = copy.deepcopy(model.get_submodule(head)).float()
        model.set_submodule(head, layer.requires_grad_(True))
    return model


def _draw_factors(model: PeftModel, arm: Arm, seed: int, random: bool) -> None:
    """Start arms with a Kaiming-uniform A from the same A, and fill removed factors that were not computed."""
    config = model.peft_config["default"]
    # an own arm may start otherwise (PiSSA, Xavier), and then keeps its start
    kaiming = getattr(config, "init_lora_weights", True) is True and getattr(config, "init_A", "kaiming") == "kaiming"
    for name, layer in adapted_layers(model).items():
        A, B = factors(layer)
        draw = _generator(A, seed, name)
        removed = layer.removed("default") if isinstance(layer, DecomposedLayer) else None
        if removed is None and kaiming:
            if isinstance(layer, AdapterLayer):  # of NEAT, A is computed from what is drawn
                A = getattr(layer, layer.adapter_layer_names[0])["default"].detach()
            bound = A.shape[1] ** -0.5
            A.data.uniform_(-bound, bound, generator=draw)
        elif removed is not None and random:
            # C = B0 A0 with orthogonal-like factors of the size of a tail component; A and B start from them, as in the method
            A0, B0 = removed
            for tensor in (A0, B0):
                tensor.data.normal_(std=REMOVED_STD**0.5 / A.shape[0] ** 0.25, generator=draw)
            a, b = layer.divisors(config)
            A.data.copy_(A0 / a)
            B.data.copy_(B0 / b)


@torch.no_grad()
def set_update_std(model: nn.Module, std: float, seed: int = 0) -> float | None:
    """Draw B so that the entries of BA have this standard deviation (dimensionless); returns what was reached.

    A cost measured at B = 0 would flatter methods whose work depends on the values. None where no layer has two factors.
    """
    for name, layer in adapted_layers(model).items():
        if (pair := factors(layer)) is not None:
            A, B = pair
            size = std / (A.shape[0] ** 0.5 * A.float().square().mean().sqrt().item())
            B.data.normal_(std=size, generator=_generator(B, seed, name))
    return update_std_of(model)


@torch.no_grad()
def update_std_of(model: nn.Module) -> float | None:
    """Root mean square of the entries of BA (dimensionless), over all layers; exact. None where no layer has two factors."""
    squares = entries = 0.0
    for layer in adapted_layers(model).values():
        if (pair := factors(layer)) is not None:
            A, B = (factor.double() for factor in pair)
            squares += ((A @ A.T) * (B.T @ B)).sum().item()  # ||BA||_F^2 without forming BA
            entries += A.shape[1] * B.shape[0]
    return (squares / entries) ** 0.5 if entries else None


def arm_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Everything that is the arm's own: what trains, the frozen tensors of its adapters, and fp32 copies of the base's."""
    yield from (p for p in model.parameters() if p.requires_grad)
    for module in model.modules():
        yield from (p for p in getattr(module, "copies", ()) if not p.requires_grad)
        if isinstance(module, AdapterLayer | FullLinear):
            yield from (b for name, b in module.named_buffers() if not name.startswith("base_layer."))


def _generator(like: Tensor, seed: int, name: str) -> torch.Generator:
    """Random numbers on the device of `like` that depend on the seed and on this name alone."""
    # a crc of both: the generators of CPUs take no more than 32 bits, and would drop a seed that is in the others
    return torch.Generator(like.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
