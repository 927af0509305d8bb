"""`bench kernels` on a small layer, in the interpreter: what it calls, and the errors that it reports. Its times need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from curvelora.activations import Activation
from curvelora.kernels import choice
from curvelora_training.bench import kernels

TILES = ("merged_weight", "gradients", "first_readings", "second_readings")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """Calls are made once and counted instead of timed, and one tile of each kernel is tried."""
    monkeypatch.setenv("CURVELORA_KERNELS", "interpret")
    if (reason := choice.why_no_triton("interpret")) is not None:
        pytest.skip(reason)
    made: list[Callable[[], Any]] = []

    def once(call: Callable[[], Any], *args: Any, **options: Any) -> float:
        made.append(call)
        call()
        return float(len(made))

    monkeypatch.setattr(kernels, "do_bench", once)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # bitsandbytes writes to a given matrix on GPUs alone
    decode = kernels.dequantize_4bit
    monkeypatch.setattr(kernels, "dequantize_4bit", lambda codes, state, out=None: decode(codes, state))
    monkeypatch.setattr(kernels, "_copy_rate", lambda device: 1.0)
    for tiles in ("WEIGHT_TILES", "FIRST_TILES", "SECOND_TILES", "GRADIENT_TILES"):
        monkeypatch.setattr(kernels, tiles, getattr(kernels, tiles)[:1])
    return made


def test_every_kernel_runs_and_its_errors_are_small(called: list[Callable[[], Any]]) -> None:
    said: list[str] = []
    shapes, activation = [(64, 128), (96, 64)], Activation("sinter", 2e-2, 1e4)
    record = kernels.measure_kernels(shapes, 48, 8, 1e-2, activation, TILES, torch.device("cpu"), said.append)
    assert [(layer["d_out"], layer["d_in"]) for layer in record["layers"]] == shapes and len(said) == 2
    for layer in record["layers"]:
        assert set(layer["tiles"]) == set(TILES)
        assert all("error" not in tile for tiles in layer["tiles"].values() for tile in tiles)
        assert {*TILES, "product", "dropped", "product_added", "low_rank_gradients", "factor_norms"} <= {
            *layer["milliseconds"]
        }
        errors = dict(layer["errors"])
        assert 0.01 < errors.pop("product_G_in_fp8") < 0.06
        assert len(errors) == 6 and all(0 < error < 6e-3 for error in errors.values())
    assert len(called) == sum(len(layer["milliseconds"]) + len(TILES) for layer in record["layers"])
