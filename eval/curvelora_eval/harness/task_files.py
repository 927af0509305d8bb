"""A named task as local files of lm-evaluation-harness: a YAML and the rows, made from the loglikelihood protocol.

The rows hold finished texts, so no template is filled in a second time and the requests are those of `curvelora eval`:

    choices that differ in their end (most tasks)   context, choices, gold       lm-eval scores `context + " " + choice`
    choices that differ in their beginning          contexts, ending, gold       ... `contexts[i] + " " + ending` (winogrande)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from curvelora.errors import UserError
from curvelora_eval.benchmarks.base import Benchmark, LoadedRows, Row
from curvelora_eval.files import make_folder, write_text

PREFIX = "curvelora_"
"""Of our tasks' names in lm-eval, which has tasks of the same names and other texts."""
DELIMITER = " "


def task_name(benchmark: Benchmark) -> str:
    """The name of a benchmark's task in lm-eval."""
    return PREFIX + benchmark.name


def loglikelihood(benchmark: Benchmark) -> Any:
    """The benchmark's loglikelihood protocol.

    Raises:
        UserError: it has none.
    """
    if "loglikelihood" not in benchmark.protocols:
        raise UserError(
            f"the task {benchmark.name} has no loglikelihood protocol, which is what lm-eval runs: take a task of the kind "
            "multiple_choice (`curvelora tasks` lists them)"
        )
    return benchmark.protocols["loglikelihood"]


def write_task(folder: Path, benchmark: Benchmark, splits: dict[str, LoadedRows], num_fewshot: int = 0) -> Path:
    """Write `curvelora_NAME.yaml` and its rows below `folder`; returns the YAML's path.

    Args:
        folder: is made where it does not exist.
        splits: "test", and "fewshot" where examples are to stand before a row.

    Raises:
        UserError: the benchmark has no loglikelihood protocol, its rows are of both forms, or nothing can be written.
    """
    protocol, name = loglikelihood(benchmark), task_name(benchmark)
    make_folder(folder)
    files, forms = {}, set()
    for split, loaded in splits.items():
        documents = [document(protocol, row) for row in loaded.rows]
        forms |= {"ending" in one for one in documents}
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents)
        files[split] = str(write_text(folder / f"{name}.{split}.jsonl", lines).resolve())
    if len(forms) > 1:
        raise UserError(
            f"the rows of {benchmark.name} have choices of two forms, which one task of lm-eval cannot hold"
        )
    config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    if "fewshot" in splits:
        config["fewshot_split"] = "fewshot"
    config |= {"output_type": "multiple_choice", "target_delimiter": DELIMITER, "num_fewshot": num_fewshot}
    if forms == {True}:  # an integer as text tells lm-eval that the choices are the contexts
        config |= {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "ending"}
    else:
        config |= {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"}
    normalised = any(score.prediction == "prediction_norm" for score in protocol.scores)
    metrics = ["acc", "acc_norm"] if normalised else ["acc"]
    config["metric_list"] = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics]
    config["metadata"] = {"version": f"{benchmark.version}.{protocol.version}"}
    return write_text(folder / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def document(protocol: Any, row: Row) -> dict[str, Any]:
    """One row as lm-eval gets it: `id`, `gold` (index of the right choice), and the texts of one of the two forms.

    Raises:
        UserError: contexts and endings both differ, or an ending does not begin with one space.
    """
    contexts, endings = zip(*protocol.pairs(row), strict=True)
    one = {"id": row.id, "gold": protocol.reference(row)}
    stripped = [_without_delimiter(ending, row) for ending in endings]
    if len(set(contexts)) == 1:
        return one | {"context": contexts[0], "choices": stripped}
    if len(set(endings)) == 1:
        return one | {"contexts": list(contexts), "ending": stripped[0]}
    raise UserError(f"row {row.id}: its choices differ in context and in ending, which lm-eval has no form for")


def _without_delimiter(ending: str, row: Row) -> str:
    if not ending.startswith(DELIMITER):
        raise UserError(
            f"row {row.id}: the choice {ending!r} does not begin with a space, which lm-eval puts before it"
        )
    return ending[len(DELIMITER) :]


def task_facts(benchmark: Benchmark, loaded: LoadedRows) -> dict[str, Any]:
    """What the results say of one of our tasks: its rows and its protocol."""
    protocol = loglikelihood(benchmark)
    words = f"{loaded.n} rows" + (f", {loaded.subset}" if loaded.subset else "")
    return {
        "benchmark": benchmark.name,
        "split": loaded.split,
        "path": loaded.path,
        "sha256": loaded.sha256,
        "rows": len(loaded.rows),
        "published": loaded.published,
        "subset": loaded.subset,
        "rows_in_words": words,
        "protocol": {"name": protocol.name, "version": protocol.version, "hash": protocol.hash()},
    }
