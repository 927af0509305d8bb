"""The matrix page, docs/matrix.md, written from what a run of the suite found.

python -m pytest tests/matrix --record-matrix docs/matrix.md
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cases import CASES, MAIN
from refusals import REFUSALS

METHODS = list(dict.fromkeys(case.method for case in [*MAIN, *CASES]))
HEAD = """# The matrix: what every method is held to

Every registered method passes the same cells, PEFT's own LoRA and QLoRA too, which shows that the cells are fair. A number is how
many checks stand behind a cell (variants, shapes, dtypes); – means that the cell does not apply. Cells, cases and bounds are in
[tests/matrix]({root}/tests/matrix); adding a method is described in [adding_a_method.md]({root}/docs/adding_a_method.md).
"""
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Record:
    """What a run found."""

    outcomes: dict[tuple[str, str], dict[str, list[str]]] = field(
        default_factory=dict
    )  # (theme, cell) -> method -> outcomes
    refused: dict[tuple[str, str], dict[str, set[str]]] = field(default_factory=dict)  # ... -> titles of refusals
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # name -> case -> largest value

    def add(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Take one test's report."""
        marker, params = item.get_closest_marker("cell"), getattr(getattr(item, "callspec", None), "params", {})
        if marker is None or not (report.when == "call" or report.outcome != "passed"):
            return
        case = params.get("case")
        method = case.method if case is not None else params["method"]
        key = (marker.args[0], marker.args[1].format(**params))
        self.outcomes.setdefault(key, {}).setdefault(method, []).append(report.outcome)
        for name, value in report.user_properties:
            if name == "refused":
                self.refused.setdefault(key, {}).setdefault(method, set()).add(value)
            elif name == "measured":
                values = self.measured.setdefault(value[0], {})
                values[str(case)] = max(value[1], values.get(str(case), 0.0))


def render(record: Record, environment: dict[str, Any], device: str, root: str = "..") -> str:
    """The page as Markdown; `root` leads from it to the repository."""
    lines = [HEAD.format(root=root)]
    for theme in dict.fromkeys(theme for theme, _ in record.outcomes):
        lines += [f"## {theme.capitalize()}", "", row(["cell", *METHODS]), row(["---"] + ["---:"] * len(METHODS))]
        for key, outcomes in record.outcomes.items():
            if key[0] == theme:
                cells = [entry(outcomes.get(m, []), record.refused.get(key, {}).get(m, set())) for m in METHODS]
                lines.append(row([key[1], *cells]))
        lines.append("")
    lines += ["## Refusals", "", "The whole list; any other refusal is a failing cell.", ""]
    lines += [f"{number}. **{r.title}**: {r.reason}." for number, r in enumerate(REFUSALS, start=1)]
    lines += ["", "## Measured", "", "The largest value over the checks of a cell, for each case.", ""]
    names = list(record.measured)
    lines += [row(["case", *names]), row(["---"] + ["---:"] * len(names))]
    for case in dict.fromkeys(map(str, CASES)):
        values = [record.measured[name].get(case) for name in names]
        if any(value is not None for value in values):
            lines.append(row([f"`{case}`", *("–" if value is None else f"{value:.1e}" for value in values)]))
    packages = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    processor = environment["hardware"]["cpu" if device == "cpu" else "gpu"]
    lines += [
        "",
        f"Written by `python -m pytest tests/matrix --record-matrix`, commit {environment['commit']}, on {processor}; "
        f"Python {environment['python']}, {packages}.",
    ]
    return "\n".join(lines) + "\n"


def entry(outcomes: list[str], refusals: set[str]) -> str:
    """One cell of the table."""
    if not outcomes:
        return "–"
    if set(outcomes) != {"passed"}:
        return f"**{'failed' if 'failed' in outcomes else 'skipped'}**"
    numbers = [str(n) for n, r in enumerate(REFUSALS, start=1) if r.title in refusals]
    return f"refused ({', '.join(numbers)})" if numbers else str(len(outcomes))


def row(cells: list[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def declared_cells(module: ModuleType) -> Iterator[tuple[str, str]]:
    """(theme, cell) of every cell that the tests of `module` declare."""
    for function in vars(module).values():
        marks = getattr(function, "pytestmark", [])
        for theme, text in (mark.args for mark in marks if mark.name == "cell"):
            wanted = re.findall(r"{(\w+)}", text)
            choices = [values_of(name, marks) for name in wanted]
            for values in product(*choices):
                yield theme, text.format(**dict(zip(wanted, values, strict=True)))


def values_of(name: str, marks: list[pytest.Mark]) -> list[Any]:
    """What a parameter of a test runs through."""
    for mark in marks:
        if mark.name == "parametrize":
            names = [mark.args[0]] if isinstance(mark.args[0], str) else list(mark.args[0])
            if name in names:
                values = [v if len(names) == 1 else v[names.index(name)] for v in mark.args[1]]
                return list(dict.fromkeys(values))
    raise ValueError(f"no test parameter is called {name}")


def write(record: Record, path: Path, device: str) -> None:
    """Write the page."""
    from curvelora_eval.environment import describe_environment

    root = os.path.relpath(ROOT, path.resolve().parent)
    path.write_text(render(record, describe_environment(), device, root), encoding="utf-8")
