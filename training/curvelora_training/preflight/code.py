"""Which code runs, as one number, and whether it is that of the submission. Nothing of torch is needed for it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

PACKAGES = ("curvelora", "curvelora_eval", "curvelora_training")
RECORD = "launch/code.json"  # of a run folder; `curvelora launch` writes it


def hash_of_code() -> str:
    """SHA-256 over names and contents of all source and data files of the three packages, wherever they are installed."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        folder = Path(importlib.util.find_spec(package).origin).parent
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                content = file.read_bytes()
                digest.update(f"{package}/{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
    return digest.hexdigest()


def changed_code(run_folder: Path, code: str) -> str | None:
    """A sentence where the code is not that with which the run was submitted; None where it is, or where nothing is known.

    Args:
        code: `hash_of_code` of the first node.
    """
    try:
        record = json.loads((run_folder / RECORD).read_text(encoding="utf-8"))
        then = record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if then == code:
        return None
    return (
        f"the code has changed since the job was submitted: {code[:12]} now, {str(then)[:12]} then (commit "
        f"{record.get('commit') or 'unknown'}, {RECORD}): attempts before this one may have trained with other code"
    )
