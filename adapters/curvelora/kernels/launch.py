"""Launching a kernel that has been launched before, without looking at every argument again.

Triton asks in each launch for what every argument may specialise the code: 50 us and more for twenty of them, longer than the
smaller kernels run. Here the same question is asked by less, and what Triton compiled for the answer is launched as it is. What
changes how Triton compiles (debugging, instrumentation) has to be set before a kernel's first launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvelora.kernels.portable import INTERPRETED

# what is compiled, by kernel, device, options and kinds of arguments; how many arguments of a kernel are no constants
_COMPILED: dict[tuple, Any] = {}
_RUNTIME: dict[Any, int] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: int) -> None:
    """kernel[grid](*args, **options), on the current device.

    Args:
        kernel: a `triton.jit` function, its constants behind its other arguments.
        grid: one to three numbers of programs.
        options: num_warps and the like.
    """
    if INTERPRETED:
        kernel[grid](*args, **options)
        return
    if (runtime := _RUNTIME.get(kernel)) is None:
        runtime = _RUNTIME[kernel] = _runtime_arguments(kernel)
    key = kernel, torch.cuda.current_device(), *options.values(), *map(_kind, args[:runtime]), *args[runtime:]
    if (compiled := _COMPILED.get(key)) is None:
        _COMPILED[key] = kernel[grid](*args, **options)
    else:
        compiled[grid + (1,) * (3 - len(grid))](*args)


def _runtime_arguments(kernel: Any) -> int:
    constants = [parameter.is_constexpr for parameter in kernel.params]
    if constants != sorted(constants):
        raise TypeError(f"{kernel.__name__}: a constant before another argument")
    return constants.count(False)


def _kind(argument: Any) -> Any:
    """What Triton may specialise an argument for: its type, and whether it is a multiple of 16, or 1."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is int:
        return argument % 16 == 0, argument == 1, -(1 << 31) <= argument < 1 << 31, argument < 1 << 63
    return type(argument)
