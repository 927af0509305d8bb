"""Make the cells that are missing, in slices of time, and keep a record of each as a file.

DIR/cells/NAME.json      a finished cell: what came of it, and how far it is from one process
DIR/runs/NAME/           its run folder, without checkpoints; NAME.refused where it was refused
DIR/logs/                what the launchers printed
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.files import make_folder, write_json
from curvelora_training.matrix.cells import ALONE, Cell, Refusal, bounds, default_targets, refusal
from curvelora_training.matrix.compare import compare
from curvelora_training.matrix.ground import lay_ground
from curvelora_training.matrix.launch import command_line, tail, torchrun, watch
from curvelora_training.matrix.worker import BEGINS, ENDS
from curvelora_training.run_folder import RunFolder

WORKER = "curvelora_training.matrix.worker"
SILENCE = 300  # seconds without output after which a cell is taken to hang; compilers and first collectives are slow
AGREES, DIFFERS, REFUSED, FAILED = "agrees", "differs", "refused", "failed"
FINE = (AGREES, REFUSED)


@dataclass
class Matrix:
    """Where the cells are made and how.

    Args:
        out: folder of the matrix.
        configs: folder of the engines' configuration files, as `ds_configs`.
        recipes: task -> recipe.
        targets: task -> modules to adapt; PEFT's default where None.
        until: seconds since the epoch after which nothing begins.
        say: is told of progress.
        commit: is kept with every cell that this object makes.
    """

    out: Path
    processes: int
    configs: Path
    recipes: dict[str, Path]
    targets: dict[str, list[str] | None]
    until: float = math.inf
    say: Callable[[str], None] = print
    commit: str | None = None

    def make(self, cells: list[Cell]) -> None:
        """Make what is missing of `cells`, and of the cells of one process that they are compared with, until time is up."""
        self.out = self.out.resolve()
        for name in ("cells", "runs", "logs"):
            make_folder(self.out / name)
        missing = [cell for cell in cells if self.record(cell) is None]
        trained = [cell for cell in missing if refusal(cell) is None]
        alone = [
            c for c in dict.fromkeys(cell.alone for cell in trained) if self.record(c) is None and not self._ran(c)
        ]
        refused = [cell for cell in missing if refusal(cell) is not None]
        if refused or alone:
            self.say(f"one process: {len(refused)} refusals and {len(alone)} runs to compare with")
            self._group([*refused, *alone], [sys.executable])
        here = [c for c in trained if c.launcher is None and not self._ran(c) and self._ran(c.alone)]
        if here:
            self.say(f"{self.processes} processes: {len(here)} cells")
            self._group(here, torchrun(self.processes))
        for cell in trained:
            if cell.launcher is not None and time.time() < self.until and self._ran(cell.alone):
                self._launch(cell)
            self._finish(cell)

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a finished cell, or None."""
        path = self._record_path(cell)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def run(self, cell: Cell) -> Path:
        """Run folder of the cell."""
        return self.out / "runs" / cell.name

    def forget(self, cells: list[Cell]) -> None:
        """Drop the records and runs of these cells and of those that they are compared with."""
        for cell in {*cells, *(cell.alone for cell in cells)}:
            self._record_path(cell).unlink(missing_ok=True)
            self._refused_path(cell).unlink(missing_ok=True)
            shutil.rmtree(self.run(cell), ignore_errors=True)

    def _group(self, cells: list[Cell], launcher: list[str]) -> None:
        """Run `cells` in one process group; where one takes the group down, it has failed and the rest goes on in another."""
        waiting = {cell.name: cell for cell in cells}
        while waiting and time.time() < self.until:
            jobs = self.out / "jobs.json"
            until = None if math.isinf(self.until) else self.until
            write_json(jobs, {"until": until, "cells": [self._job(cell) for cell in waiting.values()]})
            current: list[str] = []

            def line(text: str, current: list[str] = current) -> None:
                if text.startswith(BEGINS):
                    current[:] = [text.removeprefix(BEGINS)]
                elif text.startswith(ENDS):
                    cell = waiting.pop(current.pop())
                    self._ended(cell)
                    status = (self.record(cell) or {"status": "made"})["status"]
                    self.say(f"  {cell.name}: {status} ({len(waiting)} left)")

            log = self.out / "logs" / ("one.log" if launcher == [sys.executable] else "group.log")
            code = watch([*launcher, "-m", WORKER, str(jobs)], log, self.configs.parent, SILENCE, line)
            if code == 0 or not waiting:
                return
            if not current:
                raise UserError(f"the process group came to nothing; its output is in {log}:\n{tail(log)}")
            why = "it hung" if code is None else tail(log)
            self._keep(waiting.pop(current[0]), FAILED, {"why": why})

    def _job(self, cell: Cell) -> dict[str, Any]:
        self._refused_path(cell).unlink(missing_ok=True)
        return {
            "name": cell.name,
            "recipe": str(self.recipes[cell.task]),
            "overrides": self._overrides(cell),
            "environment": cell.environment,
            "output": str(self.run(cell)),
            "trains": refusal(cell) is None,
        }

    def _launch(self, cell: Cell) -> None:
        """Start the module itself, as a user does."""
        self.say(f"  {cell.name}")
        command = command_line(cell.launcher or "torchrun", cell.engine, self.configs, self.processes)
        # with Accelerate its file names the engine, and the recipe is silent
        overrides = [o for o in self._overrides(cell) if cell.launcher != "accelerate" or "deepspeed" not in o]
        arguments = ["--config", str(self.recipes[cell.task]), f"output={self.run(cell)}", "--overwrite", *overrides]
        log = self.out / "logs" / f"{cell.name}.log"
        code = watch([*command, *arguments], log, self.configs.parent, SILENCE, lambda _: None)
        if code != 0:
            self._keep(cell, FAILED, {"why": "it hung" if code is None else tail(log)})

    def _overrides(self, cell: Cell) -> list[str]:
        return cell.overrides(str(self.configs), self.processes, self.targets[cell.task])

    def _ended(self, cell: Cell) -> None:
        """Write the record of a cell that a group has made; those of one process have none, as nothing is asked of them."""
        if rule := refusal(cell):
            self._finish_refused(cell, rule)
        elif cell.engine != ALONE:
            self._finish(cell)

    def _finish(self, cell: Cell) -> None:
        """Write the record of a cell that has run, or that was refused without being expected to."""
        if self.record(cell) is not None:
            return
        for run in (cell, cell.alone):
            if self._refused_path(run).is_file():
                self._keep(cell, FAILED, {"why": f"{run.name}: {self._refused_path(run).read_text(encoding='utf-8')}"})
                return
        if (failed := self.record(cell.alone)) is not None:
            self._keep(cell, FAILED, {"why": f"{cell.alone.name}: {failed['why']}"})
            return
        if not (self._ran(cell) and self._ran(cell.alone)):
            return
        measured, wrong = compare(cell, self.run(cell), self.run(cell.alone), self.processes)
        result = json.loads((self.run(cell) / "result.json").read_text(encoding="utf-8"))
        measured = {key: value if math.isfinite(value) else None for key, value in measured.items()}
        detail = {"measured": measured, "bounds": dataclasses.asdict(bounds(cell)), "engine_used": result["engine"]}
        self._keep(cell, DIFFERS if wrong else AGREES, detail | {"why": "; ".join(wrong) or None})

    def _finish_refused(self, cell: Cell, rule: Refusal) -> None:
        """Write the record of a cell that had to be refused: that it was, and in the words that are expected."""
        path = self._refused_path(cell)
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        if text is not None and rule.said in text:
            self._keep(cell, REFUSED, {"why": text})
        else:
            self._keep(cell, FAILED, {"why": f"nothing refused it ({rule.why})" if text is None else text})

    def _keep(self, cell: Cell, status: str, detail: dict[str, Any]) -> None:
        write_json(
            self._record_path(cell), dataclasses.asdict(cell) | {"status": status, "commit": self.commit} | detail
        )
        if status not in FINE:
            self.say(f"  {cell.name} {status}: {str(detail['why']).strip().splitlines()[-1]}")

    def _ran(self, cell: Cell) -> bool:
        return RunFolder(self.run(cell)).is_complete()

    def _record_path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.name}.json"

    def _refused_path(self, cell: Cell) -> Path:
        return self.out / "runs" / f"{cell.name}.refused"


def open_matrix(
    out: Path,
    processes: int,
    configs: Path,
    tasks: list[str],
    *,
    model: str | None = None,
    data: str | None = None,
    targets: list[str] | None = None,
    seed: int = 42,
) -> tuple[Matrix, dict[str, Any]]:
    """(The matrix in `out`, its settings). What an earlier call has made there is kept.

    Raises:
        UserError: `out` holds a matrix of other settings, or the text is too short.
    """
    settings = {"processes": processes, "model": model, "data": data, "targets": targets, "seed": seed}
    kept = out / "matrix.json"
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        differs = [f"{k} was {before.get(k)}, now {v}" for k, v in settings.items() if before.get(k) != v]
        if differs:
            raise UserError(
                f"{out} holds a matrix of other settings ({'; '.join(differs)}): name another folder, or add --overwrite"
            )
    make_folder(out)
    write_json(kept, settings)
    recipes = lay_ground(out / "ground", tasks, model, data, processes, seed)
    adapted = {task: targets or default_targets(task, model) for task in tasks}
    return Matrix(out, processes, configs.resolve(), recipes, adapted), settings
