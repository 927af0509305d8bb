"""List the recipes that come with the project, or print one."""

from __future__ import annotations

import argparse
import re
from typing import Any

import yaml

from curvelora_training.recipes import find, names

OURS = "ours"
_OPEN = re.compile(r"^\s*(\w+):.*#.*\bnot (?:stated|recorded)\b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora recipes`."""
    parser.add_argument("name", nargs="?", metavar="RECIPE", help="print this recipe")


def run(args: argparse.Namespace) -> int:
    """Print the list, or one recipe as it is written. Raises UserError where there is none of that name."""
    if args.name:
        print(find(args.name).read_text(encoding="utf-8"), end="")
        return 0
    rows = [describe(name) for name in names()]
    columns = ("name", "model", "task", "method", "source")
    widths = {column: max(len(row[column]) for row in rows) for column in columns}
    for row in rows:
        print("  ".join(row[column].ljust(widths[column]) for column in columns).rstrip())
    return 0


def describe(name: str) -> dict[str, str]:
    """Name, model, task, method, source of a recipe, and the keys that its source leaves `open`."""
    text = find(name).read_text(encoding="utf-8")
    recipe: dict[str, Any] = yaml.safe_load(text)
    published = recipe.get("published")
    opened = [match[1] for line in text.splitlines() if (match := _OPEN.match(line))]
    return {
        "name": name,
        "model": recipe["model"]["path"],
        "task": recipe["task"]["kind"],
        "method": recipe["adapter"]["method"],
        "source": published["source"] if published else OURS,
        "open": ", ".join(dict.fromkeys(opened)),
    }


def markdown() -> str:
    """The table of docs/recipes.md: a row a recipe."""
    lines = ["| recipe | model | task | method | source | not stated there, chosen here |", "|---|---|---|---|---|---|"]
    for name in names():
        row = describe(name)
        cells = [f"`{row['name']}`", *(row[key] for key in ("model", "task", "method", "source", "open"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
