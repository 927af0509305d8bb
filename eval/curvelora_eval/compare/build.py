"""Put a comparison together: every arm against the first one, task by task and metric by metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curvelora.errors import UserError
from curvelora_eval.compare import check, paired
from curvelora_eval.compare.load import Arm, Evaluation, load_arm
from curvelora_eval.compare.verdict import decide, rule
from curvelora_eval.metrics import load_metric
from curvelora_eval.report.table import is_share
from curvelora_eval.scoring import FEWEST_ROWS, Score, columns, statistic

LETTERS = "ABCDEFGH"
MACRO = "macro average"
Pair = tuple[Arm, Arm]


def load_arms(texts: Sequence[str], only: list[str] | None = None) -> list[Arm]:
    """Read the arms and make sure that they compare.

    Args:
        texts: the arms as written on the command line (`curvelora_eval.compare.load`).
        only: names of tasks; all others are left out.

    Raises:
        UserError: fewer than two arms or too many, and everything that is wrong with them, all at once.
    """
    if not 2 <= len(texts) <= len(LETTERS):
        raise UserError(f"compare takes 2 to {len(LETTERS)} evaluation folders, found {len(texts)}")
    loaded = [load_arm(letter, text, only) for letter, text in zip(LETTERS, texts, strict=False)]
    wrong = [sentence for _, sentences in loaded for sentence in sentences]
    arms = [arm for arm, _ in loaded]
    if wrong := wrong or check.missing(arms, only) + check.problems(arms):
        raise UserError("these cannot be compared:\n" + "\n".join(f"  - {sentence}" for sentence in wrong))
    return arms


def compare(arms: list[Arm], level: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Return the comparison, as in `docs/results_format.md`: each later arm minus the first.

    Args:
        arms: of `load_arms`.
        level: of the intervals, in (0, 1).
        resamples: draws of rows, and of seeds where an arm has several.
        seed: of the generator that draws them.
    """
    first = arms[0].runs[0]
    pairs = [(arms[0], other) for other in arms[1:]]
    seeds = [_seed_draws(pair, resamples, [seed, 0, number]) for number, pair in enumerate(pairs)]
    measured = {
        task: _Measured(task, arms, resamples, [seed, 1, number]) for number, task in enumerate(first)
    }  # a task's own draws of rows: those of two tasks are independent
    tasks = []
    for task, found in measured.items():
        metrics = [
            _metric(found, key, pairs, seeds, level, primary=position == 0) for position, key in enumerate(found.keys)
        ]
        tasks.append(_describe(first[task]) | {"metrics": metrics})
    ways = {(evaluation.protocol.get("name"), evaluation.protocol.get("template")) for evaluation in first.values()}
    macro = _macro(list(measured.values()), pairs, seeds, level) if len(ways) == 1 else None
    everything = [metric for task in tasks for metric in task["metrics"]]
    for family in (
        [m for m in everything if m["primary"]],
        [m for m in everything if not m["primary"]],
        [macro] if macro else [],
    ):
        decide([each for metric in family for each in metric["comparisons"]], level)
    notes = [*_seed_notes(pairs), *check.notes(arms)]
    most = max(each["tests"] for metric in everything for each in metric["comparisons"])
    if most * 2 / (1 + resamples) >= 1 - level:
        notes.append(
            f"{resamples} resamples are too few for {most} tests: p of a bootstrap is {2 / (1 + resamples):.4f} at least, and "
            f"corrected never below {1 - level:g}; ask for more with --resamples."
        )
    return {
        "schema": 1,
        "kind": "comparison",
        "arms": [_describe_arm(arm) for arm in arms],
        "tasks": tasks,
        "macro": macro,
        "rule": rule(level),
        "interval": {"method": "paired percentile bootstrap", "level": level, "resamples": resamples, "seed": seed},
        "notes": notes,
    }


@dataclass
class _Values:
    """One metric of one arm: the runs' scores (runs,), and those of the drawn rows (runs, resamples)."""

    runs: np.ndarray
    draws: np.ndarray


class _Measured:
    """One task's scores, by key and arm; every run is scored on the same draws of rows."""

    def __init__(self, task: str, arms: list[Arm], resamples: int, seed: list[int]) -> None:
        example = arms[0].runs[0][task]
        ids = list(example.records)
        self.keys: dict[str, Score] = {}
        self.n = len(ids)
        self.rows = {arm.letter: [[run[task].records[i] for i in ids] for run in arm.runs] for arm in arms}
        points: dict[tuple[str, str], list[float]] = {}
        draws: dict[tuple[str, str], list[np.ndarray]] = {}
        for score in example.scores:
            self.keys |= dict.fromkeys(score.results.values(), score)
            for letter, runs in self.rows.items():
                for records in runs:
                    of_rows = statistic(records, score)
                    for key, value in of_rows(np.arange(len(ids))).items():
                        points.setdefault((key, letter), []).append(math.nan if value is None else value)
                    for key, values in paired.resampled(of_rows, len(ids), resamples, seed).items():
                        draws.setdefault((key, letter), []).append(values)
        self.values = {place: _Values(np.array(points[place]), np.array(draws[place])) for place in points}

    def mcnemar(self, key: str, pair: Pair) -> dict[str, Any] | None:
        """The table of right and wrong rows; None where rows are neither, or stand there once a seed."""
        score = self.keys[key]
        if not score.right_or_wrong or any(len(arm.runs) > 1 for arm in pair):
            return None
        metric, own = load_metric(score.metric), {name: k for k, name in score.results.items()}[key]
        right = [metric.row_scores(*columns(self.rows[arm.letter][0], score), **score.options)[own] for arm in pair]
        return paired.mcnemar(*right)


