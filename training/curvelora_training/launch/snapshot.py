"""What a job is made of, kept in its run folder: the script, the resolved recipe, and which code it ran.

launch/job.sbatch      as it was submitted
launch/recipe.yaml     the recipe with every default and every override
launch/code.json       sha256 of the packages' files, which preflight compares at every start; commit, branch and whether
                       there were changes; package versions where there is no repository
launch/code.diff       those changes, for `git apply` on that commit
launch/submitted.jsonl a line for each submission
"""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from curvelora_eval.environment import PACKAGES, installed_version
from curvelora_eval.files import make_folder, write_json, write_text
from curvelora_training.preflight.code import hash_of_code

LARGEST = (
    1 << 20
)  # bytes; an untracked file beyond, of another kind or in another place than these, is named in code.json only
PLACES = ("adapters/", "eval/", "training/", "launch/", "ds_configs/")  # of the code; elsewhere a file may hold secrets
CODE = {".py", ".yaml", ".yml", ".json", ".j2", ".sh", ".sbatch", ".toml"}
FOLDER, SCRIPT, RECIPE, SUBMITTED = "launch", "job.sbatch", "recipe.yaml", "submitted.jsonl"


def write_snapshot(run_folder: Path, script: str, recipe: str, here: Path = Path(__file__)) -> Path:
    """Write everything but submitted.jsonl; returns the script's path.

    Args:
        script: text of the batch script.
        recipe: the resolved recipe.
        here: a file of the code whose state is kept.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = make_folder(run_folder / FOLDER)
    record, diff = code_state(here)
    write_json(folder / "code.json", record | {"sha256": hash_of_code()})
    write_text(folder / "code.diff", diff)
    write_text(folder / RECIPE, recipe)
    return write_text(folder / SCRIPT, script)


def note_submission(run_folder: Path, **facts: Any) -> None:
    """Add a line to submitted.jsonl."""
    line = json.dumps({"time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), **facts})
    with (run_folder / FOLDER / SUBMITTED).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def submissions(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of submitted.jsonl, oldest first."""
    path = run_folder / FOLDER / SUBMITTED
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def code_state(here: Path) -> tuple[dict[str, Any], str]:
    """The record of code.json and the text of code.diff.

    Args:
        here: a file of the package; the repository is the one that tracks it.
    """
    record: dict[str, Any] = {"schema": 1, "commit": None, "branch": None, "dirty": None}
    record |= {"versions": {name: found for name in PACKAGES if (found := installed_version(name))}}
    # an installed copy may lie inside somebody else's repository (a virtual environment in a project folder)
    if not _git(here.parent, "ls-files", "--", here.name):
        return record | {"why": "the package does not lie in a git repository: its version is all that is known"}, ""
    top = Path((_git(here.parent, "rev-parse", "--show-toplevel") or "").strip())
    diff = _git(top, "diff", "--binary", "HEAD") or ""
    left_out = []
    for name in filter(None, (_git(top, "ls-files", "--others", "--exclude-standard", "-z") or "").split("\0")):
        path = top / name
        if name.startswith(PLACES) and path.suffix in CODE and path.is_file() and path.stat().st_size <= LARGEST:
            diff += _git(top, "diff", "--binary", "--no-index", "--", "/dev/null", name) or ""
        else:
            left_out.append(name)
    record |= {
        "commit": (_git(top, "rev-parse", "HEAD") or "").strip(),
        "branch": (_git(top, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "dirty": bool(diff or left_out),
        "left_out": left_out,
    }
    return record, diff


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git, no repository or no commit. 1 is diff's code for a difference."""
    if arguments[0] == "diff":  # whatever the user's settings are, `git apply` has to read it
        arguments = ("diff", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", *arguments[1:])
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace") if done.returncode in (0, 1) else None
