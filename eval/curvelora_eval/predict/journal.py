"""What has been predicted so far, on disk after every batch, so that a run can be killed at any point.

Every process appends to a file of its own, `predictions.part-<rank>.jsonl`: a header that says what decides the predictions, then
a line a batch. A batch is wholly in a file or not done. Later runs, of any number of processes, read all files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvelora.errors import UserError

PATTERN = "predictions.part-*.jsonl"
SCHEMA = 1
SHOWN = 60  # characters of a value in a message

Entry = dict[str, Any]
"""One batch: `batch` (its number in the plan), `outputs` (one a unit), `seconds`, `tokens`."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what decided the predictions then and is otherwise now."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name.replace('_', ' ')} was {_shown(before.get(name))} and is now {_shown(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UserError` where the predictions in `folder` were decided by something else than the ones asked for."""
    if found := differences(before, now):
        raise UserError(
            f"{folder} holds predictions of another evaluation ({'; '.join(found)}): name another --out, or add --overwrite to "
            "start anew"
        )


def check_headers(folder: Path, decided_by: Mapping[str, Any]) -> None:
    """Raise `UserError` where a journal in `folder` has batches that something else decided, or is damaged."""
    for path in sorted(folder.glob(PATTERN)):
        header, *batches = _whole_lines(path, path.read_bytes())[0] or [{}]
        if batches:
            check_same(folder, header.get("decided_by", {}), decided_by)


def repair(folder: Path, decided_by: Mapping[str, Any]) -> list[str]:
    """Cut half-written last lines off all journals in `folder`; returns a sentence for each. No process may be writing.

    Raises:
        UserError: a journal has batches that something else decided, or is damaged elsewhere than at its end.
    """
    check_headers(folder, decided_by)
    said = []
    for path in sorted(folder.glob(PATTERN)):
        content = path.read_bytes()
        lines, kept = _whole_lines(path, content)
        if len(lines) == 1 and lines[0].get("decided_by") != decided_by:  # nothing was done under it
            path.unlink()
            continue
        if kept < len(content):
            with path.open("r+b") as stream:
                stream.truncate(kept)
                os.fsync(stream.fileno())
            said.append(
                f"{path} ended in a half-written batch: its {len(content) - kept} bytes were cut off, and it is done again"
            )
    return said


def read(folder: Path) -> dict[int, Entry]:
    """Batch number -> entry, over all journals in `folder`; half-written last lines are passed over.

    Raises:
        UserError: a journal is damaged elsewhere than at its end.
    """
    entries: dict[int, Entry] = {}
    for path in sorted(folder.glob(PATTERN)):
        for line in _whole_lines(path, path.read_bytes())[0][1:]:
            entries.setdefault(line["batch"], line)
    return entries


def seconds(folder: Path) -> float:
    """Seconds that the busiest process spent on its batches, resumed runs included."""
    sums = [sum(x["seconds"] for x in _whole_lines(p, p.read_bytes())[0][1:]) for p in folder.glob(PATTERN)]
    return max(sums, default=0.0)


def clear(folder: Path) -> None:
    """Remove all journals in `folder`."""
    for path in folder.glob(PATTERN):
        path.unlink()


def _whole_lines(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The objects of all whole lines, and how many bytes they fill; the last line may be half-written, others may not."""
    lines: list[dict[str, Any]] = []
    kept = 0
    pieces = content.split(b"\n")
    for number, piece in enumerate(pieces, 1):
        ended = number < len(pieces)
        try:
            line = json.loads(piece) if ended else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            if number < len(pieces) - 1 and pieces[number] != b"":
                raise UserError(f"{path}, line {number}, is damaged, which no kill does: add --overwrite to start anew")
            return lines, kept
        lines.append(line)
        kept += len(piece) + 1
    return lines, kept


class Journal:
    """The journal of one process, open for appending. A context manager.

    Args:
        folder: where it lies; `repair` has been called on it.
        rank: of this process.
        decided_by: the header; everything that decides the predictions.

    Raises:
        UserError: another process is writing it.
    """

    def __init__(self, folder: Path, rank: int, decided_by: Mapping[str, Any]) -> None:
        self.path = folder / f"predictions.part-{rank}.jsonl"
        self._stream = self.path.open("ab")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise UserError(f"another process is writing {self.path}: wait for it, or name another --out") from None
        except OSError:  # a file system without locks
            pass
        if self._stream.tell() == 0:
            self._append({"schema": SCHEMA, "decided_by": dict(decided_by)})

    def add(self, entry: Entry) -> None:
        """Append one batch; it is on disk when this returns."""
        self._append(entry)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(line, allow_nan=True).encode() + b"\n")
        self._stream.flush()
        with contextlib.suppress(OSError):  # a pipe or a file system that has no such thing
            os.fsync(self._stream.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()
