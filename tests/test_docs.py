"""Documents stay true: the recipe reference, the README's table and its commands, the links."""

from __future__ import annotations

import json
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


def test_numbers_in_the_lab_s_prose_are_those_of_its_files(root: Path) -> None:
    text = " ".join((root / "docs/sinter_lab.md").read_text(encoding="utf-8").split())
    kept = root / "docs/results/lab"

    def read(name: str) -> dict:
        return json.loads((kept / name).read_text(encoding="utf-8"))

    costs = [read(f"step_llama2_{size}_h100.json")["arms"] for size in ("7b", "13b")]
    back = [cost["loran:identity"]["phases"]["backward"]["median"] for cost in costs]
    assert f"goes from {back[0]:.2f} to {back[1]:.2f} s, {back[1] / back[0]:.1f} times" in text
    step = [{arm: cost[arm]["step_seconds"]["median"] for arm in cost} for cost in costs]
    extra = [(s["loran:sinter"] - s["loran:identity"]) / (s["loran:sinter"] - s["qlora"]) for s in step]
    assert extra == pytest.approx([1 / 3, 1 / 4], abs=0.03) and "a third of the extra time at 7B and a quarter" in text
    cheaper = [round(100 * (1 - cost["ranlora"]["overhead"]["ratio"])) for cost in costs]
    assert f"by {min(cheaper)} to {max(cheaper)} %" in text
    dearer = [round(100 * (cost["aurora"]["overhead"]["ratio"] - 1)) for cost in costs]
    layers = [layer["arms"] for layer in read("layer_h100.json")["layers"]]
    single = [round(100 * (layer["aurora"]["overhead"]["ratio"] - 1)) for layer in layers]
    assert f"{min(dearer)} to {max(dearer)} % dearer and its single layers {min(single)} to {max(single)} %" in text
    assert f"it is {layers[0]['ranlora']['overhead']['ratio']:.1f} times dearer" in text

    runs = read("minilm/results.json")["runs"]
    large, plain = ([run["sharpness"]["value"] for run in runs[a].values()] for a in ("loran:sinter-large", "qlora"))
    a, b, c = sorted(large)
    assert f"({a:.0f}, {b:.0f} and {c:.0f} against {min(plain):.1f} to {max(plain):.1f})" in text
    times = [x / y for x, y in zip(large, plain, strict=True)]
    assert f"is {round(min(times), -1):.0f} to {round(max(times), -1):.0f} times QLoRA's" in text

    sweep = read("minilm_sweep/sweep.json")
    base, by_product = sweep["baseline"]["heldout_loss"], {}
    for cell in sweep["cells"]:
        product = round(cell["values"]["amplitude"] * cell["values"]["frequency"], 9)
        by_product.setdefault(product, []).append(cell["heldout_loss"])
    assert f"held-out loss of {base:.3f}" in text and min(map(min, by_product.values())) > base - 2e-4
    small = [loss for product, losses in by_product.items() if product <= 10 for loss in losses]
    assert max(abs(loss - base) for loss in small) <= 2e-4 and "no cell differs by more than 2e-4" in text
    means = {product: sum(losses) / len(losses) for product, losses in by_product.items()}
    assert f"at 100 it is {means[100]:.3f}, at 1,000 {means[1000]:.3f}, at 10,000 {means[10000]:.3f}" in text


@pytest.mark.parametrize("page", ["README.md", "docs/sinter_lab.md"])
def test_numbers_of_the_lab_are_those_of_its_files(root: Path, page: str) -> None:
    text = (root / page).read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert text == rendered(text, root / "docs/results/lab"), (
        "write it again: python -m curvelora_eval.lab.record README.md docs/sinter_lab.md"
    )
