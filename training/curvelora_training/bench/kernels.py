"""`curvelora bench kernels`: each fused kernel on one layer, beside the products it stands between and the bytes it moves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor
from triton.testing import do_bench

from curvelora.activations import Activation
from curvelora.kernels import dropout, fp8_product, fp8_readings, nf4
from curvelora.kernels import factor_gradients as gradients
from curvelora.kernels import merged_weight as merged
from curvelora.kernels.factor_norms import factor_norms
from curvelora.kernels.fp8_gate import why_no_fp8
from curvelora.kernels.rounded_factors import rounded_factors
from curvelora.layers.dense_delta import DeltaMap
from curvelora.precision import exact_products
from curvelora_eval.environment import describe_environment
from curvelora_training.bench.devices import Device
from curvelora_training.bench.random_base import nf4_byte_table, random_nf4_linear

WEIGHT_TILES = [*itertools.product((64, 128), (64,), (2, 4, 8, 16), (4, 8), (1, 2, 3))]
FIRST_TILES = [*itertools.product((64, 128, 256), (64, 128), (132, 264, 528), (4, 8), (2, 3))]
SECOND_TILES = [*itertools.product((32, 64), (64, 128), (132, 264, 528), (4, 8), (3, 4))]
GRADIENT_TILES = [*itertools.product((32, 64, 128), (64, 128), (132, 264, 396, 528), (4, 8), (1, 2, 3))]


def measure_kernels(
    shapes: list[tuple[int, int]],
    tokens: int,
    rank: int,
    update_std: float,
    activation: Activation,
    tune: tuple[str, ...],
    device: torch.device,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The record of `bench kernels`: milliseconds (median, L2 cache emptied before each), relative errors to fp64, tiles."""
    box = Device(device)
    found = []
    for shape in shapes:
        found.append(_measure_layer(shape, tokens, rank, update_std, activation, tune, device))
        say(_line(found[-1]))
    return {
        "schema": 1,
        "kind": "bench_kernels",
        "settings": {"tokens": tokens, "rank": rank, "std_BA": update_std, "activation": vars(activation)},
        "environment": describe_environment(),
        "device": box.name,
        "clocks": box.clocks(),
        "gemm_tflops": box.gemm_tflops(torch.bfloat16),
        "copy_bytes_per_s": _copy_rate(device),
        "layers": found,
    }


