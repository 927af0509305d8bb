"""Write whole files or none, and find out early whether a folder can be written."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from curvelora.errors import UserError


def write_text(path: Path, text: str) -> Path:
    """Write `text` under a temporary name, force it to disk, and rename: a reader sees the old file or the new one.

    Raises:
        UserError: the disk is full, or the folder cannot be written; what stood there before is untouched.
    """
    temporary = temporary_for(path)
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}): nothing was changed") from error
    return path


def temporary_for(path: Path) -> Path:
    """The name under which this process writes a file first; no other one's, on no machine that shares the folder."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_json(path: Path, record: Any) -> Path:
    """Write `record` as indented JSON, whole or not at all; NaN is refused because JSON has none."""
    return write_text(path, json.dumps(record, indent=2, allow_nan=False, default=str) + "\n")


def check_folder(folder: Path) -> None:
    """Raise `UserError` where `folder` cannot be made or written; nothing is created."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"{folder} cannot be an output folder: {existing} is a file; name another folder")
    make_folder(existing)


def make_folder(folder: Path) -> Path:
    """Create `folder` and prove that a file can be written into it.

    Raises:
        UserError: a file stands in its place, or the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except (FileExistsError, NotADirectoryError) as error:
        file = next((p for p in (folder, *folder.parents) if p.is_file()), folder)
        raise UserError(f"{folder} cannot be an output folder: {file} is a file; name another folder") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): name another output folder") from error
    return folder
