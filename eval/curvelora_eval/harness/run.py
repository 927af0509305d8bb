"""Run lm-evaluation-harness on our rows, offline, through its Python API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from curvelora.errors import UserError, nearest
from curvelora_eval.environment import installed_version
from curvelora_eval.files import write_json, write_text
from curvelora_eval.harness.model import AdaptedModel, quiet

RESULTS = "results.json"
# parts of lm-eval's results that are ours already or no result
LEFT_OUT = ("samples", "pretty_env_info", "git_hash", "upper_git_hash", "transformers_version", "lm_eval_version")


def find_tasks(wanted: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """lm-eval's index of the task files that are needed.

    Args:
        wanted: names that must be in it.
        folders: searched for YAML files, the last one first; lm-eval's own tasks only for a name that is in none of them,
            because reading those takes some seconds.

    Raises:
        UserError: a name that is nowhere.
    """
    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if any(name not in manager.task_index for name in wanted):
        manager = TaskManager(include_path=paths, include_defaults=True)
    for name in wanted:
        if name not in manager.task_index:
            where = f" or below {', '.join(paths)}" if paths else ""
            raise UserError(f"lm-eval has no task {name!r} of its own{where}{nearest(name, manager.all_tasks)}")
    return manager


def evaluate(
    model: AdaptedModel,
    tasks: Sequence[str],
    manager: TaskManager,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> dict[str, Any]:
    """lm-eval's results, with the scores of every row under `samples`.

    Args:
        tasks: names that `manager` knows.
        num_fewshot: examples before each row; None leaves it to the task files.
        limit: the first so many rows of each task.
        seed: of the choice of examples.

    Raises:
        UserError: lm-eval could not read a task or its rows.
    """
    disable_progress_bars()  # of reading the task files; the bar of the requests stays
    try:
        with quiet():
            return simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                batch_size=model.batch_size,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (OSError, ValueError, KeyError, ImportError, TypeError, AssertionError) as error:
        raise UserError(f"lm-eval stopped: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def keep(out: Path, results: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Write results.json and one samples_TASK.jsonl a task into `out`; returns the path of the first.

    Args:
        facts: model, adapter, protocols, versions and so on; they stand under `curvelora`.
    """
    for task, samples in results["samples"].items():
        lines = (json.dumps(_plain(sample), ensure_ascii=False, default=str) + "\n" for sample in samples)
        write_text(out / f"samples_{task}.jsonl", "".join(lines))
    kept = {key: value for key, value in results.items() if key not in LEFT_OUT}
    record = {"schema": 1, "kind": "lm_eval", "lm_eval": installed_version("lm_eval"), "curvelora": facts} | kept
    # lm-eval's results hold numpy numbers, and NaN where a standard error does not exist
    return write_json(out / RESULTS, _plain(record))


def table(results: dict[str, Any], rows: dict[str, str]) -> str:
    """A line a task and metric: value, standard error and rows.

    Args:
        rows: task -> what to say of its rows ("100 rows, subset 100 of 2376"); others show how many were scored.
    """
    lines = [f"{'task':<28} {'version':<8} {'metric':<12} {'value':>8} {'std err':>8}  rows"]
    for task, scores in results["results"].items():
        said = rows.get(task) or f"{results.get('n-samples', {}).get(task, {}).get('effective', '')}"
        for key, value in scores.items():
            metric, separator, chosen = key.partition(",")
            if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = _number(scores.get(f"{metric}_stderr,{chosen}"))
            version = str(results["versions"].get(task, ""))
            lines.append(f"{task:<28} {version:<8} {metric:<12} {value:>8.4f} {error:>8}  {said}")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy numbers as Python's, NaN and infinity as None, anything else unknown as text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(one) for one in value]
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
