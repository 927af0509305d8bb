"""What preflight prints, and the record it keeps."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from curvelora_eval.environment import describe_environment
from curvelora_training.preflight.check import Found
from curvelora_training.preflight.judge import GIB, RINGS
from curvelora_training.preflight.place import Place


def lines(found: Found) -> list[str]:
    """A line a node, a line for each all-reduce, and the warnings."""
    text = [
        _node(leader, len([r for r in found.records if r["node_index"] == leader["node_index"]]))
        for leader in found.leaders
    ]
    text += [_reduction(row) for row in summary_of(found)]
    if not found.reduced:
        alone = len(found.records) == 1
        text.append(f"all-reduce: not tried, {'there is one process' if alone else 'for the reasons below'}")
    return text + [f"warning: {warning}" for warning in found.verdict.warnings]


def _node(leader: dict[str, Any], processes: int) -> str:
    node, folder = leader["node"], leader["folder"]
    names = Counter(gpu["name"] for gpu in node["gpus"])
    parts = [", ".join(f"{count} x {name}" for name, count in names.items()) or "no GPU"]
    if node["gpus"]:
        free = [gpu["memory_bytes"] - (gpu["used_bytes"] or 0) for gpu in node["gpus"]]
        parts.append(f"{min(free) / GIB:.1f} of {node['gpus'][0]['memory_bytes'] / GIB:.1f} GiB free")
        parts.append(f"driver {node['driver'] or 'unknown'}")
    else:
        parts.append(f"{node['hardware']['cpu_cores']} CPU cores, {node['hardware']['memory_bytes'] / GIB:.0f} GiB")
    if folder and folder["free_bytes"] is not None:
        rate = folder["write_bytes_per_second"]
        speed = f", {rate / 1e6:.0f} MB/s" if rate else ""
        parts.append(f"run folder {folder['free_bytes'] / GIB:.1f} GiB free{speed}")
    parts.append(
        f"clock {leader['skew'] * 1000:+.0f} ms" if abs(leader["skew"]) < 1 else f"clock {leader['skew']:+.1f} s"
    )
    parts.append(f"code {node['code'][:12]}")
    return f"{leader['host']}: {processes} process{'es' * (processes > 1)}; " + "; ".join(parts)


def _reduction(row: dict[str, Any]) -> str:
    where = f"within {row['host']}" if row["host"] else RINGS[row["ring"]]
    return (
        f"all-reduce of {row['processes']}, {where}, {row['bytes'] / (1 << 20):g} MiB: {row['seconds'] * 1e3:.3g} ms, algorithm "
        f"{row['algorithm_bytes_per_second'] / 1e9:.3g} GB/s, bus {row['bus_bytes_per_second'] / 1e9:.3g} GB/s, "
        f"{'sum WRONG' if row['wrong'] else 'sum right'}"
    )


def summary_of(found: Found) -> list[dict[str, Any]]:
    """The all-reduces, a row each: those of all processes, of every node, and across nodes."""
    rows: list[dict[str, Any]] = []
    seen: dict[tuple, dict[str, Any]] = {}
    for record in found.records:
        for ring, results in found.reduced.get(record["rank"], {}).items():
            host = record["host"] if ring == "node" else ""
            for result in results:
                key = (ring, host, result["bytes"])
                if key not in seen:
                    seen[key] = {"ring": ring, "host": host, "processes": 0, **result}
                    rows.append(seen[key])
                seen[key]["processes"] += 1
                seen[key]["wrong"] = seen[key]["wrong"] or result["wrong"]
    return sorted(rows, key=lambda row: list(RINGS).index(row["ring"]))


def record_of(found: Found, place: Place) -> dict[str, Any]:
    """The record: nodes, all-reduces, verdict, versions, hardware and commit, as plain data."""
    nodes = [
        {
            "host": leader["host"],
            "processes": [r["rank"] for r in found.records if r["node_index"] == leader["node_index"]],
            **{key: leader["node"][key] for key in ("gpus", "driver", "hardware", "code", "commit", "versions")},
            "clock_skew_seconds": leader["skew"],
            "run_folder": leader["folder"],
        }
        for leader in found.leaders
    ]
    rows = [row | {"ring": RINGS[row["ring"]], "host": row["host"] or None} for row in summary_of(found)]
    return {
        "schema": 1,
        "kind": "preflight",
        "status": "refused" if found.verdict.refusals else "fine",
        "refusals": found.verdict.refusals,
        "warnings": found.verdict.warnings,
        "launcher": place.launcher,
        "processes": len(found.records),
        "backend": "nccl" if all(record["gpu"] for record in found.records) else "gloo",
        "nodes": nodes,
        "all_reduce": rows,
        "bandwidth": "algorithm = bytes / seconds; bus = algorithm x 2 (n - 1) / n for n processes; seconds of the slowest one",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **describe_environment(),
    }
