"""The manifest of what was fetched: every file with its size and sha256, and what is wrong with a folder that should be it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from curvelora.errors import UserError

MANIFEST, SCHEMA, KIND = "manifest.json", 1, "fetched"
PARTS = ("model", "data", "wheels")  # the only folders that are written
OWN = ".cache"  # the hub client's notes, in the model's folder


def files_below(path: Path) -> list[Path]:
    """A file itself, or all files below a folder, without those of the hub's client."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and OWN not in p.relative_to(path).parts)


def describe(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def inside(folder: Path, name: str) -> Path:
    """`folder`/`name`, which has to lie in `folder`, also after following links.

    Raises:
        UserError: it does not.
    """
    pure = PurePosixPath(name)
    path = folder / pure
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name!r} would lie outside of {folder}: nothing was read or written there")
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`.

    Raises:
        UserError: there is none, it is damaged or of another kind, or a file of it would lie outside of the folder.
    """
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds nothing that was fetched whole: there is no {MANIFEST} in it; fetch again"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch again, or copy it again") from error
    if not isinstance(record, dict) or (record.get("kind"), record.get("schema")) != (KIND, SCHEMA):
        raise UserError(f"{path} is no manifest of `curvelora fetch` (of schema {SCHEMA}): fetch again")
    listed = [record.get(key) for key in ("files", "local")]
    if not all(isinstance(part, dict) and all(isinstance(entry, dict) for entry in part.values()) for part in listed):
        raise UserError(f"{path} is damaged: it lists no files; fetch again, or copy it again")
    for name in record["files"]:
        inside(folder, name)
    overrides = record.get("overrides")
    if not isinstance(overrides, dict) or not all(isinstance(value, str | None) for value in overrides.values()):
        raise UserError(f"{path} is damaged: it has no overrides; fetch again, or copy it again")
    for value in filter(None, overrides.values()):
        inside(folder, value)
    return record


def flaws(folder: Path, record: dict[str, Any]) -> list[str]:
    """What is missing, changed or too much, a sentence each; empty where every byte is as it was fetched."""
    found = []
    places = {str(name): (inside(folder, name), entry) for name, entry in record["files"].items()}
    places |= {name: (Path(name), entry) for name, entry in record["local"].items()}
    for name, (path, entry) in places.items():
        try:
            if not path.is_file():
                found.append(f"{name} is missing")
            elif (size := path.stat().st_size) != entry.get("bytes"):
                found.append(f"{name} has {size} bytes, and {entry.get('bytes')} were fetched")
            elif describe(path)["sha256"] != entry.get("sha256"):
                found.append(f"{name} was changed: its sha256 is another than when it was fetched")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found + [f"{name} is not in the manifest" for name in strangers(folder, set(record["files"]))]


def strangers(folder: Path, known: set[str]) -> list[str]:
    """Files in the folders of the model, the rows and the wheels that are none of the known ones: loaders may take them."""
    there = [p for part in PARTS if (folder / part).is_dir() for p in files_below(folder / part)]
    return [name for p in there if (name := p.relative_to(folder).as_posix()) not in known]
