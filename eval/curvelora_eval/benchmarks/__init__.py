"""Named tasks: benchmarks with frozen protocols.

A task is one small module and one line here. `get` imports the module only when it is asked for.
"""

from __future__ import annotations

import importlib

from curvelora.errors import UserError, nearest
from curvelora_eval.benchmarks.base import Benchmark, LoadedRows, Row, Split
from curvelora_eval.benchmarks.loading import find_file, load, load_all

_HERE = "curvelora_eval.benchmarks"
BENCHMARKS: dict[str, str] = {
    "boolq": f"{_HERE}.boolq",
    "piqa": f"{_HERE}.piqa",
    "siqa": f"{_HERE}.siqa",
    "hellaswag": f"{_HERE}.hellaswag",
    "winogrande": f"{_HERE}.winogrande",
    "arc_easy": f"{_HERE}.arc_easy",
    "arc_challenge": f"{_HERE}.arc_challenge",
    "openbookqa": f"{_HERE}.openbookqa",
    "sst2": f"{_HERE}.sst2",
    "mrpc": f"{_HERE}.mrpc",
    "cola": f"{_HERE}.cola",
    "qnli": f"{_HERE}.qnli",
    "rte": f"{_HERE}.rte",
    "stsb": f"{_HERE}.stsb",
    "qqp": f"{_HERE}.qqp",
    "mnli": f"{_HERE}.mnli",
    "gsm8k": f"{_HERE}.gsm8k",
    "addsub": f"{_HERE}.addsub",
    "multiarith": f"{_HERE}.multiarith",
    "singleeq": f"{_HERE}.singleeq",
    "svamp": f"{_HERE}.svamp",
    "aqua": f"{_HERE}.aqua",
    "samsum": f"{_HERE}.samsum",
    "dialogsum": f"{_HERE}.dialogsum",
    "newsgroups20": f"{_HERE}.newsgroups20",
    "wikitext2": f"{_HERE}.wikitext2",
    "tiny_shakespeare": f"{_HERE}.tiny_shakespeare",
    "tinystories": f"{_HERE}.tinystories",
    "commonsense170k": f"{_HERE}.commonsense170k",
    "metamathqa": f"{_HERE}.metamathqa",
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


__all__ = ["BENCHMARKS", "Benchmark", "LoadedRows", "Row", "Split", "find_file", "get", "load", "load_all"]
