"""summary.json and summary.md: all results below one folder as one table, models x tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from curvelora_eval.evaluation.finished import by_model, read_results
from curvelora_eval.evaluation.result import remarks
from curvelora_eval.files import write_json, write_text

# what papers print as one average; only where all members are there under the same protocol and template
GROUPS = {
    "commonsense": ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
    "arithmetic": ("multiarith", "gsm8k", "addsub", "aqua", "singleeq", "svamp"),
    "glue": ("sst2", "mrpc", "cola", "qnli", "rte", "stsb", "qqp", "mnli"),
}
PERCENT = {"perplexity"}  # the metrics that are no share


def averages(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name of a group and its protocol -> unweighted mean of the primary metrics of its members, where all are there."""
    found = {}
    ways = dict.fromkeys(_way(record) for record in results.values())
    for way in ways:
        there = {record["task"]: record for record in results.values() if _way(record) == way}
        for group, members in GROUPS.items():
            values = [_value(there[name]) for name in members if name in there]
            if len(values) == len(members) and None not in values:
                subsets = [name for name in members if there[name]["benchmark"]["subset"]]
                found[f"{group}, {_in_words(way)}"] = {
                    "value": sum(values) / len(values),
                    "tasks": list(members),
                    "subsets": subsets,
                }
    return found


def _way(record: Mapping[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    protocol = record["protocol"]
    return protocol["name"], protocol["template"], tuple(protocol["quirks"])


def _in_words(way: tuple[str, str, tuple[str, ...]]) -> str:
    """Different for ways that differ: two means must not take each other's place."""
    name, template, quirks = way
    return name + (f" ({template})" if template != "default" else "") + (f" with {', '.join(quirks)}" if quirks else "")


def _value(record: Mapping[str, Any]) -> float | None:
    return record["metrics"][record["primary_metric"]]["value"]


def write_summary(out: Path, order: Iterable[str] = ()) -> dict[str, Any]:
    """Write both files from what is finished below `out`; labels in `order` come first. Returns summary.json's content."""
    results = read_results(out)
    wanted = [label for label in order if label in results]
    labels = wanted + [label for label in results if label not in wanted]
    tasks = list(dict.fromkeys(name for label in labels for name in results[label]))
    record = {
        "schema": 1,
        "kind": "evaluation summary",
        "models": labels,
        "tasks": tasks,
        "scores": {
            label: {
                name: {
                    "metric": r["primary_metric"],
                    **r["metrics"][r["primary_metric"]],
                    "rows": r["counts"]["rows"],
                    "subset": r["benchmark"]["subset"],
                    "protocol_hash": r["protocol"]["hash"],
                    "rows_per_second": r["rows_per_second"],
                    "remarks": remarks(r),
                }
                for name, r in results[label].items()
            }
            for label in labels
        },
        "averages": {
            label: {way: mean for same in by_model(results[label]) for way, mean in averages(same).items()}
            for label in labels
        },
    }
    write_json(out / "summary.json", record)
    write_text(out / "summary.md", _page(record))
    return record


def _page(record: Mapping[str, Any]) -> str:
    groups = list(dict.fromkeys(name for found in record["averages"].values() for name in found))
    header = ["model", *record["tasks"], *(f"mean of {name}" for name in groups)]
    lines = ["# Scores", "", _line(header), _line(["---"] * len(header))]
    for label in record["models"]:
        scores = record["scores"][label]
        cells = [_cell(scores[name]) if name in scores else "-" for name in record["tasks"]]
        found = record["averages"][label]
        means = [f"{100 * found[name]['value']:.2f}" if name in found else "-" for name in groups]
        lines.append(_line([label, *cells, *means]))
    lines += [
        "",
        "Primary metrics in percent (perplexity as it is) with 95 % intervals over rows (windows of a text).",
        "Means are unweighted.",
        "",
    ]
    for label in record["models"]:
        for name, score in record["scores"][label].items():
            lines += [f"* {label}, {name}: {remark}." for remark in score["remarks"]]
    return "\n".join(lines).rstrip() + "\n"


def _cell(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "undefined"
    scale = 1 if score["metric"] in PERCENT else 100
    value, low, high = (None if score[k] is None else f"{scale * score[k]:.2f}" for k in ("value", "low", "high"))
    return value + (f" [{low}, {high}]" if low else "") + ("" if score["subset"] is None else " (subset)")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
