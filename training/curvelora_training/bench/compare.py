"""`curvelora bench compare`: cost first, then every arm with every seed, then one record and one page of it all.

The folder: lab.json (settings), cost.json, runs/ARM/seed-N/ (see `single`), results.json, report.html.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from curvelora.errors import UserError
from curvelora_eval.environment import describe_environment
from curvelora_eval.files import make_folder, write_json
from curvelora_eval.lab.folder import read_record
from curvelora_eval.lab.path import pca_paths
from curvelora_eval.lab.report import write_lab_report
from curvelora_eval.lab.stability import pool, stability
from curvelora_eval.lab.statistics import over_seeds
from curvelora_eval.lab.verdict import verdict
from curvelora_training.bench.arms import Arm
from curvelora_training.bench.cost import measure_steps, table
from curvelora_training.bench.ground import Ground, build_ground
from curvelora_training.bench.interleave import Rounds
from curvelora_training.bench.pool import DONE, FAILED, SETTINGS, Job, check_jobs, jobs_of, run_all
from curvelora_training.bench.processes import barrier, join, say
from curvelora_training.bench.settings import LabSettings
from curvelora_training.distributed import leave, rank

COST, RESULTS, SWEEP = "cost.json", "results.json", "sweep.json"
CONTENTS = (SETTINGS, COST, "runs", "workers", RESULTS, SWEEP, "report.html")
# of run.json, in results.json
KEPT = ("status", "steps", "seconds", "trainable_parameters", "heldout")
KEPT += ("presence", "sharpness", "spectra", "approximation")
# what may differ between the comparison that DIR holds and the one that continues it
FREE = ("title", "seeds")
PATHS = ("model", "recipe", "data")


def compare(
    settings: LabSettings,
    out: Path,
    rounds: Rounds | None,
    update_std: float,
    resume: bool,
    overwrite: bool,
    jobs: int,
    sweep: Path | None,
) -> int:
    """Make the whole comparison in `out`; returns the exit code, 1 where a run failed.

    Args:
        rounds: how to measure the cost; None leaves it out.
        update_std: standard deviation of BA's entries while measuring.
        jobs: runs at a time on each device.

    Raises:
        UserError: `out` holds a comparison and neither `resume` nor `overwrite` was asked for, or another one than this.
    """
    device = join()
    check_jobs(jobs)
    if rank() == 0:
        open_folder(out, settings, resume, overwrite)
    barrier()
    ground: Ground | None = None
    if rounds is not None and not cost_is_there(out, settings, rounds):
        ground = build_ground(settings, device)
        say(f"{settings.model} ({settings.base}) ready in {ground.seconds:.1f} s; timing {len(settings.arms)} arms")
        for record in measure_steps(ground, rounds, update_std, say):
            if rank() == 0:  # after every round: what was measured is kept
                write_json(out / COST, record)
        if rank() == 0:
            print(table(record))
    if jobs > 1 and ground is not None:
        ground = None  # the workers need the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    failed = run_all(settings, out, jobs, ground) if settings.steps else []
    if rank() == 0:
        page = gather(out, sweep)
        for sentences in json.loads((out / RESULTS).read_text(encoding="utf-8"))["verdict"].values():
            for sentence in sentences:
                print(f"- {sentence}")
        print(f"results: {out / RESULTS}\nreport:  {page}")
        if failed:
            print(
                f"{len(failed)} of {len(jobs_of(settings))} runs failed: {', '.join(failed)}; --resume makes them again"
            )
    leave()
    return 1 if failed else 0


def cost_is_there(out: Path, settings: LabSettings, rounds: Rounds) -> bool:
    """Whether every arm was timed already, together with the others, and in as many rounds as are asked for."""
    path = out / COST
    if not path.is_file():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["rounds"] >= rounds.rounds and all(arm.key in record["arms"] for arm in settings.arms)


def open_folder(out: Path, settings: LabSettings, resume: bool, overwrite: bool) -> None:
    """Make the folder, or take over what it holds. Raises `UserError` as `compare` does."""
    held = [name for name in CONTENTS if (out / name).exists()]
    if resume and overwrite:
        raise UserError("--resume keeps what there is and --overwrite replaces it: write one of them")
    if held and not (out / SETTINGS).is_file():
        raise UserError(
            f"{out} holds {', '.join(held)} but no {SETTINGS}, so it is no folder of these runs: name another --out"
        )
    if held and not (resume or overwrite):
        raise UserError(
            f"{out} holds a comparison already ({', '.join(held)}): add --resume to continue it, --overwrite to replace it, or "
            "name another --out"
        )
    if held and resume:
        before, now = LabSettings.read(out / SETTINGS).as_dict(), settings.as_dict()
        differing = [key for key in now if key not in (*FREE, "arms") and _differ(key, before[key], now[key])]
        kept = {arm["key"]: arm for arm in before["arms"]}
        differing += [f"arm {arm['key']}" for arm in now["arms"] if kept.get(arm["key"], arm) != arm]
        if before["arms"][0] != now["arms"][0]:
            differing.append("the baseline")
        if differing:
            raise UserError(
                f"{out} was started with other settings ({', '.join(differing)}), so it cannot be continued: name another --out"
            )
    make_folder(out)
    if overwrite and not resume:
        for name in held:
            target = out / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    write_json(out / SETTINGS, settings.as_dict())


def _differ(key: str, before: Any, now: Any) -> bool:
    """Whether a setting changed; a file may be named by another path."""
    if key in PATHS and before and now:
        return Path(before).resolve() != Path(now).resolve()
    return before != now


def gather(out: Path, sweep: Path | None = None) -> Path:
    """Write results.json and report.html from what the folder holds; returns the page.

    Raises:
        UserError: the folder holds no comparison.
    """
    if sweep is None and (out / RESULTS).is_file():  # a report that is written again keeps the map that it had
        earlier = json.loads((out / RESULTS).read_text(encoding="utf-8")).get("sweep")
        sweep = out / earlier if earlier and (out / earlier / SWEEP).is_file() else None
    if not (out / SETTINGS).is_file():
        raise UserError(
            f"{out} holds no comparison (there is no {SETTINGS} in it): name a folder of `curvelora bench compare`"
        )
    settings = LabSettings.read(out / SETTINGS)
    runs = read_runs(out, settings)
    cost = json.loads((out / COST).read_text(encoding="utf-8")) if (out / COST).is_file() else None
    results = {
        "schema": 1,
        "kind": "lab",
        "title": settings.title,
        "settings": settings.as_dict()
        | {
            "weights": "random" if settings.random else "pretrained",
            "dtype": "float32" if settings.base == "fp32" else "bfloat16",
            "sequence_length": settings.length,
            "data": "random tokens"
            if settings.random
            else settings.recipe or settings.data or "Shakespeare (with the package)",
            "baseline": settings.baseline,
        },
        "environment": measured_in(out, settings, cost),
        "arms": {
            arm.key: {
                "label": arm.label,
                "method": arm.method,
                "options": arm.options,
                "dtype": "float32" if arm.fp32 or settings.base == "fp32" else "bfloat16",
                "trainable_parameters": _trainable(runs, cost, arm.key),
            }
            for arm in settings.arms
        },
        "cost": cost,
        "runs": runs,
        "failed": failures(out, settings),
        "pooled": {key: pooled(list(found.values())) for key, found in runs.items() if found},
        "paths": paths(out, runs),
        "approximation": _approximation(runs),
        "sweep": None if sweep is None else os.path.relpath(sweep, out),
    }
    results["verdict"] = verdict(results, read_record(sweep, SWEEP, "sweep") if sweep else None)
    write_json(out / RESULTS, results)
    return write_lab_report(out, sweep)


def measured_in(out: Path, settings: LabSettings, cost: dict[str, Any] | None) -> dict[str, Any]:
    """The environment of the measurements, which a page that is written again elsewhere must not replace."""
    if cost is not None:
        return cost["environment"]
    records = (out / job.folder / DONE for job in jobs_of(settings))
    first = next((path for path in records if path.is_file()), None)
    return json.loads(first.read_text(encoding="utf-8"))["environment"] if first else describe_environment()


def failures(out: Path, settings: LabSettings) -> list[dict[str, Any]]:
    """The runs that have no result, and why."""
    found = []
    for job in jobs_of(settings):
        note = out / f"{job.folder}.{FAILED}"
        if settings.steps and not (out / job.folder / DONE).is_file():
            why = note.read_text(encoding="utf-8").splitlines()[0] if note.is_file() else "not finished"
            found.append({"arm": job.arm.key, "seed": job.seed, "why": why})
    return found


def read_runs(out: Path, settings: LabSettings) -> dict[str, dict[str, Any]]:
    """Arm -> seed -> what its run.json says, with the stability of its steps beside the baseline's of the same seed."""
    runs: dict[str, dict[str, Any]] = {}
    for job in jobs_of(settings):
        path = out / job.folder / DONE
        if not path.is_file():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        found = {key: record.get(key) for key in KEPT}
        if found["spectra"] and job.seed != settings.seeds[0]:  # layer by layer of one seed; run.json has the others
            found["spectra"] = {"types": found["spectra"]["types"], "layers": {}}
        runs.setdefault(job.arm.key, {})[str(job.seed)] = {
            "folder": job.folder,
            "stability": stability_beside(out, job, settings.arms[0]),
            **found,
        }
    return runs


