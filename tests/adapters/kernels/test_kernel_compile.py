"""Every kernel compiles, without a GPU, for those of 2020 and later, and fits into the shared memory that they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from curvelora.kernels import curves

KIB = 1 << 10
# Compiled in a process that has no interpreter; prints the bytes of shared memory of one kernel after the other.
PROGRAM = """
import json, sys
from functools import partial
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from curvelora.kernels import dropout, factor_gradients as gradients, factor_norms as norms
from curvelora.kernels import fp8_readings as readings
from curvelora.kernels import merged_weight as merged, nf4, rounded_factors

LAYER = {name: "i32" for name in ("d_out", "d_in", "rank", "span")}
MAP = {name: "fp32" for name in ("outer", "inner", "amplitude", "frequency", "factor", "inverse")}
CODES = {"codes": "*u8", **{name: "*fp32" for name in ("table", "scales2", "table2", "offset")}}


def compiled(kernel, types, constants, arch, whole_rank, **options):
    types = {**LAYER, **MAP, **CODES, "A": "*fp32", "B": "*fp32", **types}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    # as launched: with pointers and sizes that are multiples of 16 more is read ahead, and takes shared memory
    whole = [n for n, t in signature.items() if t[0] == "*" or (t == "i32" and (n != "rank" or whole_rank))]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in whole}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return made.metadata.shared


def shared(kernel, name, rank, arch, _):
    build = partial(compiled, whole_rank=rank % 16 == 0)
    tile, rank = gradients.tile_for(rank), merged.padded_rank(rank)
    if kernel == "decoded":
        constants = {"NESTED": True, "ROWS": nf4.TILE[0], "COLUMNS": nf4.TILE[1]}
        return build(nf4._decoded, {"out": "*bf16", "scales": "*u8"}, constants, arch, num_warps=nf4.TILE[2])
    if kernel == "norms":
        constants = {"RANK": rank, "BLOCK": norms.BLOCK, "TURNS": norms.TURNS}
        return build(norms._norms, {"out": "*i32", "layers": "*i64"}, constants, arch, num_warps=4)
    if kernel == "dropped":
        types = {"out": "*bf16", "x": "*bf16", "seed": "*i64", "start": "i32", "entries": "i32", "limit": "i32", "scale": "fp32"}
        return build(dropout._dropped, types, {"ADD": True, "SIZE": dropout.SIZE}, arch, num_warps=4)
    if kernel == "rounded":
        types = {"out_A": "*bf16", "out_B": "*bf16", "zeros": "*i32"}
        types |= {name: "i32" for name in ("size_A", "size_B", "count")}
        return build(rounded_factors._rounded, types, {"BLOCK": rounded_factors.BLOCK}, arch, num_warps=4)
    if kernel == "sums":
        types = {name: "*fp32" for name in ("out_A", "out_B", "parts_A", "parts_B", "more_A", "more_B")}
        counts = ("count_A", "count_B", "count_more_A", "count_more_B", "apart_more_B")
        types |= {name: "i32" for name in ("size_A", "size_B", *counts)}
        constants = {"ADD": True, "TURN": gradients.SUM_TILE[0], "BLOCK": gradients.SUM_TILE[1]}
        return build(gradients._sums, types, constants, arch)
    if kernel == "thin":
        types = {"back": "*bf16", "down": "*bf16", "parts_g": "*fp32", "parts_x": "*fp32"}
        types |= {name: "i32" for name in ("size", "count_g", "count_x")} | {"scale": "fp32"}
        return build(readings._thin, types, {"TURN": readings.THIN_TILE[0], "BLOCK": readings.THIN_TILE[1]}, arch)
    if kernel.endswith("readings"):
        matrices = ("back", "down", "g", "x", "A", "B")
        types = {name: "*bf16" for name in matrices} | {"codes_g": "*fp8e4nv", "codes_x": "*fp8e4nv"}
        types |= {name: "*fp32" for name in ("scales_g", "scales_x", "parts_A", "parts_B", "parts_g", "parts_x")}
        types |= {name: "*i32" for name in ("largest_g", "largest_x")}
        types |= {name: "i32" for name in ("tokens", "stride_g", "stride_x", "padded", "spans", "splits_g", "splits_x")}
        first = kernel == "first readings"
        turn, columns, *_, warps, stages = readings.tiles_for(rank)[0 if first else 1]
        constants = {"RANK": rank, "TOKENS": turn, "COLUMNS": columns}
        made = readings._first_readings if first else readings._second_readings
        return build(made, types, constants, arch, num_warps=warps, num_stages=stages)
    if kernel.startswith("weight"):
        rows, columns, tiles, warps, stages = merged.TILE
        base = int(kernel[6])  # how many tensors it has
        constants = {"NAME": name, "BASE": base, "DITHERED": "dithered" in kernel, "RANK": rank}
        constants |= {"ROWS": rows, "COLUMNS": columns, "TILES": tiles}
        types = {"out": "*bf16", "scales": "*u8" if base == 6 else "*fp32"} | ({"codes": "*bf16"} if base == 1 else {})
        return build(merged._merged_weight, types, constants, arch, num_warps=warps, num_stages=stages)
    rows, columns, _, warps, stages = tile
    constants = {"NAME": name, "LINEAR": kernel == "gradients", "SCALED": name != "sinter", "RANK": rank}
    constants |= {"ROWS": rows, "COLUMNS": columns}
    types = {"out_A": "*fp32", "out_B": "*fp32", "G": "*bf16"}
    return build(gradients._gradients, types, constants, arch, num_warps=warps, num_stages=stages)