def _measure_layer(
    shape: tuple[int, int],
    tokens: int,
    rank: int,
    update_std: float,
    activation: Activation,
    tune: tuple[str, ...],
    device: torch.device,
) -> dict[str, Any]:
    d_out, d_in = shape
    draw = torch.Generator(device).manual_seed(0)
    layer = random_nf4_linear(d_in, d_out, torch.bfloat16, nf4_byte_table(device), draw)
    base = nf4.codes_of(layer)
    A = torch.empty(rank, d_in, device=device).uniform_(-(d_in**-0.5), d_in**-0.5, generator=draw)
    B = torch.randn(d_out, rank, device=device, generator=draw) * (update_std * (3 * d_in / rank) ** 0.5)
    x, g = (torch.randn(tokens, d, device=device, dtype=torch.bfloat16, generator=draw) for d in (d_in, d_out))
    W, G = (torch.empty(d_out, d_in, device=device, dtype=torch.bfloat16) for _ in range(2))
    delta_map = DeltaMap(activation, 0.25)
    torch.mm(g.T, x, out=G)
    y = torch.empty(tokens, d_out, device=device, dtype=torch.bfloat16)
    low, has_fp8 = x @ A.to(x.dtype).T, why_no_fp8(device) is None
    seed = dropout.new_seed(device)
    thin = fp8_readings.first_readings(g, x, A, B) if has_fp8 else ()
    record: dict[str, Any] = {"d_out": d_out, "d_in": d_in, "tiles": {}}
    record["errors"] = _errors(base, A, B, G, W, delta_map, layer)
    for name in tune:
        if name == "merged_weight":
            tried = _tried(WEIGHT_TILES, lambda tile: merged.merged_weight(A, B, delta_map, base, W, tile))
        elif name == "first_readings":
            tried = _tried(FIRST_TILES, lambda tile: fp8_readings.first_readings(g, x, A, B, tile=tile))
        elif name == "second_readings":
            tried = _tried(SECOND_TILES, lambda tile: fp8_readings.second_readings(g, x, *thin, tile=tile))
        else:
            tried = _tried(GRADIENT_TILES, lambda tile: gradients.factor_gradients(G, A, B, delta_map, tile))
        record["tiles"][name] = tried
    best = {name: tuple(tiles[0]["tile"]) for name, tiles in record["tiles"].items()}
    calls = {
        "product": lambda: torch.mm(x, W.T, out=y),
        # the second product of the separate path, with the first one's result to add
        "product_added": lambda: y.addmm_(x, W.T, beta=0.5),
        "product_G": lambda: torch.mm(g.T, x, out=G),
        "low_rank_down": lambda: x @ A.to(x.dtype).T,
        "low_rank_up": lambda: y.addmm_(low, B.to(x.dtype).T),
        "bitsandbytes_dequantise": lambda: dequantize_4bit(layer.weight.data, layer.weight.quant_state, out=W),
        "decoded": lambda: nf4.decoded(base, W),
        "merged_weight": lambda: merged.merged_weight(A, B, delta_map, base, W, best.get("merged_weight")),
        "gradients": lambda: gradients.factor_gradients(G, A, B, delta_map, best.get("gradients")),
        "dropped": lambda: dropout.dropped(x, seed, 0.05),
        "rounded_factors": lambda: rounded_factors(A, B),
    }
    if has_fp8:
        codes = fp8_readings.second_readings(g, x, *thin)[:2]
        record["errors"]["product_G_in_fp8"] = _relative(fp8_product.fp8_product(*codes, G), g.double().T @ x.double())
        first, second = best.get("first_readings"), best.get("second_readings")
        calls |= {
            "first_readings": lambda: fp8_readings.first_readings(g, x, A, B, tile=first),
            "second_readings": lambda: fp8_readings.second_readings(g, x, *thin, tile=second),
            "product_G_in_fp8": lambda: fp8_product.fp8_product(*codes, G),
            "gradients_beyond": lambda: gradients.factor_gradients(G, A, B, delta_map, linear=False),
            "factor_norms": lambda: factor_norms([(A, B)]),
            "low_rank_gradients": lambda: gradients.low_rank_gradients(g, x, A, B, delta_map.slope_at_zero),
        }
    merged.merged_weight(A, B, delta_map, base, W)
    record["milliseconds"] = {
        name: do_bench(call, warmup=10, rep=40, return_mode="median") for name, call in calls.items()
    }
    entries = d_out * d_in
    parts = -(-d_in // gradients.tile_for(rank)[1]) * d_out * rank * 4
    record["bytes"] = {"merged_weight": entries * (2 + 0.5 + 1 / 64), "gradients": 2 * entries + 2 * parts}
    return record


def _tried(tiles: list[tuple], call: Callable[[tuple], Any]) -> list[dict[str, Any]]:
    """Every tile that fits, the fastest first."""
    found = []
    for tile in tiles:
        try:
            call(tile)
            torch.cuda.synchronize()
            median = do_bench(partial(call, tile), 5, 20, return_mode="median")
            found.append({"tile": list(tile), "milliseconds": median})
        except Exception as error:  # more registers or shared memory than there are
            found.append({"tile": list(tile), "milliseconds": float("inf"), "error": str(error).split("\n")[0][:100]})
    found.sort(key=lambda one: one["milliseconds"])
    return [{k: v for k, v in one.items() if v != float("inf")} for one in found]


def _errors(
    base: list[Tensor], A: Tensor, B: Tensor, G: Tensor, W: Tensor, delta_map: DeltaMap, layer: Any
) -> dict[str, float]:
    """Relative errors to fp64, in the Frobenius norm; of the gradients also those of what f' - f'(0) contributes."""
    identity = DeltaMap(Activation("sinter", 0.0, 1.0), delta_map.scale)
    with exact_products(A.device):
        W0 = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        want = merged.merged_weight_reference(A, B, delta_map, W0)
        got = {"merged_weight": _relative(merged.merged_weight(A, B, delta_map, base, W), want)}
        dW = want - W0.double()
        got["update"] = _relative(merged.merged_weight(A, B, delta_map, [], W), dW)
        del want, dW
        true, plain = (gradients.factor_gradients_reference(G, A, B, m) for m in (delta_map, identity))
        mine, flat = (gradients.factor_gradients(G, A, B, m) for m in (delta_map, identity))
        for name, t, p, m, f in zip("AB", true, plain, mine, flat, strict=True):
            got[f"gradient_{name}"] = _relative(m, t)
            got[f"gradient_{name}_of_f"] = _relative(m.double() - f.double(), t - p)
    return got


def _relative(found: Tensor, want: Tensor) -> float:
    return ((found.double() - want).norm() / want.norm()).item()


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), 5, 20, return_mode="median") / 1e3)


def _line(layer: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {value:.3f}" for name, value in layer["milliseconds"].items())
    errors = ", ".join(f"{name} {value:.1e}" for name, value in layer["errors"].items())
    tiles = ", ".join(f"{name} {tried[0]['tile']}" for name, tried in layer["tiles"].items())
    return f"{layer['d_out']} x {layer['d_in']} ms: {times}\n  errors: {errors}\n  tiles: {tiles}"
