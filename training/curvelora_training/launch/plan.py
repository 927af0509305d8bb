"""From the command line, the site file and the recipe to the job that is to be submitted."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from curvelora.errors import UserError
from curvelora_training.config import Recipe, TrainingSpec, load_recipe, read_yaml
from curvelora_training.launch.engines import chosen_engine, configurations, deepspeed_file
from curvelora_training.launch.job import NAME, QUEUE, Job
from curvelora_training.launch.site import load_site
from curvelora_training.launch.snapshot import FOLDER, RECIPE
from curvelora_training.recipes import find
from curvelora_training.resuming import SHARED
from curvelora_training.row_order import share_step

T = TypeVar("T")
CPUS_PER_GPU = 8  # where nothing is said; SLURM would give one to all processes of a node
WHOLE_NODE = 8  # GPUs


@dataclasses.dataclass
class Plan:
    """What is to be submitted."""

    job: Job
    """It reads the resolved recipe in the run folder."""
    recipe: Recipe
    source: Path
    """The recipe's own file."""
    given: str
    """Its name as it was given."""
    overrides: list[str]
    """As they were given, with the run folder and the engine's file as absolute paths, and a step's rows shared out."""
    notes: list[str]
    """What was settled without being asked for, a line each."""

    def by_hand(self) -> Job:
        """The job for a script of its own: nothing of it lies in the run folder yet."""
        written = {"output", "training.deepspeed"} if deepspeed_file(self.job.engine) else {"output"}  # by the template
        given = tuple(o for o in self.overrides if o.partition("=")[0] not in written)
        return dataclasses.replace(self.job, recipe=str(self.source), overrides=given, log="slurm-%x-%j.out")


def plan(args: argparse.Namespace) -> Plan:
    """The job and its resolved recipe, from the command line and the site file.

    Raises:
        UserError: all that is wrong with the recipe, the engine and the options, in one message.
    """
    site, problems = load_site(), []

    def collect(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except UserError as error:
            problems.append(str(error))
            return None

    engine = collect(lambda: chosen_engine(args.engine, args.launcher))
    source = collect(lambda: find(args.recipe).absolute())
    overrides = [*args.overrides, *([override("output", args.output)] if args.output else [])]
    recipe = collect(lambda: load_recipe(source, overrides)) if source else None
    output = "unknown"
    if recipe is not None:
        output = os.path.abspath(Path(site.run_root or ".").expanduser() / Path(recipe.output).expanduser())
        settled = {"output": override("output", output)}
        own = recipe.training.deepspeed
        if own and args.engine is None:  # a file of the recipe's own
            engine, settled["training.deepspeed"] = None, override("training.deepspeed", os.path.abspath(own))
        elif file := collect(lambda: deepspeed_file(engine)):
            settled["training.deepspeed"] = override("training.deepspeed", str(file))
        elif own:  # and another engine is asked for
            settled["training.deepspeed"] = "training.deepspeed=null"
        given = {o.partition("=")[0] for o in overrides}
        if args.evaluate_after and not any(key.startswith("data.test") for key in given):
            settled["data.test"] = "data.test=null"  # or one process would score while all others wait
        overrides = [o for o in overrides if o.partition("=")[0] not in settled] + list(settled.values())
    gpus = args.gpus_per_node if args.gpus_per_node is not None else site.gpus_per_node
    if gpus is None:
        problems.append("--gpus-per-node is missing: write it, or gpus_per_node in the site file (0 runs on CPUs)")
    cpus = args.cpus_per_gpu or site.cpus_per_gpu or (CPUS_PER_GPU if gpus else None)
    memory = args.mem or site.memory or ("0" if (gpus or 0) >= WHOLE_NODE else None)
    job = Job(
        recipe=str(Path(output) / FOLDER / RECIPE),
        output=output,
        name=args.name or (source.stem if source and NAME.fullmatch(source.stem) else "curvelora"),
        launcher=args.launcher,
        engine=engine,
        nodes=args.nodes,
        gpus_per_node=1 if gpus is None else gpus,
        gpu_type=args.gpu_type or site.gpu_type,
        processes_per_node=args.processes_per_node,
        cpus_per_task=cpus and cpus * (gpus or args.processes_per_node or 1),
        memory=memory,
        time=args.time or site.time or Job.time,
        warning_seconds=args.warning_seconds,
        max_requeues=args.max_requeues,
        **{name: getattr(args, name) or getattr(site, name) for name in QUEUE},
        sbatch_options=tuple(site.sbatch_options),
        # this Python, unless a line of the site activates another one
        setup=(f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH", *site.setup),
        environment=site.environment,
        dependency=args.dependency,
        configs=str(collect(configurations)) if engine or args.launcher == "accelerate" else "ds_configs",
        folder=os.getcwd(),
    )
    if recipe is not None:
        overrides += collect(lambda: with_its_rows(recipe.training, overrides, job.world_size)) or []
        recipe = collect(lambda: load_recipe(source, overrides))
    raise_all([*problems, *job.problems()])
    notes = [rows_a_step(recipe.training, job)]
    if gpus and not (args.mem or site.memory):
        asked = "all of a node's" if memory else "what the partition gives by default"
        notes.append(f"host memory: {asked}, as neither --mem nor the site file says how much")
    return Plan(job, recipe, source, args.recipe, overrides, notes)


def with_its_rows(spec: TrainingSpec, overrides: list[str], processes: int) -> list[str]:
    """Overrides with which so many processes take the rows a step that the recipe takes on one; none are needed for one.

    Where the overrides already say something of it, they stand.

    Raises:
        UserError: the processes cannot share these rows.
    """
    if processes < 2 or {o.partition("=")[0] for o in overrides} & {"training", *SHARED}:
        return []
    try:
        size, accumulation = share_step(spec.batch_size * spec.accumulation, spec.batch_size, processes)
    except UserError as error:
        raise UserError(f"{error}, or write training.batch_size=N for a step of other rows") from error
    return [f"training.batch_size={size}", f"training.accumulation={accumulation}"]


def rows_a_step(spec: TrainingSpec, job: Job) -> str:
    """How many rows a step has, and whence."""
    rows = spec.batch_size * spec.accumulation * job.world_size
    return (
        f"{rows} rows a step = batch {spec.batch_size} x accumulation {spec.accumulation} x {job.world_size} processes"
    )


def raise_all(problems: list[str]) -> None:
    """Raise `UserError` with every problem, a line each where there are several."""
    if problems:
        heading = f"{len(problems)} things are wrong:\n" if len(problems) > 1 else ""
        lines = [text.replace("\n", "\n    ") for text in problems] if heading else problems
        raise UserError(heading + "\n".join(f"  - {text}" if heading else text for text in lines))


def override(key: str, value: str) -> str:
    """`key=value` for a text that YAML might read as something else."""
    plain = re.fullmatch(r"[\w./-]+", value) and read_yaml(value) == value
    return f"{key}={value if plain else json.dumps(value)}"
