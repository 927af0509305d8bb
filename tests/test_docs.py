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

from curvelora import METHODS, cli
from curvelora.methods_command import markdown
from curvelora_eval.lab.record import BLOCK, rendered
from curvelora_training.bench.engines_table import engines_table
from curvelora_training.demo import ARMS, MARKS
from curvelora_training.matrix.page import page
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


def test_the_distributed_matrix_is_the_recorded_one(root: Path) -> None:
    written = (root / "docs/distributed_matrix.md").read_text(encoding="utf-8")
    assert written == page(root / "docs/results/distributed"), "write it again: curvelora matrix --record NAME"


@pytest.mark.parametrize("file", ["engines_h100.json", "engines_h200.json", "engines_h200_x4.json"])
def test_the_table_of_the_engines_is_that_of_its_file(root: Path, file: str) -> None:
    records = json.loads((root / "docs/results" / file).read_text(encoding="utf-8"))["records"]
    page = (root / "docs/engines.md").read_text(encoding="utf-8")
    shown = page.split(f"<!-- engines: {file} -->\n")[1].split("\n<!-- end of engines -->")[0]
    assert shown == engines_table(records)


def test_what_the_text_makes_of_the_engines_table_is_so(root: Path) -> None:
    records = json.loads((root / "docs/results/engines_h100.json").read_text(encoding="utf-8"))["records"]
    page = (root / "docs/engines.md").read_text(encoding="utf-8")
    found = {(r["model"], r["base"], r["arm"], r["stage"], r["processes"]): r for r in records}
    ratios = [
        r["step_seconds"]["median"] / found[(*key[:3], 2, key[4])]["step_seconds"]["median"]
        for key, r in found.items()
        if key[3] == 3 and (*key[:3], 2, key[4]) in found and key[2] != "ranlora"
    ]
    assert "costs 0 to 4 % of a ZeRO-2 step" in page and (round(min(ratios), 2), round(max(ratios), 2)) == (1.0, 1.04)
    ways = [
        r["tokens_per_second_per_process"] / found[(*key[:3], 2, 1)]["tokens_per_second_per_process"]
        for key, r in found.items()
        if key[4] == 2 and (*key[:3], 2, 1) in found
    ]
    assert "keeps 0.97 to 1.00 of its throughput" in page and (round(min(ways), 2), round(max(ways), 2)) == (0.97, 1.0)
    newer = json.loads((root / "docs/results/engines_h200.json").read_text(encoding="utf-8"))["records"]
    large = sorted(round(r["tokens_per_second_per_process"]) for r in newer if r["model"] == "llama2-70b")
    assert f"(H200: {large[0]} to {large[-1]})" in page
    four = json.loads((root / "docs/results/engines_h200_x4.json").read_text(encoding="utf-8"))["records"]
    assert {len(r["step_seconds"]["all"]) for r in newer + four} == {20} and "on H200s all have 20" in page


def test_what_the_text_makes_of_four_gpus_is_so(root: Path) -> None:
    records = json.loads((root / "docs/results/engines_h200_x4.json").read_text(encoding="utf-8"))["records"]
    page = (root / "docs/engines.md").read_text(encoding="utf-8")
    keys = ("model", "base", "arm", "stage", "processes", "layers_keeping_products")
    rate = {tuple(r[key] for key in keys): r["tokens_per_second_per_process"] for r in records}

    def kept(arm: str, processes: int, stage: int = 2) -> float:
        return rate["llama2-7b", "nf4", arm, stage, processes, 0] / rate["llama2-7b", "nf4", arm, 2, 1, 0]

    q, n = ([f"{kept(arm, processes):.3f}" for processes in (2, 4)] for arm in ("qlora", "loran:sinter"))
    assert f"QLoRA {q[0]} and {q[1]}, LoRAN {n[0]} and {n[1]} under ZeRO-2" in page
    assert {round(kept(arm, 4, 3), 2) for arm in ("qlora", "loran:sinter")} == {0.97}
    step = {tuple(r[key] for key in keys): r["step_seconds"] for r in records}
    for arm, said in (("qlora", "for QLoRA"), ("loran:sinter", "for LoRAN")):
        three, two = (step["llama2-7b", "bf16", arm, stage, 4, 0]["median"] for stage in (3, 2))
        assert f"{said} ({three:.3f} to {two:.3f} s)" in page and f"{three / two:.2f}" == "1.04"
    times = step["llama2-7b", "bf16", "loran:sinter", 3, 4, 0]["all"]
    assert f"LoRAN's ZeRO-3 steps scatter from {min(times):.2f} to {max(times):.2f} s" in page
    large = {key[1::2]: rate[key] for key in rate if key[0] == "llama2-70b"}
    plain, three, two, bf16 = (
        f"{large[base, stage, layers]:,.0f}"
        for base, stage, layers in (("nf4", 3, 0), ("nf4", 3, 80), ("nf4", 2, 80), ("bf16", 3, 80))
    )
    assert f"at {plain} on four H200s" in page
    assert f"{three} in NF4 under ZeRO-3, {two} under ZeRO-2 and {bf16} in bf16 under ZeRO-3" in page


