"""The reference path: the same function as the model's own, made of plain operations that differentiate any number of times.

Training runs through operators with hand-written first derivatives, bf16 products, quantised kernels and fused attention, and
none of them has a second derivative. What looks at curvature, such as a Hessian-vector product, runs in here instead:

    numbers          fp32 throughout (fp64 where a parameter is fp64); no autocast, no TF32
    dense delta      x dW^T with dW = s f(BA) formed by autograd's own operations, instead of the operator that recomputes it
    quantised base   a product with the dequantised weight, which is read again in each pass and never kept
    attention        PyTorch's math kernel; flash and flex implementations are switched to "sdpa" or "eager"
    mode             evaluation, so no dropout and no checkpointing; torch.compile off

It costs memory: each dense-delta layer keeps a handful of fp32 d_out x d_in tensors, and a half-precision base is held a second
time in fp32. Everything is put back on the way out, the frozen weights bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from curvelora.layers.base_weight import refuse_reordered_4bit
from curvelora.layers.dense_delta import DenseDeltaLayer
from curvelora.precision import exact_products

# twice differentiable as they are: with the math kernel, sdpa is a handful of products and a softmax
PLAIN_ATTENTION = ("sdpa", "eager", None)


@contextlib.contextmanager
def reference_path(model: nn.Module) -> Iterator[torch.dtype]:
    """Inside, `model` computes by the reference path; gives the dtype in which it does, fp32 or fp64.

    Args:
        model: any model, with adapters of any method or without; not wrapped for data parallelism. An autocast that the
            model's own forward method turns on (accelerate's wrapper) stays on.

    Outputs differ from the model's own by rounding, and over an int8 base by the rounding of activations, which is left out.
    Adapters that are merged or disabled stay so. Parameters that are narrower than the dtype have other storage inside.

    Raises:
        UserError: a 4-bit base whose codes bitsandbytes has reordered for the CPU.
    """
    work = torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point() and not _quantised(parameter):
            work = torch.promote_types(work, parameter.dtype)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for kind in sorted({parameter.device.type for parameter in model.parameters()}):
            stack.enter_context(exact_products(torch.device(kind)))
        # a convolution has its own switch, which is on by default
        convolutions = torch.backends.cudnn.conv
        _set(stack, convolutions, "fp32_precision", "ieee", restored=convolutions.fp32_precision)
        _use_plain_attention(stack, model)
        _widen(stack, model, work)
        for name, module in model.named_modules():
            if isinstance(module, DenseDeltaLayer):
                _shadow(stack, module, "adapter_output", partial(_dense_delta_output, module))
            elif isinstance(module, nn.Linear) and _quantised(module.weight):
                refuse_reordered_4bit(module, name)
                _shadow(stack, module, "forward", partial(_dequantised_output, module))
        yield work


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own mode is put back, also where they differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _dense_delta_output(layer: DenseDeltaLayer, adapter: str, x: Tensor) -> Tensor:
    """dW x in evaluation mode: (..., d_in) -> (..., d_out); autograd sees every step."""
    A, B = layer.factors(adapter)
    return F.linear(x, layer.delta_map(adapter).value(B @ A))


def _dequantised_output(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x + b with the dequantised weight, (..., d_in) -> (..., d_out), in the dtype of x."""
    backend = resolve_quantization_backend(layer)
    output = _FrozenProduct.apply(x, lambda: backend.get_base_weight(layer).to(x.dtype), False)
    return output if layer.bias is None else output + layer.bias


class _FrozenProduct(torch.autograd.Function):
    """x W^T, or x W, with a weight that has no gradient and is made anew where it is needed.

    Its backward pass is the same product with the weight turned round, hence differentiable in its turn.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], transposed: bool) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed
        W = weight()
        return x @ (W if transposed else W.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _FrozenProduct.apply(grad, ctx.weight, not ctx.transposed), None, None


def _quantised(weight: Tensor) -> bool:
    """Whether this is a weight of bitsandbytes; 4-bit codes may be stored in a floating-point dtype."""
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def _use_plain_attention(stack: contextlib.ExitStack, model: nn.Module) -> None:
    configs = set()
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or id(module.config) in configs:
            continue
        configs.add(id(module.config))
        current = module.config._attn_implementation
        if current not in PLAIN_ATTENTION and module._can_set_attn_implementation():
            plain = "sdpa" if module._supports_sdpa else "eager"
            # the key "" is the config's own part: the parts of a composite model have modules of their own
            _set(stack, module.config, "_attn_implementation", {"": plain}, restored={"": current})


def _widen(stack: contextlib.ExitStack, model: nn.Module, work: torch.dtype) -> None:
    """Give floating-point parameters and buffers that are narrower than `work` that dtype; exact, and undone on exit."""

    def narrow(tensor: Tensor | None) -> bool:
        floating = tensor is not None and tensor.is_floating_point() and not _quantised(tensor)
        return floating and torch.promote_types(tensor.dtype, work) != tensor.dtype

    for parameter in model.parameters():  # a tied one comes once
        if narrow(parameter):
            _set(stack, parameter, "data", parameter.data.to(work), restored=parameter.data)
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if narrow(buffer):
                stack.callback(module._buffers.__setitem__, name, buffer)
                module._buffers[name] = buffer.to(work)


def _set(stack: contextlib.ExitStack, owner: Any, name: str, value: Any, restored: Any) -> None:
    """Set an attribute until `stack` closes, and then to `restored`."""
    stack.callback(setattr, owner, name, restored)
    setattr(owner, name, value)


def _shadow(stack: contextlib.ExitStack, module: nn.Module, name: str, method: Callable) -> None:
    """Replace a method of one instance until `stack` closes."""
    own = vars(module)
    if name in own:  # a hook of accelerate has replaced it already
        stack.callback(own.__setitem__, name, own[name])
    else:
        stack.callback(own.pop, name)
    own[name] = method