def _metric(
    found: _Measured, key: str, pairs: list[Pair], seeds: list[tuple], level: float, primary: bool
) -> dict[str, Any]:
    letters = [pairs[0][0].letter, *(other.letter for _, other in pairs)]
    comparisons = []
    for pair, drawn in zip(pairs, seeds, strict=True):
        a, b = (found.values[key, arm.letter] for arm in pair)
        comparisons.append(_comparison(key, pair, a, b, drawn, level, found.n, found.mcnemar(key, pair)))
    return {
        "metric": key,
        "primary": primary,
        "arms": {letter: _spread(found.values[key, letter].runs) for letter in letters},
        "comparisons": comparisons,
    }


def _comparison(
    key: str, pair: Pair, a: _Values, b: _Values, drawn: tuple, level: float, rows: int, table: dict[str, Any] | None
) -> dict[str, Any]:
    draws = paired.difference_draws(a.draws, b.draws, drawn)
    interval = paired.summarise(draws, level, rows)
    over_seeds = paired.seeds_test(a.runs, b.runs, _same_seeds(pair))
    p, test = interval["p"], "paired bootstrap"
    if table is not None and rows >= FEWEST_ROWS:
        p, test = table["p"], "exact McNemar test"
    elif over_seeds and p is not None and over_seeds["p"] > p:
        p, test = over_seeds["p"], over_seeds["test"]
    return {
        "metric": key,
        "arms": [arm.letter for arm in pair],
        "rows": rows,
        "difference": _finite(b.runs.mean() - a.runs.mean()),
        **interval,
        "p_bootstrap": interval["p"],
        "p": p,
        "test": test,
        "mcnemar": table,
        "over_seeds": over_seeds,
    }


def _macro(measured: list[_Measured], pairs: list[Pair], seeds: list[tuple], level: float) -> dict[str, Any] | None:
    """The plain mean over tasks of the primary metric, where there are several, all have the same one and it is a share."""
    keys = {next(iter(found.keys)) for found in measured}
    if len(measured) < 2 or len(keys) > 1 or not is_share(key := keys.pop()):
        return None
    fewest = min(found.n for found in measured)
    mean = {
        arm.letter: _Values(
            np.mean([found.values[key, arm.letter].runs for found in measured], axis=0),
            np.mean([found.values[key, arm.letter].draws for found in measured], axis=0),
        )
        for arm in (pairs[0][0], *(other for _, other in pairs))
    }
    return {
        "metric": key,
        "tasks": len(measured),
        "arms": {letter: _spread(values.runs) for letter, values in mean.items()},
        "comparisons": [
            _comparison(key, pair, mean[pair[0].letter], mean[pair[1].letter], drawn, level, fewest, None)
            for pair, drawn in zip(pairs, seeds, strict=True)
        ],
    }


def _seed_draws(pair: Pair, resamples: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return paired.draw_seeds(len(pair[0].runs), len(pair[1].runs), _same_seeds(pair), resamples, seed)


def _same_seeds(pair: Pair) -> bool:
    """Whether the two arms were trained with the same seeds, known from their names, so that runs are paired."""
    a, b = (arm.seeds for arm in pair)
    return a == b and None not in a and len(a) > 1


def _seed_notes(pairs: list[Pair]) -> list[str]:
    arms = [pairs[0][0], *(other for _, other in pairs)]
    single = [arm.letter for arm in arms if len(arm.runs) == 1]
    notes = []
    if single:
        notes.append(
            f"{_listed(single)} {'are one training run each' if len(single) > 1 else 'is one training run'}: what another "
            "training seed would change is not covered; only the choice of rows is."
        )
    paired_how: dict[str, list[str]] = {}
    for first, other in pairs:
        if min(len(first.runs), len(other.runs)) > 1:
            same = _same_seeds((first, other))
            how = "paired by seed" if same else "not paired, as their seeds are not known to be the same"
            paired_how.setdefault(how, [first.letter]).append(other.letter)
    notes += [
        f"{_listed(letters)} have several runs each, {how}: the intervals cover the choice of seeds and of rows."
        for how, letters in paired_how.items()
    ]
    return notes


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _spread(runs: np.ndarray) -> dict[str, Any]:
    """Mean and sample standard deviation over the runs."""
    sd = _finite(runs.std(ddof=1)) if len(runs) > 1 else None
    return {"value": _finite(runs.mean()), "sd": sd, "runs": [_finite(value) for value in runs]}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _describe(evaluation: Evaluation) -> dict[str, Any]:
    result, benchmark, protocol = evaluation.result, evaluation.result.get("benchmark") or {}, evaluation.protocol
    return {
        "task": result["task"],
        "protocol": protocol.get("name"),
        "template": protocol.get("template"),
        "protocol_hash": protocol.get("hash"),
        "quirks": protocol.get("quirks") or [],
        "split": benchmark.get("split") or (result.get("dataset") or {}).get("split"),
        "subset": benchmark.get("subset"),
        "rows": len({record.get("row", name) for name, record in evaluation.records.items()}),
        "windows": len(evaluation.records) if any("window" in r for r in evaluation.records.values()) else None,
    }


def _describe_arm(arm: Arm) -> dict[str, Any]:
    runs = []
    for run, seed in zip(arm.runs, arm.seeds, strict=True):
        each = next(iter(run.values()))
        folders = {task: str(evaluation.folder) for task, evaluation in run.items()}
        adapter, model = each.result.get("adapter") or {}, each.result.get("model") or {}
        runs.append(
            {
                "seed": seed,
                "folders": folders,
                "model": model.get("path"),
                "adapter": {key: adapter.get(key) for key in ("path", "sha256")} if adapter else None,
            }
        )
    return {"letter": arm.letter, "name": str(Path(arm.text)) if len(runs) == 1 else arm.text, "runs": runs}
