"""Compute the singular factors that a method starts from, once, and keep them for training.

    curvelora prepare --model meta-llama/Meta-Llama-3-8B --method ranlora --rank 2

The checkpoint is read tensor by tensor, so a model of any size needs the memory of its largest weight: that in fp64, and about
six square matrices of its smaller side, also in fp64, while triplets are searched and proved.
What is in the cache is kept, so an interrupted run goes on where it stopped. Training looks into the folder that
CURVELORA_FACTOR_CACHE names, or into the default one; see `curvelora.factor_cache`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import CONFIG_NAME, cached_file

from curvelora.checkpoint import tensor_files
from curvelora.errors import UserError, nearest
from curvelora.factor_cache import VARIABLE, cache_folder, load, store, weight_key
from curvelora.svd import singular_triplets

ENDS = {"ranlora": {"R": "last", "P": "first"}, "pissa": "first", "milora": "last"}
TARGETS = "q_proj,k_proj,v_proj,up_proj,down_proj"  # those of the RanLoRA paper
FLOATS = {"F64", "F32", "BF16", "F16"}  # as safetensors calls what is not quantised
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt"}  # model types whose layers are Conv1D, which stores (d_in, d_out)


@dataclass(frozen=True)
class Stored:
    """A weight in the checkpoint: the tensor's name, its file and its shape as stored."""

    name: str
    file: Path
    shape: tuple[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `curvelora prepare`."""
    parser.add_argument("--model", required=True, help="checkpoint folder, or hub name in the local cache")
    parser.add_argument("--revision", help="of the checkpoint on the hub")
    parser.add_argument("--method", required=True, help=", ".join(ENDS))
    parser.add_argument("--init", default="R", help="of ranlora: R, the last triplets, or P, the first (default R)")
    parser.add_argument("--rank", type=int, required=True, metavar="R", help="how many triplets a weight")
    parser.add_argument("--target-modules", default=TARGETS, metavar="A,B,...", help="default %(default)s")
    dtype = "the dtype in which training loads the base, where it is not the checkpoint's own"
    parser.add_argument("--dtype", help=f"{dtype} ({', '.join(DTYPES)})")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default cpu)")
    folder = f"where the factors go (default: {VARIABLE}, or the folder of the user's caches)"
    parser.add_argument("--cache", "--out", dest="cache", type=Path, metavar="DIR", help=folder)


def run(args: argparse.Namespace) -> int:
    """Compute what is missing, with the first weight of each shape timed for an estimate; returns 0."""
    end = end_of(args.method, args.init)
    if args.rank < 1:
        raise UserError(f"--rank {args.rank}: a rank is at least 1")
    if args.dtype is not None and args.dtype not in DTYPES:
        raise UserError(f"--dtype {args.dtype} is unknown{nearest(args.dtype, DTYPES)} (known: {', '.join(DTYPES)})")
    device = _device(args.device)
    transposed = _is_transposed(args.model, args.revision)
    weights = list(_targets(args.model, args.revision, args.target_modules.split(","), args.rank))
    folder = args.cache.expanduser() if args.cache else cache_folder()

    def prepare(weight: Stored) -> bool:
        """Have the factors of one weight in the cache; whether they had to be computed."""
        tensor = read_weight(weight)
        tensor = tensor.T if transposed else tensor
        tensor = tensor.to(DTYPES[args.dtype]) if args.dtype else tensor
        key = weight_key(tensor)
        if load(folder, key, tensor.shape, args.rank, end) is not None:
            return False
        try:
            found = singular_triplets(tensor.to(device), args.rank, end)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{weight.name} ({' x '.join(map(str, weight.shape))}) does not fit on {device}: write --device cpu; what is "
                "in the cache is kept"
            ) from error
        except ValueError as error:
            raise UserError(f"{weight.name} in {args.model} has no singular triplets: {error}") from error
        store(folder, key, found, end)
        return True

    print(f"{len(weights)} weights, {end} {args.rank} triplets each, on {device}, into {folder}", flush=True)
    computed, rest, seconds = _first_of_each_shape(weights, prepare)
    if rest:
        remaining = sum(seconds.get(weight.shape, 0.0) for weight in rest)
        print(f"about {_clock(remaining)} for the remaining {len(rest)} weights", flush=True)
    for weight in tqdm(rest, desc="factors", unit="weight"):
        computed += prepare(weight)
    print(f"computed {computed}, kept {len(weights) - computed}: {folder}")
    if args.cache and folder != cache_folder():
        print(f"to use them in training: export {VARIABLE}={folder}")
    return 0


def _device(name: str) -> torch.device:
    """The device of that name. Raises `UserError` where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is unknown: write cpu, cuda or cuda:0")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: there are {count} CUDA devices here; write --device cpu or another number")
    return device


