"""Named tasks in words: what `curvelora tasks` prints and docs/tasks.md holds.

python -m curvelora_eval.benchmarks.describe > docs/tasks.md
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.benchmarks.base import Benchmark, LoadedRows
from curvelora_eval.benchmarks.protocols import (
    ChoiceProtocol,
    GenerateProtocol,
    HeadProtocol,
    PerplexityProtocol,
    Protocol,
    Row,
)
from curvelora_eval.benchmarks.quirks import QUIRKS

WIDTH = 110
LONGEST = 1200  # characters of an example
INTRODUCTION = """# Named tasks

`curvelora tasks` lists these, `curvelora tasks NAME` explains one with a prompt, and `--data-dir D` adds how many of the
published rows are there. A protocol with its version and template decides a score; its hash is in every result.
Scores of different protocols or templates must not stand in one table. A local copy that is smaller than the published set is
named "subset n of N" in the list and in every result.

This page is written by `python -m curvelora_eval.benchmarks.describe`.
"""
TRAINING = """## Training on them

A recipe names a task instead of a file, and gets the wording of the original's training side:

```yaml
task: {kind: causal_lm, max_length: 256, loss_on_prompt: true}
data:
  train: {path: data, task: boolq, template: clean}     # split: train
  test: {path: data, task: boolq, template: clean, split: test}
```