def test_links_in_documents_lead_somewhere(root: Path) -> None:
    for document in (root / "README.md", *(root / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def workplace(root: Path, place: Path, model: Path) -> Path:
    """The repository as a user sees it, with a runs/ of its own, and `model` where the demo's is."""
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
    (place / ".models").mkdir()
    (place / ".models/minilm").symlink_to(model)
    return place


def in_a_process(command: list[str], place: Path) -> tuple[int, str]:
    """-> exit code and what was said."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout[-1500:] + done.stderr[-1500:]


@pytest.mark.timeout(1800)  # of all commands; each has its own
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "whole"])
def test_every_command_of_the_readme_runs(
    root: Path,
    tmp_path: Path,
    whole: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In order, as shown. `make` targets are asked what they would do: this test is itself part of one of them.

    Importing the libraries takes most of a command's time, and the model the most of the rest. So `curvelora` is called in this
    process but for the first time, and a tiny model is where the demo's is; as a slow test, all is as with a user.
    """
    model = request.getfixturevalue("minilm") if whole else request.getfixturevalue("tiny_models")["bert"]
    place = workplace(root, tmp_path, model)
    monkeypatch.chdir(place)
    shown = commands((root / "README.md").read_text(encoding="utf-8"))
    assert {"make demo", "make lab", "make test"} <= set(shown)
    first = next(line for line in shown if line.startswith("curvelora "))
    for line in shown:
        command = shlex.split(line)
        if command[0] == "make":
            command.insert(1, "--dry-run")
        if command[0] == "curvelora" and line != first and not whole:
            code = cli.main(command[1:])
            captured = capsys.readouterr()
            said = captured.out[-1500:] + captured.err[-1500:]
        else:
            code, said = in_a_process(command, place)
        assert code == 0, f"{line}\n{said}"
    assert (place / "runs/mine/evaluation.json").is_file()
    assert (place / "runs/mine-report/report.html").is_file()
    assert (place / "runs/mine-merged/merge.json").is_file()
    assert (place / "runs/mine-as-lora/extract.json").is_file()
    assert (place / "runs/bench/layer.json").is_file() and (place / "runs/bench/step.json").is_file()
    page = (place / "runs/small-lab/report.html").read_text(encoding="utf-8")
    assert "small-sweep/sweep.json" in page


def test_numbers_in_the_lab_s_prose_are_those_of_its_files(root: Path) -> None:
    text = " ".join((root / "docs/sinter_lab.md").read_text(encoding="utf-8").split())
    kept = root / "docs/results/lab"

    def read(name: str) -> dict:
        return json.loads((kept / name).read_text(encoding="utf-8"))

    costs = [read(f"step_llama2_{size}_h100.json")["arms"] for size in ("7b", "13b", "70b")]
    back = [cost["loran:identity"]["phases"]["backward"]["median"] for cost in costs]
    assert f"goes from {back[0]:.2f} to {back[1]:.2f} s, {back[1] / back[0]:.1f} times" in text
    step = [{arm: cost[arm]["step_seconds"]["median"] for arm in cost} for cost in costs]
    extra = [(s["loran:sinter"] - s["loran:identity"]) / (s["loran:sinter"] - s["qlora"]) for s in step]
    assert extra == pytest.approx([1 / 3, 1 / 4, 2 / 5], abs=0.03)
    assert "a third of the extra time at 7B, a quarter at 13B and two fifths at 70B" in text
    sinter = [cost["loran:sinter"]["overhead"]["ratio"] for cost in costs]
    assert f"{sinter[1]:.1f} times at 13B, and {sinter[2]:.1f} times at 70B" in text and sinter[0] == pytest.approx(
        2, abs=0.05
    )
    cheaper = [round(100 * (1 - cost["ranlora"]["overhead"]["ratio"])) for cost in costs]
    assert f"by {min(cheaper)} to {max(cheaper)} %" in text
    dearer = [round(100 * (cost["aurora"]["overhead"]["ratio"] - 1)) for cost in costs]
    layers = [layer["arms"] for layer in read("layer_h100.json")["layers"]]
    single = [round(100 * (layer["aurora"]["overhead"]["ratio"] - 1)) for layer in layers]
    assert f"are {dearer[0]} % dearer at 7B, {dearer[1]} % at 13B and none at 70B" in text and dearer[2] <= 0
    assert f"its single layers {min(single)} to {max(single)} %" in text
    assert f"it is {layers[0]['ranlora']['overhead']['ratio']:.1f} times dearer" in text
    busy = read("step_llama2_7b_h100_busy_host.json")["arms"]
    shown = [busy[arm]["step_seconds"]["median"] for arm in ("qlora", "aurora")]
    assert f"step took {shown[0]:.2f} s and AuroRA's {shown[1]:.2f} s" in text

    runs = read("minilm/results.json")["runs"]
    large, plain = ([run["sharpness"]["value"] for run in runs[a].values()] for a in ("loran:sinter-large", "qlora"))
    a, b, c = sorted(large)
    assert f"({a:.0f}, {b:.0f} and {c:.0f} against {min(plain):.1f} to {max(plain):.1f})" in text
    times = [x / y for x, y in zip(large, plain, strict=True)]
    assert f"is {round(min(times), -1):.0f} to {round(max(times), -1):.0f} times QLoRA's" in text

    smollm2 = read("smollm2/results.json")
    runs, pooled = smollm2["runs"], smollm2["pooled"]
    large, plain = ([run["sharpness"]["value"] for run in runs[a].values()] for a in ("loran:sinter-large", "qlora"))
    times = [x / y for x, y in zip(large, plain, strict=True)]
    assert f"on SmolLM2 {round(min(times), -1):.0f} to {round(max(times), -1):.0f} times" in text
    assert f"in {sum(len(own) for own in runs.values())} runs of 2,000 steps" in text
    assert all(run["status"] == "completed" for own in runs.values() for run in own.values())
    assert all(own["spikes"]["mean"] == 0 for own in pooled.values())
    sharp = {arm: own["sharpness"]["mean"] for arm, own in pooled.items() if "sharpness" in own}
    ratios = [f"{sharp[arm] / sharp['qlora']:.0f}" for arm in ("aurora", "ranlora")]
    assert f"curvature is {ratios[0]} and {ratios[1]} times QLoRA's" in text
    loss = {arm: own["heldout_loss"]["mean"] for arm, own in pooled.items()}
    assert max(loss["ranlora"], loss["aurora"], loss["full"]) < loss["qlora"] < loss["loran:sinter-large"]

    base, by_product = grid(read("minilm_sweep/sweep.json"))
    assert f"beside {base:.3f}: up to 10 within 2e-4" in text
    assert max(abs(loss - base) for product in by_product if product <= 10 for loss in by_product[product]) <= 2e-4
    means = {product: sum(losses) / len(losses) for product, losses in by_product.items()}
    assert f"at 100 it is {means[100]:.3f}, at 1,000 {means[1000]:.3f}, at 10,000 {means[10000]:.3f}" in text

    sweep = read("smollm2_sweep/sweep.json")
    base, by_product = grid(sweep)
    assert (
        len(sweep["cells"]) == 36 and f"held-out loss beside QLoRA's {base:.3f}: up to a w = 10 within 0.0011" in text
    )
    assert max(abs(loss - base) for product in by_product if product <= 10 for loss in by_product[product]) <= 0.0011
    more = {product: sum(losses) / len(losses) - base for product, losses in by_product.items()}
    assert f"at 100 it is {more[100]:.3f} more, at 1,000 {more[1000]:.3f}, at 10,000 {more[10000]:.3f}" in text
    lowest = min(map(min, by_product.values())) - base
    assert f"the lowest cell is {-lowest:.4f} less" in text
    invisible = [cell["heldout_loss"] for cell in sweep["cells"] if cell["values"]["amplitude"] < 1e-4]
    assert max(abs(loss - base) for loss in invisible) >= -lowest
    assert not any(cell["diverged"] or cell["spikes"] for cell in sweep["cells"])
    visible = {cell["values"]["amplitude"] for cell in sweep["cells"] if cell["resolvability_forward"] > 0.09}
    assert min(visible) == 1e-3


def grid(sweep: dict) -> tuple[float, dict[float, list[float]]]:
    """The baseline's held-out loss, and those of the cells by the product of amplitude and frequency."""
    found: dict[float, list[float]] = {}
    for cell in sweep["cells"]:
        product = round(cell["values"]["amplitude"] * cell["values"]["frequency"], 9)
        found.setdefault(product, []).append(cell["heldout_loss"])
    return sweep["baseline"]["heldout_loss"], found


def test_times_of_the_singular_factors_are_those_of_their_files(root: Path) -> None:
    decisions, methods = (
        " ".join((root / "docs" / name).read_text(encoding="utf-8").split()) for name in ("decisions.md", "methods.md")
    )
    seconds = []
    for name, spectrum in (("decaying", "s_i = i^-1/2, rounded to bf16"), ("random", "Gaussian, bf16")):
        record = json.loads((root / f"docs/results/svd_factors_h100_{name}.json").read_text(encoding="utf-8"))
        assert record["totals"] == "measured" and record["shape"] == "llama3-8b" and "H100" in record["device"]
        assert all(case["proved"] == case["weights"] == 160 for case in record["cases"])
        by = {(case["end"], case["rank"]): case["total_seconds"] for case in record["cases"]}
        row = [by[end, r] for end in ("first", "last") for r in (2, 16)]
        assert f"| {spectrum} | {' | '.join(f'{value:.1f} s' for value in row)} |" in decisions
        seconds += row
    assert f"takes {min(seconds):.1f} to {max(seconds):.1f} s on one H100" in methods


def test_the_table_of_methods_is_the_registry_s(root: Path) -> None:
    text = (root / "docs/methods.md").read_text(encoding="utf-8")
    block = text.split("<!-- methods -->\n")[1].split("\n<!-- end of methods -->")[0]
    assert block == markdown([method.describe() for method in METHODS.values()])
    assert all(f"[{name}]" in text for name in METHODS if name != "pissa_rewritten_base"), "each has its definition"


def test_the_price_of_an_untouched_base_is_that_of_its_file(root: Path) -> None:
    text = " ".join((root / "docs/methods.md").read_text(encoding="utf-8").split())
    ratio = json.loads((root / "docs/results/residual_quantisation.json").read_text(encoding="utf-8"))["ratio"]
    pissa, milora, olora = ([f"{ratio[name][r]:.2f}" for r in ("16", "64")] for name in ("pissa", "milora", "olora"))
    assert f"is {pissa[0]} (r = 16) and {pissa[1]} (r = 64) of ours for PiSSA" in text
    assert f"{pissa[0]} (r = 16) and {pissa[1]} (r = 64) times this form's on MiniLM" in METHODS["pissa"].caveats[0]
    assert f"{olora[0]} and {olora[1]} for OLoRA, and {milora[0]} and {milora[1]} for MiLoRA" in text


@pytest.mark.parametrize("page", ["README.md", "docs/sinter_lab.md"])
def test_numbers_of_the_lab_are_those_of_its_files(root: Path, page: str) -> None:
    text = (root / page).read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert text == rendered(text, root / "docs/results/lab"), (
        "write it again: python -m curvelora_eval.lab.record README.md docs/sinter_lab.md"
    )
