"""`curvelora sweep`: one arm over a grid of options, each cell a run like those of a comparison."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora.registry import METHODS
from curvelora_eval.files import write_json
from curvelora_eval.lab.report import write_sweep_report
from curvelora_training.bench.arms import FULL, Arm, named_arm
from curvelora_training.bench.compare import SWEEP, measured_in, open_folder, stability_beside
from curvelora_training.bench.pool import DONE, WHOLE, Job, Share, check_jobs, jobs_of, run_all
from curvelora_training.bench.processes import barrier, join
from curvelora_training.bench.settings import LabSettings
from curvelora_training.distributed import leave, rank

REFERENCES = ("qlora", "loran:identity")  # the first is the baseline; both run beside the grid
STABLE = ("residual_std", "paired_residual_std", "spikes", "last_loss")
PRESENT = ("resolvability_forward", "resolvability_derivative", "output_ratio", "std_u")


def sweep_arms(method: str, axes: dict[str, list]) -> list[Arm]:
    """The references, then an arm for every cell of the grid. Raises `UserError` for values that the method refuses."""
    start = named_arm(method)
    arms, problems = _references(axes), []
    for values in itertools.product(*axes.values()):
        cell = dict(zip(axes, values, strict=True))
        options = {("r" if axis == "rank" else axis): value for axis, value in cell.items() if axis != "learning_rate"}
        try:
            _check(start, options)
        except UserError as error:
            problems.append(str(error))
        name = ",".join(
            f"{axis}={value:g}" if isinstance(value, float) else f"{axis}={value}" for axis, value in cell.items()
        )
        arms.append(
            dataclasses.replace(
                start,
                key=f"{method},{name}",
                label=name,
                options=start.options | options,
                learning_rate=cell.get("learning_rate"),
            )
        )
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return arms


def _references(axes: dict[str, list]) -> list[Arm]:
    """The references, at every rank and rate of the grid: another rank or rate is another baseline."""
    ranks, rates = axes.get("rank", [None]), axes.get("learning_rate", [None])
    arms = []
    for r, rate in itertools.product(ranks, rates):
        tail = "".join(
            f",{name}={value}" for name, value in (("rank", r), ("learning_rate", rate)) if value is not None
        )
        for name in REFERENCES:
            arm = named_arm(name)
            options = arm.options | ({} if r is None else {"r": r})
            arms.append(
                dataclasses.replace(arm, key=name + tail, label=arm.label + tail, options=options, learning_rate=rate)
            )
    return arms


def _check(arm: Arm, options: dict[str, Any]) -> None:
    if arm.method != FULL:
        METHODS[arm.method].build_config(**arm.options | options)
    elif options:
        raise UserError(
            f"full fine-tuning has no {', '.join(options)} to vary: vary --learning-rates, or name a method"
        )


def sweep(
    settings: LabSettings,
    axes: dict[str, list],
    out: Path,
    resume: bool,
    overwrite: bool,
    jobs: int,
    share: Share = WHOLE,
) -> int:
    """Make every run and write sweep.json and report.html; returns 1 where a run failed.

    Args:
        share: make only these runs; the share that finds all runs made, its own and the others', writes the report.

    Raises:
        UserError: as `compare` does for its folder.
    """
    check_jobs(jobs)
    join()
    if rank() == 0:
        open_folder(out, settings, resume, overwrite)
    barrier()
    failed = run_all(settings, out, jobs, share=share)
    if rank() == 0:
        every = jobs_of(settings)
        missing = [job.folder for job in every if not (out / job.folder / DONE).is_file()]
        if share == WHOLE or not missing:
            write_json(out / SWEEP, gather_sweep(settings, axes, out))
            print(f"results: {out / SWEEP}\nreport:  {write_sweep_report(out)}")
        else:
            print(f"share {share[0]} of {share[1]} is through; {len(missing)} of {len(every)} runs are not made yet")
        if failed:
            print(f"{len(failed)} of {len(every)} runs failed: {', '.join(failed)}; --resume makes them again")
    leave()
    return 1 if failed else 0


def gather_sweep(settings: LabSettings, axes: dict[str, list], out: Path) -> dict[str, Any]:
    """The record of sweep.json."""
    references, cells = {}, []
    known = {arm.key for arm in _references(axes)}
    for job in jobs_of(settings):
        found = _cell(job, out, settings)
        if job.arm.key in known:
            references.setdefault(job.arm.key, []).append(found)
            continue
        options = job.arm.options | {"learning_rate": job.arm.learning_rate, "rank": job.arm.options.get("r")}
        cells.append({"values": {axis: options[axis] for axis in axes}, **found})
    return {
        "schema": 1,
        "kind": "sweep",
        "settings": {k: v for k, v in settings.as_dict().items() if k != "arms"},
        "environment": measured_in(out, settings, None),
        "axes": axes,
        "baseline": _mean(references[settings.baseline]),
        "references": references,
        "cells": cells,
    }


def _twin(arm: Arm, settings: LabSettings) -> Arm:
    """The baseline of this arm: the first reference at its rank and its rate."""
    own = arm.options.get("r"), arm.learning_rate
    references = (a for a in settings.arms if a.key.split(",")[0] == REFERENCES[0])
    return next((a for a in references if (a.options.get("r"), a.learning_rate) == own), settings.arms[0])


def _mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every number over the seeds that have it; None where none has."""
    keys = [key for key, value in runs[0].items() if key not in ("seed", "folder", "status", "diverged")]
    values = {key: [run[key] for run in runs if isinstance(run.get(key), int | float)] for key in keys}
    return {key: sum(found) / len(found) if found else None for key, found in values.items()}


def _cell(job: Job, out: Path, settings: LabSettings) -> dict[str, Any]:
    empty = dict.fromkeys(("heldout_loss", "heldout_accuracy", *STABLE, *PRESENT))
    record: dict[str, Any] = {"seed": job.seed, "status": "missing", "diverged": False, "folder": job.folder, **empty}
    path = out / job.folder / DONE
    if not path.is_file():
        return record
    run = json.loads(path.read_text(encoding="utf-8"))
    stable = stability_beside(out, job, _twin(job.arm, settings))
    presence = run.get("presence") or {}
    return record | {
        "status": run["status"],
        "diverged": bool(run["status"] == "diverged" or stable["diverged"]),
        "heldout_loss": run["heldout"]["loss"],
        "heldout_accuracy": run["heldout"]["accuracy"],
        **{key: stable[key] for key in STABLE},
        "resolvability_forward": presence.get("forward"),
        "resolvability_derivative": presence.get("derivative"),
        "output_ratio": (presence.get("output_ratio") or {}).get("exact"),
        "std_u": presence.get("std_u"),
    }
