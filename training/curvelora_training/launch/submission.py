"""Submit what was planned: the run, and the job that scores its adapter afterwards."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from pathlib import Path

from curvelora_eval.files import make_folder, write_text
from curvelora_training.launch.cluster import submit
from curvelora_training.launch.job import Job
from curvelora_training.launch.plan import Plan
from curvelora_training.launch.render import render
from curvelora_training.launch.snapshot import FOLDER, note_submission, write_snapshot


def submit_all(planned: Plan, evaluate: str | None) -> int:
    """Write the run folder's part, submit the run, and its evaluation where one is asked for."""
    folder = make_folder(Path(planned.job.output))
    make_folder(folder / "logs")  # SLURM opens its own log there before the script begins
    script = write_snapshot(folder, render(planned.job), planned.recipe.as_yaml())
    job = planned.job
    number = submit(script, job)
    facts = {"nodes": job.nodes, "processes": job.world_size, "launcher": job.launcher, "engine": job.engine}
    note_submission(folder, job=number, kind="train", recipe=str(planned.source), overrides=planned.overrides, **facts)
    what = f"{job.gpus_per_node} GPUs" if job.gpus_per_node else f"{job.processes} CPU processes"
    print(f"submitted: job {number}, {job.nodes} nodes of {what}, {job.launcher}, {job.engine or 'ddp'}")
    print("\n".join(planned.notes))
    print(f"run folder: {folder}\nscript:     {script}")
    if evaluate:
        after = evaluation_of(job, number, evaluate)
        second = write_text(folder / FOLDER / "evaluate.sbatch", render(after, "evaluate.sbatch.j2"))
        number_after = submit(second, after)
        note_submission(folder, job=number_after, kind="evaluate", after=number)
        print(f"evaluation: job {number_after}, when {number} is done; {after.output}")
    print(f"watch:      curvelora status {shlex.quote(str(folder))}\nstop:       scancel {number}")
    return 0


def evaluation_of(job: Job, number: str, data: str) -> Job:
    """The job that scores the adapter of another one on one GPU, on rows of its own."""
    folder = Path(job.output)
    out = folder / f"evaluation-{re.sub(r'[^A-Za-z0-9._-]', '-', Path(data).stem)}"
    rows = os.path.abspath(data) if Path(data).exists() else data
    return dataclasses.replace(
        job,
        name=f"{job.name[:54]}-evaluate",
        nodes=1,
        gpus_per_node=min(job.gpus_per_node, 1),
        processes_per_node=0 if job.gpus_per_node else 1,
        cpus_per_task=job.cpus_per_task // job.processes if job.cpus_per_task else None,
        memory=share_of(job.memory, job.processes),
        dependency=f"afterok:{number}",
        arguments=("--adapter", str(folder / "adapter"), "--data", rows, "--out", str(out)),
        output=str(out),
        log=str(folder / "logs/evaluate-%j.out"),  # of a folder that is there: SLURM opens it before anything runs
    )


def share_of(memory: str | None, parts: int) -> str | None:
    """One part of a node's memory, in whole megabytes. All of a node's ("0") has no size: it is left to the site.

    Args:
        memory: as sbatch takes it; without a unit in megabytes.
    """
    if memory is None or not int(memory.rstrip("KMGT")):
        return None
    megabytes = int(memory.rstrip("KMGT")) * {"K": 1 / 1024, "G": 1024, "T": 1024**2}.get(memory[-1], 1)
    return f"{max(1, int(megabytes / parts))}M"
