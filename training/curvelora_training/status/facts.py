"""What a run folder holds, read without trusting it: files may be missing, half written, or change while they are read."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from curvelora.errors import UserError
from curvelora_training.checkpoint import MANIFEST, flaw, found_in, read_manifest, step_of
from curvelora_training.config import read_yaml
from curvelora_training.run_folder import CONTENTS

LEASE, ATTEMPTS = "lease.json", "launch/attempts.jsonl"
HASHED = 8 << 30  # bytes; reading a larger checkpoint takes longer than a look should


@dataclass
class Checkpoint:
    """Attributes: `age` in seconds; `flaw`: what is wrong, or None; `rows`: of one step; `hashed`: read, not only sized."""

    name: str
    step: int
    age: float
    flaw: str | None
    rows: int | None
    hashed: bool = True


@dataclass
class Facts:
    """A run folder at one moment. Ages are in seconds, by this machine's clock.

    Attributes:
        lines: of metrics.jsonl.
        log_age: since a line was written.
        lease: of the attempt that holds the folder, empty where it is just being written; None where there is none.
        attempts: lines of launch/attempts.jsonl.
        checkpoints: newest first, down to the first one that is whole.
        notes: what could not be read, a sentence each.
    """

    folder: Path
    now: float
    config: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    log_age: float | None = None
    result: dict[str, Any] | None = None
    has_adapter: bool = False
    lease: dict[str, Any] | None = None
    lease_age: float = 0.0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[dict[str, Any]]:
        """The lines that training wrote, not evaluations."""
        return [line for line in self.lines if "loss" in line]

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the recipe's training section."""
        section = self.config.get("training")
        value = section.get(key) if isinstance(section, dict) else None
        return default if value is None else value


def read_run(folder: Path, clock: Callable[[], float] = time.time) -> Facts:
    """Read a run folder.

    Raises:
        UserError: it does not exist, or is no run folder.
    """
    _check_is_run(folder)
    facts = Facts(folder, clock())
    facts.config = _read(facts, "config.yaml", read_yaml) or {}
    facts.result = _read(facts, "result.json", from_json)
    facts.has_adapter = (folder / "adapter").is_dir()
    facts.lines = [line for line in _json_lines(folder / "metrics.jsonl") if number(line.get("step")) is not None]
    facts.log_age = _age(folder / "metrics.jsonl", facts.now)
    facts.attempts = _json_lines(folder / ATTEMPTS)
    if (age := _age(folder / LEASE, facts.now)) is not None:
        facts.lease, facts.lease_age = _read(facts, LEASE, from_json, quiet=True) or {}, age
    facts.checkpoints = _checkpoints(folder / "checkpoints", facts.now)
    return facts


def _check_is_run(folder: Path) -> None:
    if not folder.exists():
        raise UserError(f"{folder} does not exist: name a run folder, which is `output` in the recipe")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name a run folder, which is `output` in the recipe")
    try:
        if _is_run(folder):
            return
        inside = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and _is_run(p)]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from error
    hint = f"; it holds {len(inside)} of them: name {folder}/* or {folder / inside[0]}" if inside else ""
    raise UserError(
        f"{folder} is no run folder: there is no config.yaml, metrics.jsonl, lease or launch folder in it{hint}"
    )


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (*CONTENTS[:4], "checkpoints", LEASE, "launch"))


def _read(facts: Facts, name: str, parse: Callable[[str], Any], quiet: bool = False) -> dict[str, Any] | None:
    """A file that holds a mapping; None, with a note, where it cannot be read. `quiet`: it may be just being written."""
    path = facts.folder / name
    try:
        found = parse(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        why = "it holds no mapping"
    except FileNotFoundError:
        return None
    except OSError as error:
        why = error.strerror
    except (ValueError, yaml.YAMLError) as error:  # JSON and UTF-8 have ValueErrors
        why = " ".join(str(error).split())[:100]
    if not quiet:
        facts.notes.append(f"{name} cannot be read ({why})")
    return None


def from_json(text: str) -> Any:
    """JSON; NaN and infinity, which are none, become null."""
    return json.loads(text, parse_constant=lambda _: None)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole JSON mappings: the last one may be half written."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            record = from_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _age(path: Path, now: float) -> float | None:
    """Seconds since the file was written; None where there is none. Never negative: clocks of machines differ."""
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _checkpoints(folder: Path, now: float) -> list[Checkpoint]:
    """The newest ones, down to the first that is whole. Unlike at a resume nothing is set aside."""
    found = []
    for path in found_in(folder):
        age, stamp = _age(path / MANIFEST, now), _stamp(path)
        why, rows, hashed = (f"{MANIFEST} is missing", None, False) if age is None else _examined(path, stamp)
        if path.is_dir():  # else deleted in this moment, as older ones are
            found.append(Checkpoint(path.name, step_of(path), age if age is not None else math.inf, why, rows, hashed))
            if why is None:
                break
    return found


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of all files; empty where one went away meanwhile."""
    try:
        stats = [(str(p), p.stat()) for p in sorted(path.rglob("*"))]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@functools.lru_cache(maxsize=256)
def _examined(path: Path, stamp: tuple) -> tuple[str | None, int | None, bool]:
    """(flaw, rows of a step, hashed) of a checkpoint; reading it once is enough for --watch, while its `_stamp` is the same."""
    try:
        manifest = read_manifest(path)
        hashed = sum(file["bytes"] for file in manifest["files"].values()) <= HASHED
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error), None, False
    return flaw(path, hashed), number(manifest.get("global_batch")), hashed


def total_steps(facts: Facts) -> int | None:
    """Steps that the whole run makes; None where nothing says so yet."""
    if facts.result and (steps := number(facts.result.get("steps"))) is not None:
        return int(steps)
    if (most := number(facts.setting("max_steps"))) is not None:
        return int(most)
    epochs = number(facts.setting("epochs"))
    for line in reversed(facts.lines):
        epoch = number(line.get("epoch"))
        if epoch and epochs is not None and line["step"]:
            return math.ceil(epochs * round(line["step"] / epoch))
    return None


def rows_of_a_step(facts: Facts) -> int | None:
    """Rows of one step over all processes; None where the number of processes is not known."""
    known = next((checkpoint.rows for checkpoint in facts.checkpoints if checkpoint.rows), None)
    if known is not None:
        return int(known)
    processes = next((a["processes"] for a in reversed(facts.attempts) if number(a.get("processes"))), None)
    sizes = [number(facts.setting(key)) for key in ("batch_size", "accumulation")]
    return None if None in (processes, *sizes) else int(processes * sizes[0] * sizes[1])


def number(value: Any) -> float | int | None:
    """`value` where it is a finite number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
