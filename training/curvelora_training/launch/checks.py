"""What can be found out on the login node, so that a job does not wait for hours to fail in a minute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from curvelora.errors import UserError
from curvelora_eval.data import load_rows
from curvelora_eval.files import check_folder
from curvelora_eval.models import load_processor
from curvelora_eval.spec import DataSpec, ModelSpec
from curvelora_eval.tasks import make_task
from curvelora_training.config import Recipe
from curvelora_training.distributed import JOB_HAS_GPUS
from curvelora_training.launch.cluster import default_partitions, partition_problems, partitions, slurm, state_of
from curvelora_training.launch.engines import FSDP2
from curvelora_training.launch.job import Job
from curvelora_training.launch.plan import Plan, raise_all, rows_a_step
from curvelora_training.launch.snapshot import submissions
from curvelora_training.lease import Lease
from curvelora_training.prepare import load_and_prepare, trainable_table
from curvelora_training.run_folder import RunFolder

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class Findings:
    """Lines of a dry run: what is in order, and what is not."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.problems: list[str] = []

    def __call__(self, what: str, check: Callable[[], str]) -> None:
        """Run one check, which says what it found or raises `UserError`."""
        try:
            self.lines.append(f"ok      {what}: {check()}")
        except UserError as error:
            self.problems.append(str(error))
            self.lines.append(f"error   {what}: {error}")

    def report(self) -> None:
        """Raise `UserError` with every problem."""
        raise_all(self.problems)


def check_all(planned: Plan, resume: bool, contents: bool, evaluate: str | None = None) -> Findings:
    """Everything that can be checked without a compute node.

    Args:
        resume: the run that the folder holds is to be continued.
        contents: also check model and rows, which may lie where only compute nodes see them.
        evaluate: rows to be scored afterwards.
    """
    found, job = Findings(), planned.job
    found("run folder", lambda: check_run_folder(Path(job.output), resume))
    if contents:
        found("model", lambda: check_model(planned.recipe, planned.given))
        found("recipe", lambda: check_recipe(planned, resume))
        if evaluate:
            found("evaluation", lambda: f"{len(load_rows(DataSpec(path=evaluate)))} rows of {evaluate}")
    found("cluster", lambda: check_cluster(job))
    return found


def check_run_folder(folder: Path, resume: bool) -> str:
    """The folder can be written, and is free or holds a run that can be continued; no job of it is in the queue."""
    check_folder(folder)
    for line in reversed(submissions(folder)):
        if state := state_of(line["job"]):
            raise UserError(
                f"job {line['job']} of {folder} is still there ({state.lower()}): end it with `scancel {line['job']}`, or name "
                "another output"
            )
    run = RunFolder(folder)
    if run.is_complete():
        raise UserError(f"{folder} holds a complete run: name another output, or delete it")
    if run.held() and not resume:
        raise UserError(
            f"{folder} holds a run already ({', '.join(run.held())}): add --resume to continue it, or name another output"
        )
    Lease(folder).check_free()
    return f"{folder} {'is continued' if run.held() else 'is free'}"


def check_model(recipe: Recipe, given: str) -> str:
    """Configuration, weights and tokenizer lie here or in the hub's cache."""
    spec = recipe.model
    if missing := missing_of(spec):
        raise UserError(
            f"model.path {spec.path}: {missing}, and compute nodes have no network as a rule: bring it with "
            f"`curvelora fetch {given}` and add the overrides that it prints, or name a folder that holds it"
        )
    load_processor(spec, make_task(recipe.task))
    return spec.path


def missing_of(spec: ModelSpec) -> str | None:
    """What of the checkpoint is not here, in words; None where all of it is."""
    folder = Path(spec.path)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            return "the folder holds no weights (*.safetensors)"
        return None
    looks_local = spec.path.startswith((".", "/", "~")) or spec.path.count("/") > 1
    if looks_local:
        return "there is no such folder"
    cached = [isinstance(_cached(spec, name), str) for name in ("config.json", *WEIGHTS)]
    if not cached[0]:
        return "it is neither a folder here nor in the hub's cache (HF_HOME)"
    return None if any(cached[1:]) else "the hub's cache has its configuration, but not its weights"


def _cached(spec: ModelSpec, name: str) -> object:
    return try_to_load_from_cache(spec.path, name, revision=spec.revision)


def check_recipe(planned: Plan, resume: bool) -> str:
    """All that training checks before it loads a weight, as the job's processes would."""
    job = planned.job
    with as_in_job(job):
        prepared = load_and_prepare(planned.source, planned.overrides, resume)
    spec, rows = prepared.recipe.training, len(prepared.rows["train"])
    step = rows_a_step(spec, job)
    what = trainable_table(prepared).splitlines()[-1]
    return f"{planned.source} {what}; {rows} rows, {step}"


@contextlib.contextmanager
def as_in_job(job: Job) -> Iterator[None]:
    """The variables by which checks see how many processes there will be, under which engine, and whether on GPUs."""
    names = {"WORLD_SIZE": str(job.world_size), "RANK": "0", JOB_HAS_GPUS: "1" if job.gpus_per_node else ""}
    if job.engine == FSDP2:
        names |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_cluster(job: Job) -> str:
    """The job's partition exists and has such nodes."""
    known = partitions()
    if problems := partition_problems(job, known):
        raise UserError("; ".join(problems))
    version = slurm("sbatch", "--version").stdout.strip()
    where = job.partition or "".join(default_partitions(known)[:1]) or "that the site chooses"
    return f"{version}, partition {where}, {job.nodes} nodes of {job.gpus_per_node} GPUs for {job.time}"