`path` is the data folder, or `hub`. Generative protocols give the columns `prompt` and `completion`, which are encoded one after
the other; `columns: {text: "{prompt}{completion}"}` encodes them as one text with all of it in the loss, as LLM-Adapters did.
Classification tasks give `text`, `text_pair` and `label`, for `kind: sequence_classification` (or `regression`).
"""


def describe(benchmark: Benchmark, data_dir: Path | None = None) -> dict[str, Any]:
    """Everything about one task as values that JSON can hold; `data_dir` adds what lies there."""
    splits: dict[str, Any] = {}
    for name, split in benchmark.splits.items():
        splits[name] = {
            "files": list(split.files),
            "hub": split.hub,
            "published": split.published,
            "unit": benchmark.unit,
            "labelled": split.labelled,
            "note": split.note,
        }
        if data_dir is not None:
            splits[name] |= _found(benchmark, name, data_dir)
    return {
        "name": benchmark.name,
        "version": benchmark.version,
        "kind": benchmark.kind,
        "title": benchmark.title,
        "source": benchmark.source,
        "hub": " ".join(filter(None, benchmark.hub)) if benchmark.hub else None,
        "default_split": benchmark.default_split,
        "splits": splits,
        "protocols": {
            name: {
                "version": protocol.version,
                "description": protocol.description,
                "model": protocol.kind,
                "metrics": [key for score in protocol.scores for key in score.results.values()],
                "hashes": {template: protocol.hash(template) for template in protocol.templates},
            }
            for name, protocol in benchmark.protocols.items()
        },
        "notes": list(benchmark.notes),
    }


def _found(benchmark: Benchmark, split: str, data_dir: Path) -> dict[str, Any]:
    try:
        loaded = benchmarks.load(benchmark, data_dir, split)
    except UserError as error:
        try:
            benchmarks.find_file(benchmark, split, data_dir)
        except UserError:
            return {"found": None, "problem": None}
        return {"found": None, "problem": str(error)}
    return {
        "found": loaded.n,
        "subset": loaded.subset,
        "left_out": loaded.left_out,
        "path": loaded.path,
        "problem": None,
    }


def _split_words(name: str, split: dict[str, Any]) -> str:
    published = f"{split['published']:,}"
    if "found" not in split:
        count = published
    elif split["problem"]:
        count = "damaged"
    elif split["found"] is None:
        count = f"- of {published}"
    else:
        count = split["subset"] or published
    return f"{name} {count}{'' if split['labelled'] else ' unlabelled'}"


def table(described: list[dict[str, Any]]) -> str:
    """One line a task: name, kind, splits, protocols with their version."""
    rows = [("task", "kind", "protocols", "splits")]
    for task in described:
        protocols = ", ".join(f"{name} v{p['version']}" for name, p in task["protocols"].items()) or "(to train on)"
        splits = ", ".join(_split_words(name, split) for name, split in task["splits"].items())
        rows.append((task["name"], task["kind"], protocols, splits))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    )


def markdown(described: list[dict[str, Any]]) -> str:
    """The same as a Markdown table, with the source."""
    lines = ["| task | kind | protocols | metrics | splits (published rows) | source |", "|---|---|---|---|---|---|"]
    for task in described:
        protocols = "<br>".join(f"{name} v{p['version']}" for name, p in task["protocols"].items()) or "to train on"
        metrics = "<br>".join(", ".join(p["metrics"]) for p in task["protocols"].values()) or "-"
        splits = ", ".join(_split_words(name, split) for name, split in task["splits"].items())
        cells = (f"**{task['name']}**", task["kind"], protocols, metrics, splits, task["source"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def explanation(benchmark: Benchmark, described: dict[str, Any], loaded: LoadedRows | None = None) -> str:
    """One task in plain words; `loaded` gives the example."""
    lines = [f"{benchmark.name}: {benchmark.title}", "", f"kind     {benchmark.kind}, version {benchmark.version}"]
    lines += [f"source   {benchmark.source}", f"hub      {described['hub'] or 'not read from there'}", "", "splits"]
    for name, split in described["splits"].items():
        default = " (default)" if name == benchmark.default_split else ""
        unit = "" if split["unit"] == "rows" else f" {split['unit']}"
        lines.append(f"  {_split_words(name, split)}{unit}{default}{': ' + split['note'] if split['note'] else ''}")
        lines.append(f"    {split.get('path') or ' or '.join(split['files'])}")
        if split.get("left_out"):
            lines.append(f"    broken lines left out: {split['left_out']}")
        if split.get("problem"):
            lines += _wrapped(split["problem"], "    ")
    for name, protocol in described["protocols"].items():
        metrics = ", ".join(protocol["metrics"])
        lines += ["", f"protocol {name}, version {protocol['version']}: {metrics}; model {protocol['model']}"]
        lines += _wrapped(protocol["description"], "  ")
        lines += [f"  {template:<9} {digest}" for template, digest in protocol["hashes"].items()]
    if benchmark.notes:
        lines += ["", "notes"]
        for note in benchmark.notes:
            lines += _wrapped(note, "    ", first="  - ")
    if loaded is not None:
        lines += example(benchmark, loaded.rows[0])
    if any(name == "llm-adapters" for name in benchmark.protocols):
        lines += ["", f"--legacy-quirks: {', '.join(QUIRKS)}"]
    return "\n".join(lines)


def example(benchmark: Benchmark, row: Row) -> list[str]:
    """What the model gets to see of one row, protocol by protocol and template by template."""
    lines: list[str] = []
    if isinstance(benchmark.training, GenerateProtocol):
        text = "".join(benchmark.training.training_text(row))
        return ["", f"example {row.id}, to train on:", *(f"  | {line}" for line in text[:LONGEST].split("\n"))]
    for name, protocol in benchmark.protocols.items():
        for template in protocol.templates:
            lines += ["", f"example {row.id}, {name}, {template}:"]
            lines += [f"  | {line}" for line in _shown(protocol, row, template)[:LONGEST].split("\n")]
    return lines


def _shown(protocol: Protocol, row: Row, template: str) -> str:
    if isinstance(protocol, GenerateProtocol):
        answer = f"\n[reference: {protocol.reference(row)!r}]" if row.answer is not None else ""
        return protocol.prompt(row, template)[: LONGEST - 100] + answer
    if isinstance(protocol, ChoiceProtocol):
        return "\n".join(f"{context!r} -> {continuation!r}" for context, continuation in protocol.pairs(row))
    if isinstance(protocol, HeadProtocol):
        return "\n".join(f"{column}: {value}" for column, value in protocol.columns(row).items())
    if isinstance(protocol, PerplexityProtocol):
        return protocol.text(row)[:300]
    return ""


def _wrapped(text: str, indent: str, first: str | None = None) -> list[str]:
    return textwrap.wrap(text, width=WIDTH, initial_indent=indent if first is None else first, subsequent_indent=indent)


def page() -> str:
    """The whole of docs/tasks.md."""
    everything = [(benchmarks.get(name), describe(benchmarks.get(name))) for name in benchmarks.BENCHMARKS]
    parts = [INTRODUCTION, markdown([described for _, described in everything]), "", "## Where data lies", ""]
    parts.append(
        "Below `--data-dir`; the first name that exists counts, each also with `.gz`, `.bz2` or `.xz`. Without `--data-dir` the "
        "hub is asked.\n"
    )
    parts.append(
        "The default tests read the few rows in `tests/data/benchmarks`. With the whole sets below D, `make test-data DATA=D` "
        "reads every row of every file that is there, checks ids, answers and what each protocol needs, and skips what is "
        "missing.\n"
    )
    parts += ["| task | split | files | hub |", "|---|---|---|---|"]
    for _, described in everything:
        for name, split in described["splits"].items():
            files = ", ".join(f"`{file}`" for file in split["files"])
            hub = f"{described['hub']}: {split['hub']}" if described["hub"] and split["hub"] else "-"
            parts.append(f"| {described['name']} | {name} | {files} | {hub} |")
    parts += ["", "## Protocols", ""]
    for benchmark, described in everything:
        for name, protocol in described["protocols"].items():
            hashes = ", ".join(f"{template} `{digest[:12]}`" for template, digest in protocol["hashes"].items())
            parts.append(
                f"* **{benchmark.name}, {name} v{protocol['version']}**: {protocol['description']} ({hashes})."
            )
    parts += ["", "## What to know", ""]
    for benchmark, described in everything:
        said = [f"{name}: {split['note']}." for name, split in described["splits"].items() if split["note"]]
        if said or benchmark.notes:
            parts.append(f"* **{benchmark.name}** {' '.join([*said, *benchmark.notes])}")
    parts += ["", TRAINING, "## Defects of the original scripts", ""]
    parts.append("None is on by default; `--legacy-quirks NAME,NAME` or `all` brings them back.\n")
    parts += ["| quirk | what | where | effect |", "|---|---|---|---|"]
    parts += [f"| {quirk.name} | {quirk.what} | {quirk.where} | {quirk.effect} |" for quirk in QUIRKS.values()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
