"""A frozen base model with random weights: NF4 bases are drawn as packed codes and block scales, never as full weights.

A Gaussian weight quantised to NF4 with double quantisation (arXiv 2305.14314) is a byte for two weights, and a scale for 64.
Both are drawn from the distributions that quantising N(0, std^2) would give, so a 70B base is ready as fast as its bytes can be
written, and dequantises to numbers of the right size: 3.5 % too large, since codes and scales are drawn independently. What
such a model says is its cost, its memory and its numerics; its loss says nothing.
"""

from __future__ import annotations

import math
import zlib

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from curvelora.layers.base_weight import keep_4bit_layout
from curvelora_eval.models import UNQUANTISED
from curvelora_training.frozen_shares import FrozenShares, units_of

STD = 0.02  # of the weights, as transformers initialises Llama
BLOCK = 64  # weights a scale
BASES = ("nf4", "bf16", "fp32")
_TABLE = 1 << 16  # entries of the table that turns uniform numbers into bytes


def random_model(
    config: PretrainedConfig, base: str, device: torch.device, seed: int = 0, shared: bool = False
) -> PreTrainedModel:
    """A causal language model of this shape on `device`, frozen; embeddings, norms and the output layer are bf16 (fp32 for fp32).

    Args:
        config: the shape.
        base: how its linear layers are stored: nf4 (double quantisation), bf16 or fp32.
        shared: every process of the default group keeps a share of each block (`frozen_shares`), and never holds more than one.
    """
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    code_table = nf4_byte_table(device) if base == "nf4" else None
    draw = {module: (seed, name) for name, module in model.named_modules()}  # the same weights in whatever order
    if shared:
        shares = FrozenShares(units_of(model, set()), device)
        for unit in shares.units:
            for module in unit.modules[:1]:
                _draw(module, draw, dtype, device, code_table)
            for module in unit.modules[1:]:  # a tied weight
                module.weight = unit.modules[0].weight
            unit.tensors = list(unit.modules[0].parameters())
            shares.take(unit)
        shares.start()
    _draw(model, draw, dtype, device, code_table)
    model.tie_weights()
    _compute_buffers(model, config, device)
    keep_4bit_layout(model)
    return model.eval()


def _draw(
    root: nn.Module,
    draw: dict[nn.Module, tuple[int, str]],
    dtype: torch.dtype,
    device: torch.device,
    code_table: Tensor | None,
) -> None:
    """Give every parameter under `root` that has no values yet some, quantised where there is a code table."""
    for name, module in list(root.named_modules()):
        if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue
        generator = torch.Generator(device).manual_seed(zlib.crc32("{} {}".format(*draw[module]).encode()))
        if (
            isinstance(module, nn.Linear)
            and code_table is not None
            and name.rpartition(".")[2] not in UNQUANTISED
            and name
        ):
            layer = random_nf4_linear(module.in_features, module.out_features, dtype, code_table, generator)
            if module.bias is not None:
                layer.bias = nn.Parameter(torch.zeros(module.out_features, device=device, dtype=dtype), False)
            root.set_submodule(name, layer)
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.dim() == 1:
                value.fill_(0.0 if key == "bias" else 1.0)
            else:
                value.normal_(0.0, STD, generator=generator)
            setattr(module, key, nn.Parameter(value, requires_grad=False))


def _compute_buffers(model: PreTrainedModel, config: PretrainedConfig, device: torch.device) -> None:
    """Buffers (rotary frequencies) are computed by constructors, which the meta device has kept from computing."""
    for name, module in list(model.named_modules()):
        if any(b.is_meta for b in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config).to(device))


def random_nf4_linear(
    d_in: int, d_out: int, dtype: torch.dtype, table: Tensor, generator: torch.Generator
) -> bnb.nn.Linear4bit:
    """A bitsandbytes layer whose weight is as if N(0, STD^2) had been quantised to NF4 with double quantisation.

    Args:
        table: from `nf4_byte_table`, on the device on which the layer is made.
    """
    device, entries = table.device, d_in * d_out
    uniform = torch.randint(0, _TABLE, (entries // 2, 1), device=device, generator=generator, dtype=torch.int32)
    packed = table[uniform]
    blocks = math.ceil(entries / BLOCK)
    u = torch.rand(blocks, device=device, generator=generator).clamp_(1e-6, 1 - 1e-6)
    # F(m) = erf(m / sqrt 2)^64 is the distribution of the largest of 64 absolute normal numbers
    absmax = STD * math.sqrt(2) * torch.erfinv(u.double().pow(1 / BLOCK)).float()
    offset = absmax.mean()
    codes, state2 = quantize_blockwise(absmax - offset, blocksize=256)
    state = QuantState(
        absmax=codes,
        shape=torch.Size((d_out, d_in)),
        dtype=dtype,
        blocksize=BLOCK,
        code=get_4bit_type("nf4", device=device),
        quant_type="nf4",
        offset=offset,
        state2=state2,
    )
    layer = bnb.nn.Linear4bit(d_in, d_out, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
    )
    return layer


def nf4_byte_table(device: torch.device) -> Tensor:
    """(65536,) bytes, each pair of NF4 codes as often as two neighbours of a quantised Gaussian weight have it.

    The frequencies of the 16 codes are those of weights divided by the largest of their block of 64.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1 << 14, BLOCK, generator=generator)
    levels = get_4bit_type("nf4", device=torch.device("cpu"))
    nearest = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(sample / sample.abs().amax(1, keepdim=True), nearest)
    share = torch.bincount(codes.flatten(), minlength=16).double() / codes.numel()
    edges = (torch.outer(share, share).flatten().cumsum(0) * _TABLE).round().long()
    table = torch.searchsorted(edges, torch.arange(_TABLE), right=True)
    return table.clamp(max=255).to(device, torch.uint8)
