"""Read the run folders that training and evaluation write.

Only result.json must be there. evaluation.json, metrics.jsonl, environment.json and config.yaml may be missing; the
report then shows a dash in their place.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SCHEMA = 1


@dataclass
class Run:
    """One run folder, read. `label` is the name, with the folder's name added where two runs share a name."""

    folder: Path
    label: str
    result: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    config: str | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    published: dict[str, Any] = field(default_factory=dict)
    """What a paper prints for this run: the recipe's `published` section, empty where it has none."""

    def series(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of each logged finite number `key`, by step; a resumed run's later line wins."""
        points = {}
        for line in self.lines:
            step, value = number(line.get("step")), number(line.get(key))
            if step is not None and value is not None:
                points[step] = value
        return sorted(points.items())

    @property
    def primary_metric(self) -> str | None:
        name = (self.evaluation or {}).get("primary_metric")
        return name if isinstance(name, str) else None

    @property
    def score(self) -> dict[str, float | None]:
        """The primary metric's value, low and high; each is None where it was not measured."""
        return self._score((self.evaluation or {}).get("metrics"))

    @property
    def merged_score(self) -> dict[str, float | None]:
        """The same of the merged form, where merging gives another function."""
        merged = (self.evaluation or {}).get("merged_form")
        return self._score(merged.get("metrics") if isinstance(merged, dict) else None)

    def _score(self, metrics: object) -> dict[str, float | None]:
        entry = metrics.get(self.primary_metric) if isinstance(metrics, dict) else None
        entry = entry if isinstance(entry, dict) else {"value": entry}
        return {key: number(entry.get(key)) for key in ("value", "low", "high")}


def number(value: object) -> float | None:
    """Return a finite number as it is, and None for anything else that a file may hold."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def load_runs(folders: list[Path]) -> list[Run]:
    """Read every folder, in order.

    Raises:
        UserError: no folder, a folder that does not exist or has no result.json, or a file that cannot be read as JSON.
    """
    if not folders:
        raise _user_error("the report needs at least one run folder")
    runs = [load_run(Path(folder)) for folder in folders]
    shared = {label for label, count in Counter(run.label for run in runs).items() if count > 1}
    for run in runs:
        if run.label in shared:
            run.label = f"{run.label} ({run.folder.resolve().name})"
    return runs


def load_run(folder: Path) -> Run:
    """Read one run folder. Raises UserError as `load_runs` does."""
    if not folder.is_dir():
        raise _user_error(f"the run folder {folder} does not exist")
    if not (folder / "result.json").is_file() and (folder / "summary.json").is_file():
        raise _user_error(
            f"{folder} has scores of named tasks and no training run: summary.md in it is their table, and "
            "`curvelora compare` says what two folders of them tell apart"
        )
    if not (folder / "result.json").is_file():
        raise _user_error(f"{folder} has no result.json; name a folder that a training run has written")
    result = _read_object(folder / "result.json")
    if result.get("schema", SCHEMA) != SCHEMA:
        path = folder / "result.json"
        raise _user_error(f"{path} has schema {result['schema']!r}; this version reads schema {SCHEMA}")

    run = Run(folder, str(result.get("name") or folder.resolve().name), result)
    run.evaluation = _read_optional(folder / "evaluation.json")
    run.environment = _read_optional(folder / "environment.json")
    if (folder / "config.yaml").is_file():
        run.config = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        run.published = _published(run.config)
    if (folder / "metrics.jsonl").is_file():
        run.lines, truncated = _read_lines(folder / "metrics.jsonl")
        if truncated:
            run.notes.append("the last line of metrics.jsonl is cut off, as a killed run leaves it, and was dropped")
        lost = sum(isinstance(line.get("loss"), float) and not math.isfinite(line["loss"]) for line in run.lines)
        if lost:
            run.notes.append(f"{lost} of the logged losses are not finite and are missing from the chart")
    return run


def _published(config: str) -> dict[str, Any]:
    """The `published` section of a recipe; empty where there is none, or the text is no recipe."""
    try:
        recipe = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    section = recipe.get("published") if isinstance(recipe, dict) else None
    return section if isinstance(section, dict) else {}


def _read_optional(path: Path) -> dict[str, Any] | None:
    return _read_object(path) if path.is_file() else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise _user_error(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise _user_error(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the objects, one a line, and whether a damaged last line was dropped."""
    texts = [text for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if text.strip()]
    lines = []
    for position, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError(f"expected an object, found {text[:40]!r}")
        except ValueError as error:
            if position == len(texts):
                return lines, True
            raise _user_error(f"{path}, entry {position} of {len(texts)}, cannot be read as JSON: {error}") from error
        lines.append(line)
    return lines, False


def _user_error(message: str) -> Exception:
    from curvelora.errors import UserError  # here, since importing curvelora loads torch and costs seconds

    return UserError(message)
