"""MiniLM fine-tuned on small tasks of GLUE with LoRA and LoRAN, then scored side by side through `curvelora eval`.

    python -m curvelora_training.minilm_glue --data-dir data --out runs/minilm_glue

Every run is the recipe minilm_glue.yaml with another task or method, in a process of its own. A run in --out that is complete is
not trained again, whatever its settings were, and one that was stopped begins anew: the command goes on where it was. Scores that
lie side by side are no comparison: `curvelora compare` with two folders of OUT/scores/TASK says whether the rows tell them apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from curvelora.cli import run_guarded
from curvelora.errors import UserError, nearest
from curvelora_training.demo import MODEL, export_minilm
from curvelora_training.recipes import find

# task -> what differs from the recipe beside the task's name
TASKS: dict[str, list[str]] = {
    "mrpc": [],
    "rte": [],
    "cola": [],
    # a frozen pooler that was never trained (see the recipe) keeps the loss at the variance of the scores
    "stsb": ["task.kind=regression", "adapter.modules_to_save=[pooler]"],
    "sst2": [],
}
# method -> what differs from the recipe; Sinter at the published 5e-5 cannot be told from LoRA here
METHODS: dict[str, list[str]] = {
    "lora": ["adapter.method=lora"],
    "loran": ["adapter.method=loran", "adapter.amplitude=2e-2"],
}


def train(out: Path, data: Path, task: str, method: str, overrides: list[str]) -> Path:
    """Train one task with one method, unless that is done; returns the run's folder.

    Raises:
        UserError: the training failed, and has said why.
    """
    run = out / method / task
    if (run / "result.json").is_file():
        print(f"{run} is complete", flush=True)
        return run
    rows = [
        f"data.{part}.{key}={value}" for part in ("train", "test") for key, value in (("path", data), ("task", task))
    ]
    settings = [f"name=MiniLM {task} {method}", f"output={run}", *rows, *TASKS[task], *METHODS[method], *overrides]
    command = [sys.executable, "-m", "curvelora_training.finetune", "--overwrite", "--config", str(find("minilm_glue"))]
    if subprocess.run([*command, *settings], check=False).returncode != 0:
        raise UserError(f"the training of {task} with {method} failed, as said above")
    return run


def score(out: Path, data: Path, task: str, runs: list[Path]) -> None:
    """Score the adapters of one task side by side, into OUT/scores/TASK.

    Raises:
        UserError: the evaluation failed, and has said why.
    """
    adapters = [word for run in runs for word in ("--adapter", str(run / "adapter"))]
    command = [sys.executable, "-m", "curvelora.cli", "eval", "--task", task, "--data-dir", str(data), *adapters]
    if subprocess.run([*command, "--out", str(out / "scores" / task)], check=False).returncode != 0:
        raise UserError(f"the evaluation of {task} failed, as said above")


def run_all(out: Path, data: Path, tasks: list[str], methods: list[str], overrides: list[str]) -> int:
    """Train and score everything that is asked for.

    Raises:
        UserError: an unknown task or method, or a step that failed.
    """
    for names, known in ((tasks, TASKS), (methods, METHODS)):
        for name in names:
            if name not in known:
                raise UserError(f"{name!r} is not run here{nearest(name, known)}: {', '.join(known)} are")
    export_minilm(MODEL)
    for task in tasks:
        score(out, data, task, [train(out, data, task, method, overrides) for method in methods])
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m curvelora_training.minilm_glue`."""
    parser = argparse.ArgumentParser(
        prog="curvelora_training.minilm_glue", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the tasks' rows")
    parser.add_argument("--out", type=Path, default=Path("runs/minilm_glue"), help="default runs/minilm_glue")
    parser.add_argument("--task", default=",".join(TASKS), help="comma-separated (default all)")
    parser.add_argument("--method", default=",".join(METHODS), help="comma-separated (default both)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe values for every run")
    args = parser.parse_intermixed_args(argv)
    tasks, methods = args.task.split(","), args.method.split(",")
    return run_guarded(lambda: run_all(args.out, args.data_dir, tasks, methods, args.overrides))


if __name__ == "__main__":
    sys.exit(main())
