"""The device that kernels are tested on: this CPU through Triton's interpreter, or (marker `gpu`) a CUDA GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_world import nf4_layer
from torch import nn

from curvelora.kernels import factor_gradients, portable, workspace


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test runs; kernels are compiled in a process with a GPU, so the CPU's turn is in one without."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if request.param == "cpu" and not portable.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1, which is set where there is no GPU")
    return torch.device(request.param, 0 if request.param == "cuda" else None)


def forget() -> None:
    """Give the buffers back."""
    workspace.release()


@pytest.fixture(autouse=True)
def kernels_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """-> set(mode): CURVELORA_KERNELS for this test, `interpret` at its start where there is no GPU."""

    def choose(mode: str) -> None:
        monkeypatch.setenv("CURVELORA_KERNELS", mode)
        forget()

    choose("interpret" if portable.INTERPRETED else "auto")
    yield choose
    forget()


@pytest.fixture
def nf4(device: torch.device) -> Callable[..., nn.Module]:
    """-> build(d_out, d_in, **options): see `kernel_world.nf4_layer`; on the test's device."""
    return lambda *args, **kwargs: nf4_layer(device, *args, **kwargs)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products in FP8 have been made, and second readings: [products, readings]."""
    made = [0, 0]

    def counted(name: str, index: int) -> None:
        function = getattr(factor_gradients, name)

        def call(*args: object) -> object:
            made[index] += 1
            return function(*args)

        monkeypatch.setattr(factor_gradients, name, call)

    counted("fp8_product", 0)
    counted("second_readings", 1)
    return made
