"""The table of `curvelora bench engines`, in Markdown, from its file."""

from __future__ import annotations

from typing import Any

HEAD = (
    "| shape | base | arm | processes x rows x length | engine | step s | x ZeRO-2 | tokens/s a process | x one process | base, "
    "largest peak while it is made GB | peak GB |\n|---|---|---|---|---|---:|---:|---:|---:|---:|---:|"
)

KEPT = "layers_keeping_products"


def engines_table(records: list[dict[str, Any]]) -> str:
    """A line a record, in the order of the file, with ratios to those of the same file that they can be compared with.

    Args:
        records: of the result file. GB are 1e9 bytes.
    """

    def like(record: dict[str, Any], **other: Any) -> dict[str, Any] | None:
        keys = ("model", "base", "arm", "rows", "length", "stage", "processes")
        wanted = {key: other.get(key, record[key]) for key in keys} | {KEPT: record.get(KEPT, 0)}
        return next((r for r in records if all(r.get(key, 0) == value for key, value in wanted.items())), None)

    lines = [HEAD]
    for record in records:
        seconds, rate = record["step_seconds"]["median"], record["tokens_per_second_per_process"]
        second, alone = like(record, stage=2), like(record, stage=2, processes=1)
        ratio = "–" if record["stage"] != 3 or second is None else f"{seconds / second['step_seconds']['median']:.3f}"
        share = (
            "–" if record["processes"] == 1 or alone is None else f"{rate / alone['tokens_per_second_per_process']:.3f}"
        )
        peaks = [record["base_peak_bytes"], record["peak_bytes"] and record["peak_bytes"]["allocated"]]
        memory = ["–" if peak is None else f"{peak / 1e9:.1f}" for peak in peaks]
        size = f"{record['processes']} x {record['rows']} x {record['length']:,}"
        cells = [
            record["model"],
            record["base"],
            record["arm"],
            size,
            f"ZeRO-{record['stage']}{f', {kept} keep products' if (kept := record.get(KEPT)) else ''}",
            f"{seconds:.3f}",
            ratio,
        ]
        lines.append(f"| {' | '.join([*cells, f'{rate:,.0f}', share, *memory])} |")
    return "\n".join(lines)
