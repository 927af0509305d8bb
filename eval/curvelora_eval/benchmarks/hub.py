"""Rows of a named task from the Hugging Face hub, or from its cache on this machine."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from curvelora.errors import UserError
from curvelora_eval.benchmarks.base import Benchmark, Row

if TYPE_CHECKING:
    from datasets import Dataset


COMMIT = re.compile(r"@([0-9a-f]{40})/")


def load_hub(benchmark: Benchmark, split: str) -> tuple[str, str, list[Row]]:
    """(name on the hub, version, rows) of one split; needs the network unless the data set is cached.

    The version is `commit <40 digits>` of the data set, or where `datasets` does not know it, `fingerprint <its own>`, which
    tells apart what lies in one cache.

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
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        reason += "; HF_HUB_OFFLINE is set, so only the cache was looked at" if offline else ""
        raise UserError(
            f"{benchmark.name} cannot be had from the hub as {name} ({reason}): give --data-dir with the folder that "
            f"holds {files}"
        ) from error
    try:
        return (
            f"{name} {on_hub}",
            _version(rows),
            [benchmark.from_hub(row, f"{split}-{i}") for i, row in enumerate(rows)],
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{name} has other columns than {benchmark.name} needs ({type(error).__name__}: {error}; it has "
            f"{', '.join(rows.column_names)}): use a local copy with --data-dir"
        ) from error


def _version(rows: Dataset) -> str:
    commits = {found[1] for url in rows.info.download_checksums or () if (found := COMMIT.search(url))}
    return f"commit {commits.pop()}" if len(commits) == 1 else f"fingerprint {rows._fingerprint}"
