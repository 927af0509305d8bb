"""Rows of a named task from the Hugging Face hub, or from its cache on this machine."""

from __future__ import annotations

import os

from curvelora.errors import UserError
from curvelora_eval.benchmarks.base import Benchmark, Row


def load_hub(benchmark: Benchmark, split: str) -> tuple[str, None, list[Row]]:
    """(name on the hub, None, rows) of one split; needs the network unless the data set is cached.

    Raises:
        UserError: the task has no data set on the hub, or it cannot be had.
    """
    on_hub = benchmark.splits[split].hub
    files = " or ".join(benchmark.splits[split].files)
    if benchmark.hub is None or benchmark.from_hub is None or on_hub is None:
        raise UserError(
            f"{benchmark.name} (split {split}) is not read from the hub: give --data-dir with the folder that holds {files}"
        )
    path, config = benchmark.hub
    name = f"{path}{f' ({config})' if config else ''}"
    from datasets import load_dataset

    try:
        rows = load_dataset(path, config, split=on_hub)
    except Exception as error:  # each of the hub's layers has its own exceptions; all mean that there are no rows
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        reason = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else " ".join(str(error).split())[:200]
        raise UserError(
            f"{benchmark.name} cannot be had from the hub as {name} ({reason}): give --data-dir with the folder that "
            f"holds {files}"
        ) from error
    try:
        return f"{name} {on_hub}", None, [benchmark.from_hub(row, f"{split}-{i}") for i, row in enumerate(rows)]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{name} has other columns than {benchmark.name} needs ({type(error).__name__}: {error}; it has "
            f"{', '.join(rows.column_names)}): use a local copy with --data-dir"
        ) from error
