"""A lab folder, read: results.json, the lines of its runs, and the sweep that belongs to it.

Only results.json must be there. What is missing is None or empty, and the page leaves it out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from curvelora_eval.lab.statistics import over_seeds
from curvelora_eval.report.load import number

SCHEMA = 1
HUES = 7  # beside the baseline's neutral one; see page.css.j2


@dataclass(frozen=True)
class Arm:
    """One arm as the page shows it. `hue` is 0 for the baseline and 1 to 7 for others; fp32 controls share their twin's.

    `position` counts the arms in the order of results.json.
    """

    key: str
    label: str
    position: int
    hue: int
    control: bool
    baseline: bool
    record: dict[str, Any] = field(hash=False, compare=False)


class Lab:
    """results.json with its runs. All getters return None or empty for what was not measured.

    Args:
        folder: the lab folder.
        results: content of its results.json.
        sweep: content of a sweep.json, or None.
        sweep_folder: where that sweep lies.
    """

    def __init__(self, folder: Path, results: dict, sweep: dict | None = None, sweep_folder: Path | None = None):
        self.folder, self.results = folder, results
        self.sweep, self.sweep_folder = sweep, sweep_folder
        self.settings = _mapping(results.get("settings"))
        self.cost = _mapping(results.get("cost"))
        self._lines: dict[tuple[str, str, str], list[dict]] = {}

    @cached_property
    def arms(self) -> list[Arm]:
        base = baseline_key(self.results)
        hues: dict[str, int] = {}
        arms = []
        for position, (key, record) in enumerate(_mapping(self.results.get("arms")).items()):
            family = key.split("@")[0]
            if key != base and family != base:
                hues.setdefault(family, 1 + len(hues) % HUES)
            hue = hues.get(family, 0)
            control = "@" in key
            arms.append(Arm(key, str(record.get("label") or key), position, hue, control, key == base, record))
        return arms

    @property
    def baseline(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.baseline), None)

    def runs(self, arm: Arm) -> dict[str, dict]:
        """Seed -> the record of that run in results.json."""
        return _mapping(_mapping(self.results.get("runs")).get(arm.key))

    @cached_property
    def failed(self) -> dict[str, dict[str, str]]:
        """Arm's key -> seed -> why, in a line, of the runs that ended without a result."""
        found: dict[str, dict[str, str]] = {}
        for record in self.results.get("failed") or []:
            key, seed = str(record.get("arm")), str(record.get("seed"))
            if seed not in _mapping(_mapping(self.results.get("runs")).get(key)):
                why = str(record.get("why") or "").strip() or "no reason is known"
                found.setdefault(key, {})[seed] = why.splitlines()[0].rstrip(".")
        return found

    @property
    def environment(self) -> dict[str, Any]:
        """Where cost was measured, or else what results.json says of its writer; empty where neither is known."""
        return _mapping(self.cost.get("environment")) or _mapping(self.results.get("environment"))

    def values(self, arm: Arm, *path: str) -> list[float]:
        """The number at `path` below each seed's run, in the order of the seeds; seeds without it are left out."""
        found = (number(dig(run, *path)) for run in self.runs(arm).values())
        return [value for value in found if value is not None]

    def over_seeds(self, arm: Arm, *path: str) -> dict | None:
        """`{"mean", "std", "low", "high", "n"}` of the number at `path` over the seeds, or None."""
        values = self.values(arm, *path)
        return over_seeds(values) if values else None

    def spread(self, arm: Arm, *path: str) -> dict | None:
        """As `over_seeds`, for drawing: of two seeds low and high are the two values, since Student's t with one degree of
        freedom (12.7 standard errors) would only draw how few they are; and what is never negative has no bound below 0."""
        values = self.values(arm, *path)
        found = self.over_seeds(arm, *path)
        if found and found["n"] == 2:
            found |= {"low": min(values), "high": max(values)}
        if found and found["low"] is not None and min(values) >= 0:
            found["low"] = max(found["low"], 0.0)
        return found

    @property
    def bars(self) -> str:
        """What the bars of `spread` are, as a sentence; empty for one seed."""
        most = max((len(self.runs(arm)) for arm in self.arms), default=0)
        return ("", "", "Bars: the two seeds.")[most] if most < 3 else "Bars: 95 % interval over seeds (Student's t)."

    def of_arm(self, arm: Arm, *path: str) -> float | None:
        """The mean over seeds of the number at `path`, or None."""
        values = self.values(arm, *path)
        return sum(values) / len(values) if values else None

    def lines(self, arm: Arm, seed: str, name: str = "steps.jsonl") -> list[dict]:
        """The objects in a JSONL file of one run; a cut last line, as a killed run leaves it, is dropped."""
        slot = (arm.key, seed, name)
        if slot not in self._lines:
            path = self.folder / str(self.runs(arm)[seed].get("folder", "")) / name
            self._lines[slot] = list(_read_lines(path)) if path.is_file() else []
        return self._lines[slot]

    def series(self, arm: Arm, *path: str) -> dict[str, list[tuple[float, float]]]:
        """Seed -> (step, value) of the number at `path` in steps.jsonl; seeds without a value are left out."""
        found = {}
        for seed in self.runs(arm):
            pairs = ((number(line.get("step")), number(dig(line, *path))) for line in self.lines(arm, seed))
            points = [(step, value) for step, value in pairs if step is not None and value is not None]
            if points:
                found[seed] = points
        return found

    def presence_series(self, arm: Arm, *path: str) -> dict[str, list[tuple[float, float]]]:
        """Seed -> (step, mean over layers weighted by their entries) of the number at `path` in presence.jsonl."""
        found = {}
        for seed in self.runs(arm):
            points = []
            for line in self.lines(arm, seed, "presence.jsonl"):
                value = weighted_mean(_mapping(line.get("layers")).values(), *path)
                if value is not None and number(line.get("step")) is not None:
                    points.append((line["step"], value))
            if points:
                found[seed] = points
        return found

    @cached_property
    def module_types(self) -> list[str]:
        """Names such as "q_proj", in the order in which they are first met."""
        names: dict[str, None] = {}
        for arm in self.arms:
            for seed in self.runs(arm):
                for line in self.lines(arm, seed)[-1:]:
                    names |= dict.fromkeys(_mapping(line.get("grad_norms")))
        return list(names)

    def diverged(self, arm: Arm) -> list[str]:
        """The seeds whose run diverged."""
        return [seed for seed, run in self.runs(arm).items() if run_diverged(run)]


