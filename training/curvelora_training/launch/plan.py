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
from curvelora_training.config import Recipe, load_recipe, read_yaml
from curvelora_training.launch.engines import chosen_engine, configurations, deepspeed_file
from curvelora_training.launch.job import NAME, Job
from curvelora_training.launch.site import load_site
from curvelora_training.launch.snapshot import FOLDER, RECIPE
from curvelora_training.recipes import find

T = TypeVar("T")
QUEUE = ("partition", "account", "qos", "constraint")


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
    """As they were given, with the run folder and the engine's file as absolute paths."""

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
        overrides = [o for o in overrides if o.partition("=")[0] not in settled] + list(settled.values())
        recipe = collect(lambda: load_recipe(source, overrides))
    gpus = args.gpus_per_node if args.gpus_per_node is not None else site.gpus_per_node
    if gpus is None:
        problems.append("--gpus-per-node is missing: write it, or gpus_per_node in the site file (0 runs on CPUs)")
    cpus = args.cpus_per_gpu or site.cpus_per_gpu
    job = Job(
        recipe=str(Path(output) / FOLDER / RECIPE),
        output=output,
        name=args.name or (source.stem if source and NAME.fullmatch(source.stem) else "curvelora"),
        launcher=args.launcher,
        engine=engine,
        nodes=args.nodes,
        gpus_per_node=1 if gpus is None else gpus,
        processes_per_node=args.processes_per_node,
        cpus_per_task=cpus and cpus * (gpus or args.processes_per_node or 1),
        memory=args.mem or site.memory,
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
    raise_all([*problems, *job.problems()])
    return Plan(job, recipe, source, args.recipe, overrides)


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
