"""A checkpoint on disk: written under a temporary name, forced to disk, sealed by a manifest, renamed; what is wrong with one.

checkpoints/checkpoint-N/
  adapter_model.safetensors, adapter_config.json   the adapter, as in adapter/
  moments.safetensors      the optimiser's state by parameter name, whole (or global_stepN/: DeepSpeed's own, in shares)
  method.safetensors       what the method itself keeps between steps, where it does (AdaLoRA)
  rng/rank-00000.safetensors   random numbers: Python's, NumPy's and PyTorch's, one file a process
  scheduler.json           learning rates, the scheduler's and the loss scaler's state
  trainer_state.json       steps, epoch, logs: with the seed they say which rows come next
  manifest.json            size and sha256 of every file, and how many processes wrote it; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint

from curvelora.errors import UserError

MANIFEST, SCHEMA = "manifest.json", 1
PREFIX = "checkpoint-"
# What DeepSpeed's own files refer to, in which full fine-tuning under ZeRO is saved, and nothing else.
TRUSTED_GLOBALS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


def temporary_for(path: Path) -> Path:
    """Where `path` is written until it is whole: beside it, so that renaming is one step."""
    return path.with_name(f".{path.name}.tmp")


def seal(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    """Make the checkpoint that was written into `temporary` the one called `final`.

    Files are forced to disk, then listed in the manifest with size and sha256, then the folders are; renaming comes last, so
    that a folder with the final name is whole or, after a power cut on a careless disk, found out by `flaw`.

    Args:
        facts: kept in the manifest beside the list; plain data.
    """
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for file in files:
        _force_to_disk(file)
    record = {"schema": SCHEMA, **facts}
    record["files"] = {
        str(f.relative_to(temporary).as_posix()): {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files
    }
    manifest = temporary / MANIFEST
    manifest.write_text(_canonical(record), encoding="utf-8")
    _force_to_disk(manifest)
    for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        _force_to_disk(folder)
    if final.exists():  # one that was passed over, or a run that went back to an older one
        _set_aside(final, "old-")
    os.replace(temporary, final)
    _force_to_disk(final.parent)
    shutil.rmtree(final.with_name(f"old-{final.name}"), ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whose own text is checked by its own sha256.

    Raises:
        ValueError: there is none, or it was changed; the message says which.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        record = json.loads(text)
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from error
    given = record.pop("sha256", None) if isinstance(record, dict) else None
    if given is None or _canonical(record) != text:
        raise ValueError(f"{MANIFEST} is damaged (its own sha256 does not fit)")
    if record["schema"] != SCHEMA:
        raise ValueError(f"{MANIFEST} has schema {record['schema']}, and this version reads {SCHEMA}")
    return record


def flaw(folder: Path, hashed: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None where every byte is as it was written.

    Args:
        hashed: read the files; else only their names and sizes are compared.
    """
    try:
        listed = read_manifest(folder)["files"]
        there = {str(p.relative_to(folder).as_posix()): p for p in folder.rglob("*") if not p.is_dir()}
        del there[MANIFEST]
        for name in (*listed, *there):
            if name not in there:
                return f"{name} is missing"
            if name not in listed:
                return f"{name} is not in its manifest"
            if (size := there[name].stat().st_size) != (wanted := listed[name]["bytes"]):
                return f"{name} has {size} bytes, and {wanted} were written"
        for name, file in there.items() if hashed else ():
            if _sha256(file) != listed[name]["sha256"]:
                return f"{name} was changed: its sha256 is another than when it was written"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def step_of(checkpoint: Path) -> int:
    """Optimiser steps that had been made."""
    return int(checkpoint.name.removeprefix(PREFIX))


def found_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first, whole or not."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None; says of every newer one what is wrong with it and renames it to damaged-*."""
    for checkpoint in found_in(folder):
        if (why := flaw(checkpoint)) is None:
            check_pickles(checkpoint)
            return checkpoint
        aside = _set_aside(checkpoint, "damaged-")
        print(f"{checkpoint} is not whole and is passed over: {why}; it is {aside.name} now", flush=True)
    return None


def delete_beyond(folder: Path, keep: int, spared: Iterable[int]) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps in `spared`."""
    for checkpoint in found_in(folder)[keep:]:
        if step_of(checkpoint) not in spared:
            # the name goes first: one that is half deleted is never taken for a damaged one
            os.replace(checkpoint, aside := temporary_for(checkpoint))
            shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed left half written or half deleted; one that was to be replaced gets its name back."""
    for path in folder.glob(f"old-{PREFIX}*"):
        final = path.with_name(path.name.removeprefix("old-"))
        shutil.rmtree(path, ignore_errors=True) if final.exists() else os.replace(path, final)
    for path in folder.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def check_pickles(folder: Path) -> None:
    """Raise `UserError` where one of DeepSpeed's files would run code; DeepSpeed loads them without PyTorch's safeguard."""
    for file in (*folder.rglob("*.pt"), *folder.rglob("*.pth")):
        if foreign := set(get_unsafe_globals_in_checkpoint(file)) - TRUSTED_GLOBALS:
            raise UserError(
                f"{file} would run code when it is loaded ({', '.join(sorted(foreign))}): delete this checkpoint"
            )


def _set_aside(checkpoint: Path, prefix: str) -> Path:
    aside = checkpoint.with_name(f"{prefix}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    return aside


def _canonical(record: dict[str, Any]) -> str:
    """The one text of this record, with a sha256 of the rest in it: every changed byte is noticed."""
    rest = json.dumps(record, sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(rest.encode()).hexdigest()
    return json.dumps(record | {"sha256": digest}, sort_keys=True, indent=1, allow_nan=False) + "\n"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
