"""Evaluation folders as they stand on disk: one run of one task, and the arms that a comparison sets side by side.

An arm is written on the command line as a folder, or as several with commas between them: seeds of one configuration. A
folder is an evaluation itself (evaluation.json and predictions.jsonl) or holds several, at any depth.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from curvelora.errors import UserError
from curvelora_eval.scoring import PERPLEXITY, Score, statistic

RESULT, PREDICTIONS = "evaluation.json", "predictions.jsonl"
AGAIN = "run `curvelora eval` again with the same --out, which repairs it"


@dataclass(frozen=True)
class Evaluation:
    """One model on one task: its result, its prediction records by row id, and how they are scored."""

    folder: Path
    result: dict[str, Any]
    records: dict[str, dict[str, Any]]

    @cached_property
    def scores(self) -> list[Score]:
        """What the result says that it computed, primary metric first."""
        return _scores(self.result, self.folder / RESULT)

    @property
    def protocol(self) -> dict[str, Any]:
        """Name, version, template, hash and quirks; empty for rows of the user's own."""
        return self.result.get("protocol") or {}

    @property
    def task(self) -> str:
        """The task, with its protocol where it has one: what must be the same for two evaluations to be a pair."""
        name = self.protocol.get("name")
        return f"{self.result['task']} ({name})" if name else str(self.result["task"])


@dataclass
class Arm:
    """What one column of the comparison stands for: runs of one configuration, each with its evaluations by task."""

    letter: str
    text: str
    runs: list[dict[str, Evaluation]] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)


def load_arm(letter: str, text: str, only: list[str] | None = None) -> tuple[Arm, list[str]]:
    """Read an arm as written on the command line; returns it with one sentence for each thing that is wrong with it.

    Args:
        letter: what the comparison calls it.
        text: a folder, or several with commas between them.
        only: names of tasks; all others are left out.
    """
    # A folder whose own name has a comma is meant as it stands.
    parts = [text] if Path(text).is_dir() else [part for part in text.split(",") if part]
    arm, problems = Arm(letter, text), []
    if len({Path(part).resolve() for part in parts}) < len(parts):
        problems.append(f"{letter}: the same folder stands twice in {text}; a seed counts once")
    for part in parts:
        found, wrong = _load_run(Path(part), only)
        problems += [f"{letter}: {sentence}" for sentence in wrong]
        arm.runs.append(found)
        arm.seeds.append(_seed(Path(part), found))
    if None not in arm.seeds and len(set(arm.seeds)) == len(arm.seeds):
        order = sorted(range(len(parts)), key=arm.seeds.__getitem__)
        arm.runs, arm.seeds = [arm.runs[i] for i in order], [arm.seeds[i] for i in order]
    else:
        arm.seeds = [None] * len(arm.seeds)
    return arm, problems


def _load_run(folder: Path, only: list[str] | None) -> tuple[dict[str, Evaluation], list[str]]:
    if not folder.is_dir():
        return {}, [f"{folder} is no folder: name the folder that `curvelora eval --out` wrote"]
    places = [folder] if _is_evaluation(folder) else sorted({p.parent for p in folder.rglob(RESULT)})
    problems = [] if only else [_no_result(place) for place in _unfinished(folder)]
    groups: dict[str, list[Evaluation]] = {}
    for place in places:
        try:
            evaluation = Evaluation(place, read_result(place), {})
            if not only or evaluation.result["task"] in only:
                groups.setdefault(evaluation.task, []).append(evaluation)
        except UserError as error:
            problems.append(str(error))
    named, twice = _names(groups)
    if twice:
        task, where = twice[0], [str(each.folder.relative_to(folder)) for each in groups[twice[0]]]
        rest = f" (and {len(twice) - 1} other tasks)" if len(twice) > 1 else ""
        problems.append(
            f"{folder} holds {len(where)} evaluations of {task}{rest}, in {', '.join(where[:3])}"
            f"{', ...' * (len(where) > 3)}: name the folder of one model"
        )
    found: dict[str, Evaluation] = {}
    for name, evaluation in named.items():
        try:
            found[name] = replace(evaluation, records=read_records(evaluation.folder))
            check_belongs(found[name])
        except UserError as error:
            problems.append(str(error))
    if not found and not problems:
        wanted = f" of {', '.join(only)}" if only else ""
        problems += [_no_result(place) for place in _unfinished(folder)] or [
            f"{folder} holds no evaluation{wanted}: no folder in it has such an {RESULT}"
        ]
    return found, problems


def _names(groups: dict[str, list[Evaluation]]) -> tuple[dict[str, Evaluation], list[str]]:
    """Name evaluations by their task, and by their template too where the folder has several.

    Returns them, and the names of those that this does not tell apart.
    """
    named, twice = {}, []
    for task, group in groups.items():
        templates = {str(each.protocol.get("template")): each for each in group}
        if len(group) == 1:
            named[task] = group[0]
        elif len(templates) == len(group):
            named |= {f"{task}, {template}": each for template, each in templates.items()}
        else:
            twice.append(task)
    return named, twice


