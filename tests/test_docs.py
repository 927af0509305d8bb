"""Documents stay true: the recipe reference, the README's table and its commands, the links."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from curvelora_eval.lab.record import BLOCK, rendered
from curvelora_training.demo import ARMS, MARKS
from curvelora_training.reference import reference

BIN = Path(sys.executable).parent


def commands(readme: str) -> list[str]:
    """Every command line of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_recipe_reference_is_what_the_code_says(root: Path) -> None:
    assert (root / "docs/recipes.md").read_text(encoding="utf-8") == reference(), (
        "write it again: python -m curvelora_training.reference > docs/recipes.md"
    )


def test_the_readme_table_is_the_recorded_one(root: Path) -> None:
    block = (root / "README.md").read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0].strip()
    report = (root / "docs/results/demo/report.md").read_text(encoding="utf-8")
    assert block == "\n".join(line for line in report.splitlines() if line.startswith("|"))
    titles = [line.split(" | ")[0].removeprefix("| ") for line in block.splitlines()[2:]]
    assert titles == [title for title, _ in ARMS.values()], "record the demo again, with --record docs/results/demo"


def test_links_in_documents_lead_somewhere(root: Path) -> None:
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture(scope="module")
def workplace(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a user sees it, with a runs/ of its own."""
    place = tmp_path_factory.mktemp("readme")
    for name in (
        "adapters",
        "eval",
        "training",
        "tests",
        "ds_configs",
        "docs",
        "Makefile",
        *root.glob("requirements*.txt"),
    ):
        (place / Path(name).name).symlink_to(root / name)
    from curvelora_training.demo import export_minilm

    (place / ".models").mkdir()
    export_minilm(place / ".models/minilm")
    return place


def test_every_command_of_the_readme_runs(root: Path, workplace: Path) -> None:
    """In order, as shown. `make` targets are asked what they would do: this test is itself part of one of them."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    shown = commands((root / "README.md").read_text(encoding="utf-8"))
    assert {"make demo", "make lab", "make test"} <= set(shown)
    for line in shown:
        command = shlex.split(line)
        if command[0] == "make":
            command.insert(1, "--dry-run")
        done = subprocess.run(
            command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
    assert (workplace / "runs/mine/evaluation.json").is_file()
    assert (workplace / "runs/mine-report/report.html").is_file()
    assert (workplace / "runs/mine-merged/merge.json").is_file()
    assert (workplace / "runs/bench/layer.json").is_file() and (workplace / "runs/bench/step.json").is_file()
    page = (workplace / "runs/small-lab/report.html").read_text(encoding="utf-8")
    assert "small-sweep/sweep.json" in page


@pytest.mark.parametrize("page", ["README.md", "docs/sinter_lab.md"])
def test_numbers_of_the_lab_are_those_of_its_files(root: Path, page: str) -> None:
    text = (root / page).read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert text == rendered(text, root / "docs/results/lab"), (
        "write it again: python -m curvelora_eval.lab.record README.md docs/sinter_lab.md"
    )
