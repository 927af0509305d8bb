"""Named tasks: benchmarks with frozen protocols.

A task is one small module and one line here. `get` imports the module only when it is asked for.
"""

from __future__ import annotations

import importlib

from curvelora.errors import UserError, nearest
from curvelora_eval.benchmarks.base import Benchmark, LoadedRows, Row, Split
from curvelora_eval.benchmarks.loading import load, load_all

_HERE = "curvelora_eval.benchmarks"
BENCHMARKS: dict[str, str] = {
    "boolq": f"{_HERE}.boolq",
    "mrpc": f"{_HERE}.mrpc",
    "gsm8k": f"{_HERE}.gsm8k",
    "wikitext2": f"{_HERE}.wikitext2",
}


def get(name: str) -> Benchmark:
    """The task called `name`.

    Raises:
        UserError: no task is called that; says which is nearest.
    """
    if name not in BENCHMARKS:
        raise UserError(
            f"there is no task {name!r}{nearest(name, BENCHMARKS)}: `curvelora tasks` lists them ({', '.join(BENCHMARKS)})"
        )
    return importlib.import_module(BENCHMARKS[name]).BENCHMARK


__all__ = ["BENCHMARKS", "Benchmark", "LoadedRows", "Row", "Split", "get", "load", "load_all"]