def _unfinished(folder: Path) -> list[Path]:
    """Folders with predictions and no result; a check of a merged model leaves such ones inside an evaluation's folder."""
    places = sorted({p.parent for p in folder.rglob("predictions*.jsonl")})
    return [p for p in places if not (p / RESULT).exists() and not (p.parent / RESULT).exists()]


def _no_result(folder: Path) -> str:
    return f"{folder} has no {RESULT}, so its evaluation did not end: {AGAIN}"


def _is_evaluation(folder: Path) -> bool:
    return (folder / RESULT).exists()


def read_result(folder: Path) -> dict[str, Any]:
    """Read evaluation.json.

    Raises:
        UserError: it is missing, damaged, something else, or older than the list of scores that a comparison needs.
    """
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(_no_result(folder)) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from error
    if not isinstance(result, dict) or result.get("kind") != "evaluation":
        raise UserError(f"{path} is not the result of an evaluation (its kind is not 'evaluation')")
    missing = [key for key in ("task", "metrics", "scoring") if not result.get(key)]
    if missing:
        raise UserError(
            f"{path} lacks {' and '.join(missing)}, as results of older versions do: run `curvelora eval` again"
        )
    if not isinstance(result["metrics"], dict) or not all(
        isinstance(each, dict) for each in result["metrics"].values()
    ):
        raise UserError(f"{path} has metrics that are no values by name: run `curvelora eval` again with --overwrite")
    _scores(result, path)
    return result


def _scores(result: dict[str, Any], path: Path) -> list[Score]:
    try:
        scores = [Score(**each) for each in result["scoring"]]
        for score in scores:
            own = score.results  # of a metric that is known
            names = [score.metric, *score.fields, *own.values()]
            if not all(isinstance(name, str) for name in names) or not isinstance(score.options, dict):
                raise TypeError("names must be texts and options an object")
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} has a `scoring` that cannot be read ({error}): another version of curvelora-eval wrote it, or it was "
            "changed by hand; run `curvelora eval` again"
        ) from error
    return scores


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Read predictions.jsonl: row id (or row number, where rows have no id) -> record, in the order of the file.

    Raises:
        UserError: it is missing, half-written or damaged, or an id stands twice.
    """
    path = folder / PREDICTIONS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{folder} has no {PREDICTIONS}, and rows are compared one by one: {AGAIN}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            where = "its last line is cut" if number == len(lines) else f"line {number} is not JSON"
            raise UserError(f"{path} is half-written or damaged ({where}): {AGAIN}") from None
        if not isinstance(record, dict) or not {"id", "row"} & set(record):
            raise UserError(f"{path}: line {number} has neither id nor row, so it is no prediction of `curvelora eval`")
        records.append(record)
    ids = [str(record.get("id", record.get("row"))) for record in records]
    if twice := [name for name, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{path} has {len(twice)} ids twice, first {twice[0]!r}: rows cannot be paired by them")
    if not records:
        raise UserError(f"{path} is empty: {AGAIN}")
    return dict(zip(ids, records, strict=True))


def check_belongs(evaluation: Evaluation) -> None:
    """Compute the metrics again from the records; that must give what evaluation.json says.

    Raises:
        UserError: the two files do not belong together, or the records lack what the metrics read.
    """
    folder, result, records = evaluation.folder, evaluation.result, list(evaluation.records.values())
    apart = f"{RESULT} and {PREDICTIONS} do not belong together: run `curvelora eval` again"
    counts = result.get("counts") or {}
    what = "windows" if "windows" in counts else "rows"  # a text has a record a window
    stated = counts.get(what) or (result.get("dataset") or {}).get("rows")
    if stated is not None and stated != len(records):
        raise UserError(f"{folder} has {len(records)} predictions and a result of {stated} {what}, so {apart}")
    for score in evaluation.scores:
        if (
            score.metric == PERPLEXITY and "nll" not in records[0]
        ):  # rows of the user's own keep them in the two common fields
            for record in records:
                record["nll"], record["tokens"] = record.get("prediction"), record.get("reference")
        try:
            computed = statistic(records, score)(np.arange(len(records)))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{folder}: {PREDICTIONS} cannot be scored ({error}); {apart}") from error
        for key, value in computed.items():
            said = (result["metrics"].get(key) or {}).get("value")
            value = value if value is not None and math.isfinite(value) else None
            same = value is said is None or (
                None not in (value, said) and math.isclose(value, said, abs_tol=1e-9, rel_tol=1e-6)
            )
            if not same:
                raise UserError(f"{folder}: the predictions give {key} {value}, and {RESULT} says {said}, so {apart}")


def _seed(folder: Path, run: dict[str, Evaluation]) -> int | None:
    """The training seed, from a name such as `seed-3` in the path of the adapter or of the folder; None where none says."""
    adapters = [(each.result.get("adapter") or {}).get("path") for each in run.values()]
    for text in (*adapters, str(folder)):
        if numbers := re.findall(r"seed[-_=]?(\d+)", str(text or ""), re.IGNORECASE):
            return int(numbers[-1])
    return None
