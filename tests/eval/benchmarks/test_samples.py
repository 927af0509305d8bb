"""What the committed sample rows are: tests/data/SOURCES.md accounts for each folder, and names no licence without its text."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from curvelora.errors import UserError
from curvelora_eval import benchmarks

OWN = ("boolq", "arc_easy", "arc_challenge", "addsub", "multiarith", "singleeq", "svamp", "tinystories")
"""Tasks whose real rows are share-alike or have no licence that allows copies."""


def test_every_folder_is_accounted_for(root: Path, samples: Path) -> None:
    said = (root / "tests/data/SOURCES.md").read_text(encoding="utf-8")
    folders = [
        path.name for part in ("", "commonsense", "math") for path in (samples / part).iterdir() if path.is_dir()
    ]
    missing = [name for name in folders if not re.search(rf"\b{re.escape(name)}\b", said)]
    assert len(folders) > 20 and missing == []


def test_licences_are_there_with_their_notice(root: Path) -> None:
    folder = root / "tests/data"
    named = set(re.findall(r"\(((?:LICENSES|\.\.)/[^)]+)\)", (folder / "SOURCES.md").read_text(encoding="utf-8")))
    assert {folder / "LICENSES" / path.name for path in (folder / "LICENSES").iterdir()} <= {
        folder / name for name in named
    }
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in named}
    assert "Apache License" in texts["../../LICENSE"]
    for name, text in texts.items():
        if "MIT" in name:
            assert (
                "Copyright (c) 20" in text and "The above copyright notice and this permission notice shall be" in text
            )
        if "ODC" in name:
            assert "Attribution License (ODC-By)" in text and "10.4" in text  # to its last part


@pytest.mark.parametrize("task", OWN)
def test_own_rows_are_none_of_the_real_ones(task: str, samples: Path, real_data: Path) -> None:
    benchmark = benchmarks.get(task)
    for split in benchmark.splits:
        try:
            mine, real = (benchmarks.load(benchmark, folder, split).rows for folder in (samples, real_data))
        except UserError:
            continue  # a split that one of the two has not
        asked = [
            {row.fields.get("question") or row.fields.get("instruction") or row.fields["text"] for row in rows}
            for rows in (mine, real)
        ]
        assert asked[0] and not asked[0] & asked[1]


def test_the_whole_sets_are_tested_by_one_command(root: Path, tmp_path: Path) -> None:
    said = subprocess.run(
        ["make", "-n", "test-data", f"DATA={tmp_path}"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    # inside of `make test` it says more than commands
    (command,) = (line for line in said.stdout.splitlines() if f'CURVELORA_DATA_DIR="{tmp_path}"' in line)
    named = {root / word for word in command.split() if word.endswith(".py")}
    tests = (root / "tests").rglob("test_*.py")
    assert named == {path for path in tests if "real_data: Path" in path.read_text(encoding="utf-8")}
    assert "make test-data DATA=D" in (root / "docs/tasks.md").read_text(encoding="utf-8")