def end_of(method: str, init: str = "R") -> str:
    """The end of the spectrum that a method's init takes. Raises `UserError` for an unknown method or init."""
    if method not in ENDS:
        raise UserError(
            f"--method {method} starts from no singular factors that could be prepared{nearest(method, ENDS)} "
            f"(known: {', '.join(ENDS)})"
        )
    if method != "ranlora":
        return ENDS[method]
    if init.upper() not in ENDS["ranlora"]:
        raise UserError(f"--init {init}: RanLoRA prepares R, the last triplets, or P, the first")
    return ENDS["ranlora"][init.upper()]


def read_weight(weight: Stored) -> Tensor:
    """One tensor, and nothing else of its file. Raises `UserError` where the file is damaged."""
    try:
        with safe_open(str(weight.file), framework="pt") as file:
            return file.get_tensor(weight.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weight.file} cannot be read as safetensors ({str(error).splitlines()[0]})") from error


def _first_of_each_shape(weights: list[Stored], prepare) -> tuple[int, list[Stored], dict[tuple[int, int], float]]:
    """Prepare weights until one of each shape had to be computed, or none is left of it.

    Returns:
        How many were computed, the weights that are left, and shape -> seconds.
    """
    seconds: dict[tuple[int, int], float] = {}
    rest, computed = [], 0
    for weight in weights:
        if weight.shape in seconds:
            rest.append(weight)
            continue
        start = time.perf_counter()
        if prepare(weight):  # it ends with a copy to the host, so the clock needs no synchronisation
            seconds[weight.shape] = time.perf_counter() - start
            computed += 1
            print(f"{' x '.join(map(str, weight.shape))}: {seconds[weight.shape]:.2f} s", flush=True)
    return computed, rest, seconds


def _targets(model: str, revision: str | None, targets: list[str], r: int) -> Iterator[Stored]:
    """The weights to prepare, file by file; only headers are read.

    Raises:
        UserError: no such checkpoint, no such module, a quantised weight, or one with fewer than r triplets.
    """
    targets = [target.strip() for target in targets if target.strip()]
    chosen, modules = [], set()
    try:
        files = tensor_files(model, revision)
        for path in sorted(set(files.values())):
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a handle of safetensors is no mapping)
                    module, _, kind = name.rpartition(".")
                    if kind != "weight" or len(shape := tuple(file.get_slice(name).get_shape())) != 2:
                        continue
                    modules.add(module.rpartition(".")[2])
                    # PEFT's rule for a list of names
                    if any(module == target or module.endswith(f".{target}") for target in targets):
                        chosen.append((Stored(name, path, shape), file.get_slice(name).get_dtype()))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:  # TypeError: an index that is no mapping
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--model {model}: there is no safetensors checkpoint that can be read ({reason}); name a folder with one, or a "
            "hub name that is in the local cache"
        ) from error
    for weight, dtype in chosen:
        if dtype not in FLOATS:
            raise UserError(
                f"--model {model} is quantised ({weight.name} is stored as {dtype}), and its factors would be those of the "
                "rounded weight: name the unquantised checkpoint"
            )
        if r > min(weight.shape):
            raise UserError(
                f"--rank {r} is more than the {min(weight.shape)} triplets of {weight.name} "
                f"({' x '.join(map(str, weight.shape))}): take a smaller rank, or leave it out of --target-modules"
            )
    if not chosen:
        raise UserError(
            f"--target-modules {','.join(targets)}: {model} has no such linear layer (it has {', '.join(sorted(modules))})"
        )
    yield from (weight for weight, _ in chosen)


def _is_transposed(model: str, revision: str | None) -> bool:
    """Whether the checkpoint's linear layers are stored as (d_in, d_out). Raises `UserError` for a quantised one."""
    try:
        path = cached_file(model, CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        config = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        quantised = config.get("quantization_config")
        kind = quantised.get("quant_method", "an unnamed method") if quantised else None
    except (OSError, ValueError, AttributeError) as error:  # the last: JSON, but no mapping
        raise UserError(
            f"--model {model}: there is no checkpoint that can be read ({str(error).splitlines()[0]}); name a folder with "
            "one, or a hub name that is in the local cache"
        ) from error
    if kind is not None:
        raise UserError(
            f"--model {model} is quantised (with {kind}), and its factors would be those of the rounded weight: name the "
            "unquantised checkpoint"
        )
    return config.get("model_type") in TRANSPOSED


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
