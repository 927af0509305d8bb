"""Whether all nodes see the same run folder and can write it, and how fast. Everything that is made here is removed again."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.files import make_folder
from curvelora_training.preflight.facts import free_bytes
from curvelora_training.preflight.meeting import Meeting

SAMPLE = 64 << 20  # bytes that each node writes
PATIENCE = (
    10.0  # seconds until a file of another node is there; file servers' clients keep what they saw for some seconds
)


def look_at_folder(
    meeting: Meeting, folder: Path, sample: int = SAMPLE, patience: float = PATIENCE
) -> dict[str, Any] | None:
    """What this node makes of the folder; every process calls it, the first of each node looks, the others get None.

    Args:
        sample: bytes to write.
        patience: seconds until a file of another node has to be there.

    Returns: `seen` (the first process's file is read here), `written` (ours is read there), each null or why not;
        `free_bytes`; `write_bytes_per_second` with fsync.
    """
    made = not folder.exists()
    token = meeting.announce("token", uuid.uuid4().hex)
    own = folder / _name(token, meeting.place.rank)
    try:
        found = _look(meeting, folder, token, sample, patience)
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
    meeting.gather("folder is clean", True)
    if meeting.first and made:
        with contextlib.suppress(OSError):
            folder.rmdir()
    return found


def _look(meeting: Meeting, folder: Path, token: str, sample: int, patience: float) -> dict[str, Any] | None:
    place, looks = meeting.place, meeting.place.local_rank == 0
    own = folder / _name(token, place.rank)
    problem = _try(lambda: _leave(make_folder(folder) / own.name, token)) if meeting.first else None
    problem = meeting.announce("folder is made", problem)
    found: dict[str, Any] = {"seen": problem, "written": problem, "free_bytes": None, "write_bytes_per_second": None}
    if looks and problem is None:
        found["seen"] = found["written"] = _read(folder / _name(token, 0), token, patience)
        if found["seen"] is None:  # else it is another folder of this name, and none of our business
            if not meeting.first:
                found["written"] = _try(lambda: _leave(own, token))
            if found["written"] is None:
                found |= _try_write(own.with_name(f"{own.name}-sample"), sample)
    said = meeting.gather("folder", [looks, found["written"]])
    unread: dict[str, str] = {}
    if said is not None:
        for rank, (looked, why) in enumerate(said):
            if looked and why is None and (missing := _read(folder / _name(token, rank), token, patience)):
                unread[str(rank)] = f"what it writes is not there for the first process: {missing}"
    unread = meeting.announce("unread", unread)
    found["written"] = found["written"] or unread.get(str(place.rank))
    return found if looks else None


def _name(token: str, rank: int) -> str:
    return f".preflight-{token}-{rank}"


def _leave(path: Path, token: str) -> None:
    with path.open("w", encoding="ascii") as stream:
        stream.write(token)
        stream.flush()
        os.fsync(stream.fileno())


def _read(path: Path, token: str, patience: float) -> str | None:
    """Why the file cannot be read, or None where it can."""
    until = time.monotonic() + patience
    while True:
        why = None
        try:
            if path.read_text(encoding="ascii") == token:
                return None
            why = f"{path} is not what was written"
        except OSError as error:
            why = f"{error.strerror} ({path})"
        if time.monotonic() > until:
            return why
        time.sleep(0.2)


def _try(action: Any) -> str | None:
    """The error of an action as text, or None."""
    try:
        action()
    except OSError as error:
        return f"{error.strerror} ({error.filename})"
    except UserError as error:
        return str(error)
    return None


def _try_write(path: Path, size: int) -> dict[str, Any]:
    """Write `size` bytes, force them to disk, and remove them."""
    block = os.urandom(min(size, 1 << 20))  # zeros may be stored as nothing
    found: dict[str, Any] = {"free_bytes": free_bytes(path.parent), "write_bytes_per_second": None}
    try:
        start = time.perf_counter()
        with path.open("wb") as stream:
            for _ in range(max(1, size // len(block))):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        found["write_bytes_per_second"] = max(1, size // len(block)) * len(block) / (time.perf_counter() - start)
    except OSError as error:
        found["written"] = f"{error.strerror} ({size >> 20} MiB to {path.parent})"
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return found
