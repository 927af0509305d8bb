"""Time the singular factors of a model shape: the search of `curvelora.svd` against eigh of the Gram matrix and a full SVD.

    python -m curvelora_training.bench.svd_factors --shape llama3-8b --ranks 2,16 --device cuda --out svd.json
    python -m curvelora_training.bench.svd_factors --shape llama3-8b --scale 64 --layers 1 --out svd.json    # on a CPU, seconds

q, k, v, up and down of every layer, drawn: `decaying` has s_i = i^-1/2 and is rounded to bf16, as a checkpoint is; `clustered`
has an eighth of its values within 1e-9 of 0.5, at the end; `random` is Gaussian in bf16. Drawing is not timed. The errors are
taken against a full SVD in fp64, one for each shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import curvelora.svd
from curvelora.cli import run_guarded, run_module
from curvelora.errors import UserError, nearest
from curvelora.svd import singular_triplets
from curvelora_eval.environment import describe_environment
from curvelora_eval.files import make_folder, write_json
from curvelora_training.bench.shapes import SHAPES

SPECTRA = ("decaying", "clustered", "random")
SOLVERS = ("auto", "eigh")
ENDS = ("first", "last")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--shape", default="llama3-8b", help=f"{', '.join(SHAPES)} (default %(default)s)")
    parser.add_argument("--ranks", default="2,16", help="default %(default)s")
    parser.add_argument("--spectra", default=",".join(SPECTRA), help="default %(default)s")
    parser.add_argument("--solvers", default=",".join(SOLVERS), help="default %(default)s")
    layers = "layers that are timed; the total is scaled to all of them (default: all on cuda, 1 on cpu)"
    parser.add_argument("--layers", type=int, metavar="N", help=layers)
    parser.add_argument("--scale", type=int, default=1, metavar="K", help="divide every width by K")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--no-svd", action="store_true", help="no full SVD, so no errors either")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the record, JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, write the record after each spectrum, print a line for each case."""
    if args.shape not in SHAPES:
        raise UserError(f"--shape {args.shape} is unknown{nearest(args.shape, SHAPES)} (known: {', '.join(SHAPES)})")
    try:
        ranks = [int(rank) for rank in args.ranks.split(",")]
    except ValueError as error:
        raise UserError(f"--ranks {args.ranks} is not understood: write 2,16") from error
    spectra = args.spectra.split(",")
    if not set(spectra) <= set(SPECTRA):
        raise UserError(f"--spectra {args.spectra}: known are {', '.join(SPECTRA)}")
    solvers = args.solvers.split(",")
    if not set(solvers) <= set(SOLVERS):
        raise UserError(f"--solvers {args.solvers}: known are {', '.join(SOLVERS)}")
    if args.scale < 1 or (args.layers is not None and args.layers < 1):
        raise UserError("--scale and --layers must be at least 1")
    shapes = layer_shapes(args.shape, args.scale)
    smallest = min(min(shape) for shape in shapes.values())
    if not 1 <= min(ranks) <= max(ranks) < smallest:
        raise UserError(f"--ranks {args.ranks}: a rank is at least 1 and below {smallest}, the narrowest width")
    device = torch.device(args.device)
    total = SHAPES[args.shape]["num_hidden_layers"]
    layers = min(total, args.layers or (total if device.type == "cuda" else 1))
    make_folder(args.out.parent)
    record = {
        "schema": 1,
        "kind": "bench_svd_factors",
        **{"shape": args.shape, "scale": args.scale, "modules": shapes},
        **{"layers_of_model": total, "layers_timed": layers},
        "totals": "measured" if layers == total else f"{layers} layers, scaled to {total}",
        "searched_above_n": curvelora.svd.SMALL,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "environment": describe_environment(),
        "cases": [],
        "full_svd_seconds": {},
    }
    for spectrum in spectra:
        record["cases"] += measure(spectrum, shapes, ranks, solvers, layers, total, device)
        if not args.no_svd:
            seconds, errors = compare(spectrum, shapes, ranks, device)
            record["full_svd_seconds"][spectrum] = seconds
            for case in record["cases"]:
                if case["spectrum"] == spectrum and case["solver"] == "auto":
                    case["against_full_svd"] = errors[case["rank"], case["end"]]
        write_json(args.out, record)
    print(f"written: {args.out}")
    return 0


def layer_shapes(shape: str, scale: int) -> dict[str, tuple[int, int]]:
    """Module -> (d_out, d_in) of one layer, divided by `scale`."""
    config = SHAPES[shape]
    hidden, wide = config["hidden_size"] // scale, config["intermediate_size"] // scale
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
    return attention | {"up_proj": (wide, hidden), "down_proj": (hidden, wide)}


