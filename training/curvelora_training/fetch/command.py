"""Bring what a recipe needs to a machine without network, and check there that it is whole.

    curvelora fetch RECIPE --to DIR --wheels requirements.txt      where there is network (a login node)
    curvelora fetch RECIPE --to DIR --verify                       where the job runs: nothing is downloaded

Brings the model (safetensors, config, tokenizer; no pickles) and the rows from the hub, of one commit each, and writes a manifest
with the sha256 of every file. Files that the recipe names by a path are hashed where they lie, or copied with --copy. Prints the
overrides with which the recipe uses what was brought. Exit code 2: something did not come, is missing, or was changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from curvelora.errors import UserError

SHOWN = 20  # flaws in a message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe, by its name or path")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    parser.add_argument("--to", type=Path, metavar="DIR", help="(default fetched/NAME); nothing is written elsewhere")
    parser.add_argument(
        "--copy", action="store_true", help="copy local files as well, instead of hashing them in place"
    )
    wheels = "also a wheel of every package (of requirements.txt here, unless named)"
    parser.add_argument("--wheels", nargs="?", type=Path, const=Path("requirements.txt"), metavar="FILE", help=wheels)
    parser.add_argument("--verify", action="store_true", help="check what is there, without network")


def run(args: argparse.Namespace) -> int:
    """Fetch, or verify, and print the overrides to use."""
    from curvelora_training.config import load_recipe
    from curvelora_training.fetch.gather import asked_by, described_platform, gather, make_plan
    from curvelora_training.fetch.manifest import MANIFEST, flaws, read_manifest

    recipe = load_recipe(args.recipe, args.overrides)
    folder = args.to or Path("fetched") / args.recipe.stem
    if args.verify:
        if args.copy or args.wheels:
            raise UserError("--verify brings nothing: leave --copy and --wheels out")
        record = read_manifest(folder)
        problems = []
        if record.get("asked") != (asked := asked_by(recipe)):
            problems.append(f"{folder} was fetched for another recipe: {_difference(record.get('asked'), asked)}")
        if (made_for := record.get("wheels_for")) and made_for != (here := described_platform()):
            problems.append(f"the wheels are for {made_for}, and this is {here}")
        problems += flaws(folder, record)
        if problems:
            more = f"\n  - and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            listed = "\n".join(f"  - {problem}" for problem in problems[:SHOWN])
            raise UserError(f"{folder} is not what was fetched; fetch it or copy it again:\n{listed}{more}")
        print(
            f"{folder}: all {len(record['files']) + len(record['local'])} files are as they were fetched ({_size(record)})"
        )
    else:
        plan = make_plan(recipe)
        record = gather(plan, folder, str(args.recipe), args.copy, args.wheels)
        print(f"{folder}: {len(record['files'])} files ({_size(record)}), listed in {folder / MANIFEST}")
        for key, files in plan.local.items() if not args.copy else ():
            count = "a file" if len(files) == 1 else f"{len(files)} files"
            print(
                f"  {key}: {count} here, hashed and left in place; the job has to find them there (or fetch with --copy)"
            )
    print("\n".join(_advice(folder, record, args)))
    return 0


def _advice(folder: Path, record: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """How a run uses it."""
    import shlex

    lines = []
    values = {
        key: "null" if value is None else str((folder / value).resolve()) for key, value in record["overrides"].items()
    }
    words = [*args.overrides, *(f"{key}={value}" for key, value in values.items())]
    if values:
        lines.append("overrides: " + " ".join(shlex.quote(f"{key}={value}") for key, value in values.items()))
    lines.append(
        f"train with: HF_HUB_OFFLINE=1 curvelora train --config {shlex.quote(str(args.recipe))} {shlex.join(words)}".rstrip()
    )
    if record["wheels_for"]:
        where = shlex.quote(str((folder / "wheels").resolve()))
        lines.append(
            f"install with: pip install --no-index --find-links {where} curvelora-training ({record['wheels_for']})"
        )
    if not args.verify:
        lines.append("check there with: the same command with --verify, without --copy and --wheels")
    return lines


def _difference(had: Any, asked: dict[str, Any]) -> str:
    """The first parts in which two recipes' needs differ."""
    had = had if isinstance(had, dict) else {}
    parts = [f"{key} was {had.get(key)} and is {value}" for key, value in asked.items() if had.get(key) != value]
    return "; ".join(parts)


def _size(record: dict[str, Any]) -> str:
    total = sum(entry["bytes"] for part in ("files", "local") for entry in record[part].values())
    return f"{total / 1e9:.2f} GB" if total >= 1e7 else f"{total / 1e3:.1f} kB"