def run_diverged(run: dict) -> bool:
    """Whether a run's status or its stability record says that it diverged."""
    return run.get("status") == "diverged" or dig(run, "stability", "diverged") is True


def baseline_key(results: dict) -> str | None:
    """The arm that others are held against: the one that the settings name, or the first; None without arms."""
    arms = _mapping(results.get("arms"))
    named = _mapping(results.get("settings")).get("baseline")
    return named if named in arms else next(iter(arms), None)


def weighted_mean(records: Sequence[dict] | Any, *path: str) -> float | None:
    """The mean of the number at `path`, weighted by each record's `entries` where all have it; None without a number."""
    pairs = [(number(dig(record, *path)), number(record.get("entries"))) for record in records]
    pairs = [(value, weight) for value, weight in pairs if value is not None]
    if not pairs:
        return None
    if any(weight is None for _, weight in pairs):
        return sum(value for value, _ in pairs) / len(pairs)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def dig(record: Any, *path: str) -> Any:
    """`record[path[0]][path[1]]...`, or None where a step is missing."""
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def read_lab(folder: Path, sweep: Path | None = None) -> Lab:
    """Read a lab folder; `sweep` (a folder) goes before the one that results.json names.

    Raises:
        UserError: no results.json, another schema, a file that is no JSON, or a sweep that is not there.
    """
    results = read_record(folder, "results.json", "lab")
    named = results.get("sweep")
    if sweep is None and isinstance(named, str) and (folder / named).is_dir():
        sweep = folder / named
    return Lab(folder, results, read_record(sweep, "sweep.json", "sweep") if sweep else None, sweep)


def read_record(folder: Path, name: str, kind: str) -> dict:
    """Read `folder`/`name`, a JSON object of schema 1 and this `kind`. Raises UserError as `read_lab` does."""
    path = Path(folder) / name
    if not path.is_file():
        raise _user_error(f"{folder} has no {name}; name a folder that `curvelora {_WRITER[kind]}` has written")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _user_error(f"{path} cannot be read as JSON ({error}); write it again with its command") from error
    if not isinstance(record, dict):
        raise _user_error(f"{path} holds a JSON {type(record).__name__}, expected an object; name another folder")
    if record.get("schema") != SCHEMA:
        raise _user_error(f"{path} has schema {record.get('schema')!r}; this version reads schema {SCHEMA}")
    if record.get("kind") != kind:
        raise _user_error(f"{path} is of kind {record.get('kind')!r}, expected {kind!r}; name another folder")
    return record


_WRITER = {"lab": "bench compare", "sweep": "sweep"}


def per_step(lines: dict[str, list[tuple[float, float]]], reduce: Callable) -> list[tuple[float, float]]:
    """Reduce the seeds' values at each step that any of them has, by step."""
    steps: dict[float, list[float]] = {}
    for points in lines.values():
        for step, value in points:
            steps.setdefault(step, []).append(value)
    return [(step, reduce(values)) for step, values in sorted(steps.items())]


def _read_lines(path: Path) -> Iterator[dict]:
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for position, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if position == len(texts):
                return
            raise _user_error(f"{path}, line {position}, cannot be read as JSON ({error}); run it again") from error
        if isinstance(line, dict):
            yield line


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _user_error(message: str) -> Exception:
    from curvelora.errors import UserError  # here, since importing curvelora loads torch and costs seconds

    return UserError(message)
