"""The measured speeds as one Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = ("task", "way", "batch", "rows", "rows/s", "× the loop", "new tokens/s", "peak GB", "same answer", "same text")


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """A line for the original loop of each task and one for each batch size of the engine, after a line that says where.

    Args:
        records: what `curvelora bench eval` writes.
    """
    lines = []
    for record in records:
        lines += [_where(record), "", _line(HEAD), _line(["---"] * 3 + ["---:"] * (len(HEAD) - 3))]
        for task in record["tasks"]:
            name = f"{task['task']} ({task['protocol']['template']})"
            lines.append(_line([name, "original loop", 1, *_numbers(task["original"])]))
            lines += [_line([name, "engine", one["batch_size"], *_numbers(one)]) for one in task["engine"]]
        lines.append("")
    return "\n".join(lines)


def _where(record: dict[str, Any]) -> str:
    versions, hardware = record["versions"], record["hardware"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['torch_threads']} threads"
    adapter = f" with {record['adapter']['path']}" if record["adapter"] else ""
    return (
        f"{record['model']['path']}{adapter}, {record['model']['dtype']}, on {where}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {record['commit']}"
    )


def _numbers(one: dict[str, Any]) -> list[Any]:
    if one.get("out_of_memory"):
        return ["out of memory", *[""] * (len(HEAD) - 4)]
    peak, ratio = one["peak_memory_bytes"], one.get("ratio")
    return [
        one["rows"],
        f"{one['rows_per_second']:.2f}",
        "1" if ratio is None else f"{ratio:.1f}",
        f"{one['new_tokens_per_second']:.0f}",
        "–" if peak is None else f"{peak / 1e9:.2f}",
        *("–" if ratio is None else f"{one[key]} of {one['compared']}" for key in ("same_answer", "same_text")),
    ]


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