for case in json.loads(sys.argv[1]):
    print(json.dumps(shared(*case)), flush=True)
"""

DITHERED = ("weight1 dithered", "weight3 dithered", "weight6 dithered")
FP8 = [
    ("thin", 1),
    *((f"{which} readings", rank) for which in ("first", "second") for rank in (1, 64, 128)),
]


def check(cases: list[tuple[str, str, int, int, int]], cache: Path) -> None:
    """Each case (kernel, f, rank, compute capability, KiB that a program may have) compiles and fits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", PROGRAM, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [int(line) for line in done.stdout.split()]
    assert done.returncode == 0, f"{cases[len(found)]}: {done.stderr[-2000:]}"
    assert len(found) == len(cases)
    too_large = [(*case, size / KIB) for case, size in zip(cases, found, strict=True) if size > case[-1] * KIB]
    assert not too_large


def test_kernels_of_sinter_fit_into_99_kib(tmp_path: Path) -> None:
    """What RTX 30 and 40 have, at the published rank and at the largest."""
    cases = [(kernel, rank) for kernel in ("weight6", "gradients") for rank in (64, 128)]
    fp8_on_rtx_40 = [("thin", "", 1, 89, 99)]
    fp8_on_rtx_40 += [(f"{which} readings", "", rank, 89, 99) for which in ("first", "second") for rank in (64, 128)]
    check([*fp8_on_rtx_40, *((kernel, "sinter", rank, 80, 99) for kernel, rank in cases)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kib"), [(80, 99), (86, 99), (89, 99), (90, 99), (120, 99)])
def test_kernels_of_sinter_fit_everywhere(arch: int, kib: int, tmp_path: Path) -> None:
    """Ranks that are no power of two, bases without double quantisation and no base at all included."""
    kernels = ("weight0", "weight3", "weight6", *DITHERED, "gradients", "gradients beyond f'(0)")
    cases = [(kernel, "sinter", rank, arch, kib) for rank in (1, 17, 64, 128) for kernel in kernels]
    others = [
        ("decoded", 1),
        ("dropped", 1),
        ("rounded", 1),
        ("sums", 1),
        ("norms", 64),
        ("norms", 128),
        *(FP8 if arch >= 89 else []),
    ]
    check([*cases, *((kernel, "", rank, arch, kib) for kernel, rank in others)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", curves.NAMES)
def test_kernels_of_every_f_fit_into_99_kib(name: str, tmp_path: Path) -> None:
    weights = ("weight0", "weight1 dithered", "weight6")
    kernels = weights if name == "identity" else (*weights, "gradients")
    check([(kernel, name, rank, arch, 99) for arch in (80, 90) for rank in (64, 128) for kernel in kernels], tmp_path)
