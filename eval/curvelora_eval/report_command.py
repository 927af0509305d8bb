"""`curvelora report RUN... --out DIR`: one HTML page and one Markdown table that compare run folders."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder; each becomes one row")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where report.html and report.md go")
    parser.add_argument("--title", default=None, help="the page's title")


def run(args: argparse.Namespace) -> int:
    """Write the report, print the table and the two paths, and return exit code 0. Raises UserError as it does."""
    from curvelora_eval.report import write_report

    html, markdown = write_report(args.runs, args.out, args.title)
    print(markdown.read_text(encoding="utf-8"))
    print(f"page:  {html}")
    print(f"table: {markdown}")
    return 0
