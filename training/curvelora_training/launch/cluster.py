"""What SLURM says of itself, and of a job: partitions before a job is submitted, and its refusals in plain words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from curvelora.errors import UserError, nearest
from curvelora_training.launch.job import QUEUE, Job, seconds

NO_SLURM = (
    "there is no SLURM here (no command sbatch): --print shows the script; launch/local/finetune.sh runs on this machine, and "
    "launch/multinode/finetune.sh on several"
)
FINISHED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}


@dataclass
class Partition:
    """One partition; the largest node counts, as a job may ask for such nodes."""

    nodes: int = 0
    limit: int | None = None
    """Seconds; None is no limit."""
    limit_text: str = "none"
    gpus: int = 0
    """GPUs of a node; 0 where the site declares none."""
    cpus: int = 0
    default: bool = False
    up: bool = True


def slurm(
    *command: str, timeout: float = 60, environment: dict[str, str] | None = None, then: str = "try again later"
) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands.

    Args:
        timeout: seconds.
        environment: all of its variables; None is this process's.
        then: what to do where it does not answer.

    Raises:
        UserError: there is none, or it does not answer.
    """
    if shutil.which(command[0]) is None:
        raise UserError(NO_SLURM)
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"SLURM does not answer ({command[0]}, {timeout:g} s): {then}") from error


def partitions() -> dict[str, Partition]:
    """Every partition by its name. Raises `UserError` where SLURM cannot be asked."""
    done = slurm("sinfo", "--all", "--noheader", "--format=%P|%a|%l|%D|%G|%c")
    if done.returncode != 0:
        raise UserError(f"SLURM cannot be asked for its partitions: {_one_line(done.stderr)}")
    found: dict[str, Partition] = {}
    for line in done.stdout.splitlines():
        parts = line.strip().split("|")
        if len(parts) != 6:
            continue
        name, state, limit, nodes, gres, cpus = parts
        partition = found.setdefault(name.rstrip("*"), Partition())
        partition.default |= name.endswith("*")
        partition.up = state == "up"
        partition.limit, partition.limit_text = seconds(limit), limit
        partition.nodes += int(nodes)
        partition.gpus = max(partition.gpus, _gpus(gres))
        partition.cpus = max(partition.cpus, int(re.match(r"\d*", cpus)[0] or 0))
    return found


def partition_problems(job: Job, known: dict[str, Partition]) -> list[str]:
    """What of the job no partition that it names can give, in sentences.

    Where it names none and there is no default, a plugin of the site may choose one; else sbatch says so.
    """
    names = job.partition.split(",") if job.partition else default_partitions(known)
    listed = ", ".join(known) or "none"
    if unknown := [name for name in names if name not in known]:
        return [f"there is no partition {name!r}{nearest(name, known)} (known: {listed})" for name in unknown]
    each = [_lacks(job, name, known[name]) for name in names]
    return [] if not names or any(not lacks for lacks in each) else [problem for lacks in each for problem in lacks]


def default_partitions(known: dict[str, Partition]) -> list[str]:
    """The default one, where there is one."""
    return [name for name, partition in known.items() if partition.default]


def _lacks(job: Job, name: str, partition: Partition) -> list[str]:
    problems = []
    if not partition.up:
        problems.append(f"the partition {name} takes no jobs now (it is not up): name another one with --partition")
    if job.nodes > partition.nodes:
        problems.append(f"--nodes {job.nodes} are more than the {partition.nodes} that the partition {name} has")
    if partition.gpus and job.gpus_per_node > partition.gpus:
        problems.append(f"--gpus-per-node {job.gpus_per_node} are more than the {partition.gpus} of a node in {name}")
    if not partition.gpus and job.gpus_per_node:
        problems.append(
            f"the partition {name} has no GPUs: name another one with --partition, or write --gpus-per-node 0"
        )
    if partition.cpus and (job.cpus_per_task or 0) > partition.cpus:
        problems.append(
            f"{job.cpus_per_task} CPUs a node are more than the {partition.cpus} of a node in {name}: ask for fewer with "
            "--cpus-per-gpu"
        )
    if partition.limit is not None and (seconds(job.time) or 0) > partition.limit:
        problems.append(
            f"--time {job.time} is above the limit of the partition {name}, {partition.limit_text}: ask for less, a longer "
            "run is continued by itself"
        )
    return problems


def submit(script: Path, job: Job) -> str:
    """Hand the script to sbatch; returns the job id. Raises `UserError` with what SLURM has against it."""
    queued = "look with squeue whether it is there before you try again"
    done = slurm("sbatch", "--parsable", str(script), environment=_for_sbatch(job), then=queued)
    if done.returncode != 0:
        raise UserError(refusal(done.stderr, job))
    return done.stdout.strip().split(";")[0]  # "id;cluster" on federations


def _for_sbatch(job: Job) -> dict[str, str]:
    """Variables without those of an allocation or of sbatch's options, which would go before the script's lines.

    What a user's profile says of partition, account and quality of service stays where the job says nothing of them.
    """
    kept = {"SLURM_CONF"} | {f"SBATCH_{name.upper()}" for name in QUEUE if getattr(job, name) is None}
    own = ("SLURM_", "SBATCH_", "SRUN_")
    return {name: value for name, value in os.environ.items() if name in kept or not name.startswith(own)}


def refusal(text: str, job: Job) -> str:
    """sbatch's message as one sentence that says what to write instead."""
    said = _one_line(text)
    named = f"the partition {job.partition}" if job.partition else "the default partition"
    kind = f"{job.gpu_type} GPUs" if job.gpu_type else "GPUs"
    wanted = f"{job.nodes} nodes of {job.gpus_per_node} {kind}"
    meanings = {
        "invalid partition": f"there is no {named.removeprefix('the ')} here: `sinfo` lists those that there are",
        "node count specification invalid": f"{named} does not have {job.nodes} nodes for one job: ask for fewer",
        "more processors requested": f"{named} does not have so many CPUs a node: ask for fewer with --cpus-per-gpu",
        "node configuration is not available": f"{named} does not have {wanted} with these CPUs and this memory: ask for less",
        "time limit": f"--time {job.time} is above what {named} allows: ask for less, a longer run is continued by itself",
        "invalid account": f"{job.account or 'the default account'} is no account of yours in {named}: name another one",
        "invalid qos": f"the quality of service {job.qos} is not yours, or not known: name another --qos",
        "invalid feature": f"no node has the feature {job.constraint}: name another --constraint",
        "dependency": f"the job that --dependency {job.dependency} names is not known",
        "generic resource": f"{named} does not have {job.gpus_per_node} {kind} a node: ask for fewer, or another --gpu-type",
    }
    why = next((meaning for sign, meaning in meanings.items() if sign in said.lower()), "it refused the job")
    return f"SLURM did not take the job: {why} (sbatch: {said})"


def state_of(job: str) -> str | None:
    """PENDING, RUNNING and so on while the job is in the queue; None once it is gone, or SLURM cannot be asked."""
    try:
        done = slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    except UserError:
        return None
    states = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return next((state for state in states if state not in FINISHED), None) if done.returncode == 0 else None


def _gpus(gres: str) -> int:
    """`gpu:h100:8(S:0-1),nvme:1` -> 8; the type may begin with digits, as 3090 and 1g.10gb do."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)(?=[(,]|$)", gres))


def _one_line(text: str) -> str:
    lines = [
        line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in text.splitlines() if line.strip()
    ]
    return " ".join(dict.fromkeys(lines))[:400] or "no reason given"
