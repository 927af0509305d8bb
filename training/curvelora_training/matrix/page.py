"""The page of the matrix, written from the records that docs/results/distributed keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from curvelora_training.matrix.cells import REFUSALS, Cell, refusal
from curvelora_training.matrix.matrix import AGREES, REFUSED

HEAD = """# The distributed matrix

Every method trains four steps under every engine, on every base, and is compared with one process on the same global batches. A
cell shows the largest relative difference of the losses of training and evaluation: 0 means that they are equal bit for bit.
What is saved, the start shift, the scores, the engine's class and stage, dtypes and the share of the base that a process holds
are checked as well; a cell of which anything is beyond its bound says **differs**. The models are tiny with random weights unless
a model is named, so the numbers say that the arithmetic is the same, and nothing of quality or speed.

Bounds: losses 1e-5 in fp32 (1e-4 for full fine-tuning of a language model), 2e-3 on bf16 and NF4, where a product is rounded
otherwise in batches of another shape; entries of the adapter 1e-5 in fp32, and on bf16 and NF4 (and for full fine-tuning of a
language model) 3e-3 at most and 2.5e-4 on the mean of every tensor, where four steps move an entry by up to 2.5e-3. A number in
parentheses is a combination that is refused before anything is loaded, and why it is stands at the end; – was not made yet.

Written by `curvelora matrix --record NAME`; the records are in [results/distributed](results/distributed).
"""
TITLES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def page(results: Path) -> str:
    """The whole page, from every record below `results`."""
    parts = [HEAD]
    numbers: list[int] = []
    for path in sorted(results.glob("*.json")):
        parts += section(json.loads(path.read_text(encoding="utf-8")), path.stem, numbers)
    parts += ["## What is refused", ""]
    parts += [f"{place}. {REFUSALS[n].why}." for place, n in enumerate(numbers, start=1)]
    return "\n".join(parts) + "\n"


def section(record: dict[str, Any], name: str, numbers: list[int]) -> Iterator[str]:
    """The tables of one record.

    Args:
        numbers: indices of refusals that the page has named so far; is added to.
    """
    environment, settings = record["environment"], record["settings"]
    hardware = environment["hardware"]
    device = f"{hardware['gpus']} x {hardware['gpu']}" if hardware["gpu"] else f"CPU ({hardware['cpu']})"
    versions = ", ".join(
        f"{package} {environment['versions'][package]}"
        for package in ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
        if package in environment["versions"]
    )
    counts = ", ".join(f"{count} {status}" for status, count in count_by_status(record["cells"]).items())
    model = settings["model"] or "tiny BERT and Llama, random weights"
    yield f"## {name}: {settings['processes']} processes, {device}"
    yield ""
    yield f"{counts}. Model: {model}; seed {settings['seed']}. {versions}; commit {', '.join(record['commits'])}."
    yield ""
    plain = [cell for cell in record["cells"] if cell["launcher"] is None]
    for task, base in dict.fromkeys((cell["task"], cell["base"]) for cell in plain):
        here = [cell for cell in plain if (cell["task"], cell["base"]) == (task, base)]
        yield f"### {task}, {base}"
        yield ""
        yield from _table(here, "method", numbers)
    launched = [cell for cell in record["cells"] if cell["launcher"] is not None]
    if launched:
        yield f"### launchers, {launched[0]['method']}, {launched[0]['task']}, {launched[0]['base']}"
        yield ""
        yield from _table(launched, "launcher", numbers)


def count_by_status(cells: list[dict[str, Any]]) -> dict[str, int]:
    """Status -> how many cells, in order of appearance."""
    counts: dict[str, int] = {}
    for cell in cells:
        counts[cell["status"]] = counts.get(cell["status"], 0) + 1
    return counts


def _table(cells: list[dict[str, Any]], key: str, numbers: list[int]) -> Iterator[str]:
    engines = list(dict.fromkeys(cell["engine"] for cell in cells))
    yield f"| {key} | {' | '.join(TITLES.get(e, e.replace('zero', 'ZeRO-').replace('_', ' ')) for e in engines)} |"
    yield f"| --- |{' ---: |' * len(engines)}"
    for row in dict.fromkeys(cell[key] for cell in cells):
        found = {cell["engine"]: cell for cell in cells if cell[key] == row}
        yield f"| {row} | {' | '.join(_entry(found.get(engine), numbers) for engine in engines)} |"
    yield ""


def _entry(cell: dict[str, Any] | None, numbers: list[int]) -> str:
    if cell is None:
        return "–"
    if cell["status"] == REFUSED:
        rule = refusal(Cell(*(cell[name] for name in ("task", "base", "method", "engine", "launcher"))))
        if rule is None:
            return REFUSED
        if (number := REFUSALS.index(rule)) not in numbers:
            numbers.append(number)
        return f"({numbers.index(number) + 1})"
    losses = [cell.get("measured", {}).get(kind) for kind in ("loss", "eval_loss")]
    shown = "" if None in losses else "0" if max(losses) == 0 else f"{max(losses):.1e}"
    return shown if cell["status"] == AGREES else f"**{cell['status']}** {shown}".strip()
