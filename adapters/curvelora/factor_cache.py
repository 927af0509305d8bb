"""Singular triplets on disk, under a key that is the weight itself.

One safetensors file a weight, end and rank: `<sha256 of the weight's bytes, shape and dtype>-<end>-<r>.safetensors` with U, S, V
in fp64 and the bounds as metadata. The key has no name, path or revision in it, so an entry can only be found by the very tensor
that it was made from: another base, another dtype of the same base, or a quantised one never finds it. An entry with more
triplets of the same end serves a smaller rank.

Where: the folder in the environment variable CURVELORA_FACTOR_CACHE, else `$XDG_CACHE_HOME/curvelora/factors`, else
`~/.cache/curvelora/factors`. Training reads both; it *writes* only into a folder that the variable names, so that nobody's home
fills up unasked. `curvelora prepare` writes where it is told, and into the default folder where it is told nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
from dataclasses import asdict
from math import inf
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from curvelora.errors import UserError
from curvelora.svd import Bounds, Triplets, singular_triplets

logger = logging.getLogger(__name__)
VARIABLE = "CURVELORA_FACTOR_CACHE"
SCHEMA = "1"
ORTHONORMAL = 1e-9  # largest entry of U^T U - I and V^T V - I that a whole entry may have; computed ones have 1e-13
CHUNK_BYTES = 1 << 24  # bytes that are hashed at a time, so that no second copy of a large weight is made on the host


def cache_folder() -> Path:
    """The folder that holds the factors; it need not exist."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    # the XDG rule: a relative path is to be ignored
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return base / "curvelora" / "factors"


def cached_triplets(weight: Tensor, r: int, end: str) -> Triplets:
    """`singular_triplets(weight, r, end)`, from the cache where it has them.

    What had to be computed is stored only where CURVELORA_FACTOR_CACHE is set; where that fails, a warning says so.

    Args:
        weight: (d_out, d_in), any floating dtype; the triplets are returned on its device, fp64.
        r: how many, at most min(d_out, d_in).
        end: "first" or "last".

    Raises:
        ValueError: as `singular_triplets`.
    """
    folder = cache_folder()
    writes = bool(os.environ.get(VARIABLE))
    if not folder.is_dir() and not writes:
        return singular_triplets(weight, r, end)  # no hashing where there is nothing to find
    key = weight_key(weight)
    found = load(folder, key, weight.shape, r, end)
    if found is not None:
        return Triplets(*(t.to(weight.device) for t in (found.U, found.S, found.V)), found.bounds)
    found = singular_triplets(weight, r, end)
    if writes:
        try:
            store(folder, key, found, end)
        except UserError as error:  # the run has what it needs
            logger.warning("%s", error)
    return found


def weight_key(weight: Tensor) -> str:
    """sha256 over shape, dtype and the bytes of the weight in row-major order: 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}\n".encode())
    rows = weight.detach()
    step = max(1, CHUNK_BYTES // max(1, rows.shape[1] * rows.element_size()))
    for start in range(0, rows.shape[0], step):
        digest.update(rows[start : start + step].contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def load(folder: Path, key: str, shape: tuple[int, ...], r: int, end: str) -> Triplets | None:
    """The entry of the smallest rank that has r triplets, cut to r; None where there is none that is whole.

    A damaged entry is named in one warning and left out; the next `store` of its rank replaces it.

    Args:
        key: of `weight_key`.
        shape: (d_out, d_in) of the weight, which the entry must have.
        r: how many triplets are wanted.
        end: "first" or "last".
    """
    for path in entries(folder, key, r, end):
        try:
            return _cut(_read(path, key, shape, end), r, end)
        except UserError as error:
            logger.warning("%s; it is not used, and the triplets are computed again", error)
    return None


def entries(folder: Path, key: str, r: int, end: str) -> list[Path]:
    """The files for this key and end with at least r triplets, the smallest rank first."""
    pattern = re.compile(rf"{key}-{end}-(\d+)\.safetensors")
    matches = (pattern.fullmatch(path.name) for path in folder.glob(f"{key}-{end}-*.safetensors"))
    ranks = sorted(int(match[1]) for match in matches if match)
    return [_path(folder, key, rank, end) for rank in ranks if rank >= r]


def store(folder: Path, key: str, triplets: Triplets, end: str) -> Path:
    """Write an entry, whole or not at all: under a name of its own, renamed when it is complete.

    Raises:
        UserError: the folder cannot be written.
    """
    path = _path(folder, key, len(triplets.S), end)
    tensors = {name: getattr(triplets, name).cpu().contiguous() for name in ("U", "S", "V")}
    # JSON has no infinity: None stands for it
    bounds = {k: None if v == inf else v for k, v in asdict(triplets.bounds).items()} if triplets.bounds else None
    metadata = {"schema": SCHEMA, "weight": key, "end": end, "bounds": json.dumps(bounds, allow_nan=False)}
    temporary = folder / f".writing-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # as the user's umask has it: safetensors makes files that only their owner can read
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(mode)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"the factors cannot be written to {folder} ({reason}): name another folder in {VARIABLE} or with --cache"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _path(folder: Path, key: str, r: int, end: str) -> Path:
    return folder / f"{key}-{end}-{r}.safetensors"


def _read(path: Path, key: str, shape: tuple[int, ...], end: str) -> Triplets:
    """An entry as it was stored. Raises `UserError`, in one sentence, for one that is not whole."""
    r = int(path.stem.rpartition("-")[2])
    if not os.access(path, os.R_OK):  # safetensors would say that there is no such file
        raise UserError(f"the cache entry {path} belongs to somebody else and cannot be read")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            U, S, V = (file.get_tensor(name) for name in ("U", "S", "V"))
        bounds = json.loads(metadata.get("bounds", "null"))
        if bounds is not None:
            bounds = Bounds(**{k: inf if v is None else v for k, v in bounds.items()})
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"the cache entry {path} is damaged: it cannot be read ({reason})") from error
    found = tuple(metadata.get(name) for name in ("schema", "weight", "end"))
    if found != (SCHEMA, key, end):
        raise UserError(f"the cache entry {path} is damaged: its header is of another entry")
    wanted = ((shape[0], r), (r,), (shape[1], r))
    if tuple(tuple(t.shape) for t in (U, S, V)) != wanted or any(t.dtype != torch.float64 for t in (U, S, V)):
        raise UserError(
            f"the cache entry {path} is damaged: its tensors have other shapes or dtypes than its name says"
        )
    if not all(torch.isfinite(t).all() for t in (U, S, V)):
        raise UserError(f"the cache entry {path} is damaged: it has NaN or infinite entries")
    one = torch.eye(r, dtype=torch.float64)
    if any((t.T @ t - one).abs().max() > ORTHONORMAL for t in (U, V)) or (S < 0).any() or (S[1:] > S[:-1]).any():
        raise UserError(
            f"the cache entry {path} is damaged: its vectors are not orthonormal or its values not in order"
        )
    return Triplets(U, S, V, bounds)


def _cut(triplets: Triplets, r: int, end: str) -> Triplets:
    """The r outermost of them. The bound on each value holds for fewer values; that on the subspace does not."""
    if r == len(triplets.S):
        return triplets
    part = slice(0, r) if end == "first" else slice(len(triplets.S) - r, None)
    bounds = triplets.bounds
    if bounds is not None:
        bounds = Bounds(bounds.proved, bounds.values, inf, bounds.residual, bounds.solver)
    return Triplets(triplets.U[:, part], triplets.S[part], triplets.V[:, part], bounds)