def stability_beside(out: Path, job: Job, baseline: Arm) -> dict[str, Any]:
    """The stability of a run's steps, beside those of `baseline` with the same seed where there are any."""
    other = out / "runs" / baseline.slug / f"seed-{job.seed}" / "steps.jsonl"
    pair = read_lines(other) if job.arm.key != baseline.key and other.is_file() else None
    return stability(read_lines(out / job.folder / "steps.jsonl"), pair)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def pooled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with intervals, of one arm's runs."""
    found = pool([run["stability"] for run in runs])
    for name in ("loss", "accuracy"):
        values = [run["heldout"][name] for run in runs]
        if any(value is not None for value in values):
            found[f"heldout_{name}"] = over_seeds(values)
    if any(run["sharpness"] for run in runs):
        found["sharpness"] = over_seeds([run["sharpness"] and run["sharpness"]["value"] for run in runs])
    return found


def paths(out: Path, runs: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """PCA of dW over training: the runs of the first seed that all arms have, in common axes; None where nothing was sketched."""
    shared = [seed for seed in next(iter(runs.values()), {}) if all(seed in own for own in runs.values())]
    found: dict[str, tuple[list[int], Tensor]] = {}
    for arm, seeds in runs.items():
        path = out / seeds[shared[0]]["folder"] / "path.safetensors" if shared else None
        if path is not None and path.is_file():
            tensors = load_file(path)
            found[arm] = tensors["steps"].tolist(), tensors["sketches"]
    if len({sketches.shape[1] for _, sketches in found.values()}) != 1:
        return None
    result = pca_paths(found)
    return result | {"runs": {arm: {shared[0]: points} for arm, points in result.pop("paths").items()}}


def _trainable(runs: dict[str, dict[str, Any]], cost: dict[str, Any] | None, key: str) -> int | None:
    timed = (cost or {}).get("arms", {}).get(key)
    return next((found["trainable_parameters"] for found in (timed, *runs.get(key, {}).values()) if found), None)


def _approximation(runs: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    return next(
        (run["approximation"] for seeds in runs.values() for run in seeds.values() if run["approximation"]), None
    )
