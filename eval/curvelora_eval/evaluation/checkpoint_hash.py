"""What identifies a checkpoint's content.

Up to 4 GiB of weights are hashed whole. Beyond that reading everything would take longer than many evaluations, so each weights
file counts with its size, its header (every name, dtype and shape) and 64 blocks of 1 MiB spread evenly over it. Training changes
every tensor, so another checkpoint is told apart; an edit of single numbers between the blocks is not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from curvelora_eval.spec import ModelSpec

WHOLE = 4 << 30  # bytes of weights
BLOCK = 1 << 20
BLOCKS = 64
SMALL = (".json", ".txt", ".model", ".jinja")  # config, tokenizer and the like


def checkpoint_folder(spec: ModelSpec) -> Path | None:
    """The folder that holds the checkpoint: its own, or the one in the hub's cache; None where it is not there."""
    if (folder := Path(spec.path)).is_dir():
        return folder
    try:
        found = cached_file(spec.path, "config.json", revision=spec.revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None


def checkpoint_hash(spec: ModelSpec) -> dict[str, Any]:
    """`sha256` over config, tokenizer and weights, and `sha256_of`: "contents", or "headers and samples" of large weights.

    Weights that are still on the hub are fetched first: a hash without them would be another one when they are here. Both are
    None where there are none.
    """
    folder = checkpoint_folder(spec)
    if not Path(spec.path).is_dir() and not (folder and any(folder.glob("*.safetensors"))):
        folder = _fetched(spec)
    weights = sorted(folder.glob("*.safetensors")) if folder else []
    if not weights:
        return {"sha256": None, "sha256_of": None}
    whole = sum(path.stat().st_size for path in weights) <= WHOLE
    digest = hashlib.sha256()
    small = [p for p in folder.iterdir() if p.suffix in SMALL and p.is_file()]
    for path in sorted(small) + weights:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        if path in weights and not whole:
            _sample(path, size, digest)
        else:
            with path.open("rb") as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
    return {"sha256": digest.hexdigest(), "sha256_of": "contents" if whole else "headers and samples"}


def _fetched(spec: ModelSpec) -> Path | None:
    """The checkpoint's files in the hub's cache, as loading will want them; None without network."""
    try:
        return Path(
            snapshot_download(
                spec.path,
                revision=spec.revision,
                allow_patterns=["*.safetensors", *(f"*{suffix}" for suffix in SMALL)],
                ignore_patterns="*/*",
            )
        )
    except (OSError, ValueError):  # loading says what is wrong
        return None


def _sample(path: Path, size: int, digest: Any) -> None:
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        digest.update(stream.read(min(header, size)))
        for i in range(BLOCKS):
            stream.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
