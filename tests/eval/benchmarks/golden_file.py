"""tests/data/golden/benchmarks.json: what a model is shown of one row a task, and the hash of every protocol and template.

python tests/eval/benchmarks/golden_file.py > tests/data/golden/benchmarks.json

Written again only together with a raised version (of the protocol, or of the task where its rows change), because results
recorded before no longer compare with those after.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from curvelora_eval import benchmarks
from curvelora_eval.benchmarks.base import Benchmark, Row
from curvelora_eval.benchmarks.protocols import ChoiceProtocol, GenerateProtocol, HeadProtocol, Protocol
from curvelora_eval.benchmarks.training import training_protocol

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = ROOT / "tests/data/benchmarks"
GOLDEN = ROOT / "tests/data/golden/benchmarks.json"


def golden(benchmark: Benchmark) -> dict[str, Any]:
    """One task: its version, a row, and what each protocol makes of it."""
    row = benchmarks.load(benchmark, SAMPLES).rows[0]
    protocols = benchmark.protocols or {"training": training_protocol(benchmark, None)}
    return {
        "version": benchmark.version,
        "row": row.id,
        "protocols": {name: _seen(protocol, row) for name, protocol in protocols.items()},
    }


def _seen(protocol: Protocol, row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {
        "version": protocol.version,
        "hash": {template: protocol.hash(template) for template in protocol.templates},
    }
    if isinstance(protocol, GenerateProtocol):
        record["prompt"] = {template: protocol.prompt(row, template) for template in protocol.templates}
        record["training"] = {template: list(protocol.training_text(row, template)) for template in protocol.templates}
    elif isinstance(protocol, ChoiceProtocol):
        record["pairs"] = [list(pair) for pair in protocol.pairs(row)]
    elif isinstance(protocol, HeadProtocol):
        record["columns"] = protocol.columns(row)
    return record


if __name__ == "__main__":
    found = {name: golden(benchmarks.get(name)) for name in benchmarks.BENCHMARKS}
    sys.stdout.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
