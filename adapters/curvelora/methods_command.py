"""List the registered methods, or explain one: formula, paper, defaults, properties, caveats."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from curvelora.merging import Merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora methods`."""
    parser.add_argument("name", nargs="?", help="explain this method")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of objects, or one object for NAME")
    parser.add_argument("--markdown", action="store_true", help="print the list as a Markdown table with cost and caveats")


def run(args: argparse.Namespace) -> int:
    """Print the list or the explanation."""
    from curvelora.registry import EXPLAINED, METHODS, get_method

    if args.name in EXPLAINED and not args.json:
        print("\n".join(textwrap.wrap(EXPLAINED[args.name] + ".", width=110)))
        return 0
    chosen = [get_method(args.name)] if args.name else list(METHODS.values())
    described = [method.describe() for method in chosen]
    if args.json:
        print(json.dumps(described[0] if args.name else described, indent=2, default=_plain))
    elif args.name:
        print(explanation(described[0]))
    else:
        print(markdown(described) if args.markdown else table(described))
    return 0


def table(methods: list[dict[str, Any]]) -> str:
    """One line a method."""
    columns = ("name", "family", "merge", "identity_at_init", "provided_by", "paper")
    titles = ("method", "family", "merge", "identity at init", "from", "paper")
    rows = [titles, *(tuple(_cell(method[c]) for c in columns) for method in methods)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(methods: list[dict[str, Any]]) -> str:
    """A row a method: what it computes, what it costs, what to know; as docs/methods.md shows it."""
    lines = ["| method | formula | family | merge | base at the start | cost | caveats |", "|---|---|---|---|---|---|---|"]
    for method in methods:
        cells = [
            f"**{method['name']}** {method['paper']}",
            method["formula"],
            method["family"],
            method["merge"],
            _cell(method["identity_at_init"]),
            method["cost"],
            " ".join(method["caveats"]),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def explanation(method: dict[str, Any]) -> str:
    """What a user wants to know of one method, in plain words."""
    lines = [f"{method['name']}: {method['title']}", ""]
    for title, key in (
        ("formula", "formula"),
        ("paper", "paper"),
        ("family", "family"),
        ("provided by", "provided_by"),
        ("merge", "merge"),
        ("identity at init", "identity_at_init"),
        ("needs a base in", "required_quantization"),
        ("cost", "cost"),
    ):
        if method[key] is not None:
            meaning = f": {Merge(method[key]).meaning}" if key == "merge" else ""
            lines.append(f"{title:<17} {_cell(method[key])}{meaning}")
    lines += ["", "defaults"] + [f"  {name}: {_cell(value)}" for name, value in sorted(method["defaults"].items())]
    if method["caveats"]:
        lines += ["", "caveats"]
        for caveat in method["caveats"]:
            lines += textwrap.wrap(caveat, width=110, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
