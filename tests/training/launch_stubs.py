"""A SLURM of stand-ins on PATH: commands that note their arguments and say what they are told to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

PARTITIONS = """\
main*|up|1-00:00:00|3|gpu:2|16
long|up|infinite|2|gpu:h100:4(S:0-1)|64
long|up|infinite|1|(null)|32
cpu|up|60:00|5|(null)|16
"""
NOTES = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >>{log}
"""


class Slurm:
    """Its commands lie in `folder`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin:/bin")
        self.says("sinfo", PARTITIONS)
        self.says("squeue", "")
        self.says("sbatch", "4711\n")

    def says(self, command: str, output: str, error: str = "", code: int = 0) -> None:
        """Have `command` print this and end with this code."""
        (self.folder / f"{command}.out").write_text(output)
        (self.folder / f"{command}.err").write_text(error)
        path = self.folder / command
        notes = NOTES.format(log=self.folder / f"{command}.log")
        path.write_text(f'{notes}cat "$0.out"\ncat "$0.err" >&2\nexit {code}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def remove(self, command: str) -> None:
        """As on a machine that has no such command."""
        (self.folder / command).unlink()

    def heard(self, command: str) -> list[str]:
        """The arguments of all calls, one after another."""
        log = self.folder / f"{command}.log"
        return log.read_text().splitlines() if log.is_file() else []