def drawn(spectrum: str, shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """A weight (d_out, d_in) with the spectrum of that name; see the module. bf16, or fp64 where bf16 would undo the cluster."""
    generator = torch.Generator(device).manual_seed(seed)

    # fp32 will do for what is rounded to bf16, and its QR takes a fraction of the time
    dtype = torch.float64 if spectrum == "clustered" else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    if spectrum == "random":
        return (normal(*shape) / shape[1] ** 0.5).bfloat16()
    n = min(shape)
    U, V = (torch.linalg.qr(normal(d, n))[0] for d in shape)
    if spectrum == "decaying":
        S = torch.arange(1, n + 1, device=device, dtype=dtype) ** -0.5
        return ((U * S) @ V.T).bfloat16()
    tail = max(2, n // 8)
    S = torch.cat([torch.linspace(1, 0.6, n - tail), torch.full((tail,), 0.5)]).double().to(device)
    S[-tail:] += 1e-9 * torch.linspace(1, 0, tail, device=device, dtype=torch.float64)
    return (U * S) @ V.T


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds, and what `work` returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, found


def measure(
    spectrum: str, shapes: dict, ranks: list[int], solvers: list[str], layers: int, total: int, device: torch.device
) -> list[dict[str, Any]]:
    """One record for each rank, end and solver: seconds of every module, and of the whole model."""
    cases = [(r, end, solver) for r in ranks for end in ENDS for solver in solvers]
    seconds = {case: {module: [] for module in shapes} for case in cases}
    bounds = {case: [] for case in cases}
    peaks = {case: {} for case in cases}  # bytes beside the weight
    for layer in range(-1, layers):  # the first is not counted: it loads libraries
        for number, (module, shape) in enumerate(shapes.items()):
            weight = drawn(spectrum, shape, max(layer, 0) * len(shapes) + number, device)
            for case in cases:
                held = _held(device)
                spent, triplets = timed(lambda w=weight, c=case: singular_triplets(w, *c), device)
                if held is not None:
                    peaks[case][module] = torch.cuda.max_memory_allocated(device) - held
                if layer >= 0:
                    seconds[case][module].append(spent)
                    bounds[case].append(triplets.bounds)
    records = []
    for case, times in seconds.items():
        r, end, solver = case
        proved = [b.values for b in bounds[case] if b.proved]
        record = {
            **{"spectrum": spectrum, "rank": r, "end": end, "solver": solver},
            "total_seconds": sum(map(sum, times.values())) * total / layers,
            "median_seconds": {module: statistics.median(values) for module, values in times.items()},
            "weights": len(bounds[case]),
            "proved": len(proved),
            "searched": sum(b.solver == "lanczos" for b in bounds[case]),
            "largest_proved_bound_on_values": max(proved, default=None),
            "peak_bytes_beside_the_weight": peaks[case] or None,
        }
        print(f"{spectrum:<10} r {r:<3} {end:<5} {solver:<5} {record['total_seconds']:8.2f} s")
        records.append(record)
    return records


def _held(device: torch.device) -> int | None:
    """Bytes allocated now, from where a peak is then counted; None on a CPU, where nothing counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def compare(
    spectrum: str, shapes: dict[str, tuple[int, int]], ranks: list[int], device: torch.device
) -> tuple[dict[str, float], dict[tuple[int, str], dict[str, Any]]]:
    """Seconds of a full fp64 SVD, and by (rank, end) the errors and bounds; a bound is null where nothing is proved."""
    seconds, errors = {}, {(r, end): {} for r in ranks for end in ENDS}
    for number, (module, shape) in enumerate(shapes.items()):
        if shape in [shapes[other] for other in seconds]:
            continue
        weight = drawn(spectrum, shape, number, device)
        work = weight.double()
        try:
            seconds[module], (U, S, Vt) = timed(lambda w=work: torch.linalg.svd(w, full_matrices=False), device)
        except torch.linalg.LinAlgError as error:  # LAPACK's gesdd does not converge on some clusters
            print(f"{spectrum} {module}: the full SVD fails ({str(error).splitlines()[0]})", file=sys.stderr)
            continue
        for r, end in errors:
            found = singular_triplets(weight, r, end)
            part = slice(0, r) if end == "first" else slice(len(S) - r, None)
            exact, mine = (U[:, part], found.U) if shape[0] <= shape[1] else (Vt[part].T, found.V)
            errors[r, end][module] = {
                "values": ((found.S - S[part]).abs().max() / S[0]).item(),
                "subspace": torch.linalg.matrix_norm(exact - mine @ (mine.T @ exact), 2).item(),
                "bound_on_values": found.bounds.values if found.bounds.proved else None,
                "bound_on_subspace": found.bounds.subspace if found.bounds.subspace < 1 else None,
            }
    return seconds, errors


if __name__ == "__main__":
    arguments = sys.argv[1:]
    program = "python -m curvelora_training.bench.svd_factors"
    sys.exit(run_guarded(lambda: run_module(sys.modules[__name__], program, arguments), debug="--debug" in arguments))
