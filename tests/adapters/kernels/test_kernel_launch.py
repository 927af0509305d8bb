"""What Triton compiled is launched again for arguments of the same kinds, and for no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from curvelora.kernels import launch as module
from curvelora.kernels.launch import _kind, launch


class Jitted:
    """A stand-in for a `triton.jit` function: says what was compiled and what was launched as it is."""

    def __init__(self, constants: list[bool]) -> None:
        self.params = [SimpleNamespace(is_constexpr=constant) for constant in constants]
        self.__name__ = "jitted"
        self.compiled: list[tuple] = []
        self.launched: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*args: Any, **options: int) -> Any:
            self.compiled.append(args)
            return {(*grid, 1, 1)[:3]: lambda *again: self.launched.append(again)}

        return compile_and_launch


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """As if there were GPUs; the current one can be set."""
    current = {"device": 0}
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_COMPILED", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current["device"])
    return current


def test_the_same_kinds_are_compiled_once(on_gpu: dict[str, int]) -> None:
    kernel, x = Jitted([False, False, False, True]), torch.zeros(64)
    for number, scale in ((32, 0.5), (48, 0.25), (64, 1.0)):
        launch(kernel, (2,), x, number, scale, "sinter", num_warps=4)
    assert len(kernel.compiled) == 1
    assert [args[1:] for args in kernel.launched] == [(48, 0.25, "sinter"), (64, 1.0, "sinter")]


@pytest.mark.parametrize(
    "other",
    [
        {"number": 33},
        {"number": 1},
        {"number": 1 << 31},
        {"name": "cos"},
        {"x": torch.zeros(65)[1:]},
        {"x": torch.zeros(64, dtype=torch.bfloat16)},
        {"warps": 8},
        {"device": 1},
    ],
)
def test_other_kinds_are_compiled_for_themselves(on_gpu: dict[str, int], other: dict[str, Any]) -> None:
    """Sizes that are no multiple of 16 or are 1, constants, dtypes, misaligned views, options, devices."""
    kernel = Jitted([False, False, True])
    usual = {"x": torch.zeros(64), "number": 32, "name": "sinter", "warps": 4, "device": 0}
    for one in (usual, usual | other, usual, usual | other):
        on_gpu["device"] = one["device"]
        launch(kernel, (2,), one["x"], one["number"], one["name"], num_warps=one["warps"])
    assert len(kernel.compiled) == 2 and len(kernel.launched) == 2


def test_what_triton_may_specialise_for_has_a_kind_of_its_own() -> None:
    """Triton's own answers for two arguments differ only where ours do."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    x = torch.zeros(64)
    numbers = [0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**31 + 16, 2**40, 2**62, 2**63, -1, -16, -(2**31), -(2**31) - 16]
    tensors = [x, x[1:], x[4:], x[:0], x.bfloat16(), x.to(torch.uint8), x.to(torch.float8_e4m3fn), x.long()]
    answers: dict[Any, Any] = {}
    for argument in (*numbers, *tensors, 0.5, 1.0):
        answer = native_specialize_impl(CUDABackend, argument, False, True, True)
        assert answers.setdefault(_kind(argument), answer) == answer, argument
    assert len(set(answers.values())) > 10


def test_constants_come_last(on_gpu: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="jitted: a constant before another argument"):
        launch(Jitted([True, False]), (1,), "sinter", 1)
