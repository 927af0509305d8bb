"""The one description of a job from which every script is rendered, and what may stand in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from curvelora.errors import UserError, nearest

Launcher = Literal["torchrun", "accelerate", "deepspeed"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)
FINETUNE = "curvelora_training.finetune"
LONGEST_WARNING = 65535  # seconds; sbatch takes no more for --signal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:=+*&|()\[\]@/-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPTION = re.compile(r"--([a-z][a-z-]*)(=[A-Za-z0-9_.,:=+*&|()\[\]@/-]+)?")
ARRAY = re.compile(r"\d+(-\d+)?(%\d+)?")
DEPENDENCY = re.compile(r"(after|afterany|afterok|afternotok|aftercorr)(:\d+(_\d+)?)+|singleton")
MEMORY = re.compile(r"\d+[KMGT]?")
DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?")
QUEUE = ("partition", "account", "qos", "constraint")
CLOCK = re.compile(r"\d+(:\d+){0,2}")
# what the script says itself, or what would break what it says
OWN_OPTIONS = {
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "gres", "cpus-per-task", "mem"),
    *("signal", "requeue", "no-requeue", "output", "error", "open-mode", "partition", "account", "qos", "constraint"),
    *("array", "dependency", "chdir", "parsable", "wait", "test-only", "wrap", "export", "gpus-per-task", "time"),
}
OF_THE_LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@dataclass(kw_only=True, frozen=True)
class Job:
    """One job. Everything that a script says comes from here."""

    recipe: str
    """The recipe's path as the script uses it."""
    output: str
    """The run folder; absolute in jobs that are submitted."""
    name: str
    """The job's name in the queue."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, after the recipe."""
    launcher: Launcher = "torchrun"
    engine: str | None = None
    """File of ds_configs without its suffix, such as zero2; None is DistributedDataParallel."""
    nodes: int = 1
    gpus_per_node: int = 1
    """0 runs on CPUs, in `processes_per_node` processes."""
    gpu_type: str | None = None
    """As the cluster's configuration names it, for example h100; None takes any."""
    processes_per_node: int = 0
    """0 means one a GPU."""
    cpus_per_task: int | None = None
    """CPUs a node, for all of its processes; None leaves it to the site."""
    memory: str | None = None
    """A node's, as sbatch takes it (for example 480G); None leaves it to the site."""
    time: str = "24:00:00"
    """The limit, as sbatch takes it."""
    warning_seconds: int = 300
    """How long before the limit training is told to save."""
    max_requeues: int = 20
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch_options: tuple[str, ...] = ()
    """More `--option=value` of the site."""
    setup: tuple[str, ...] = ()
    """Lines of the site that make the environment: module load, source .venv/bin/activate."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the site."""
    array: str | None = None
    dependency: str | None = None
    module: str = FINETUNE
    """What runs under the launcher."""
    configs: str = "ds_configs"
    """The folder of the engines' files."""
    log: str | None = None
    """SLURM's own output; None is in the run folder."""
    folder: str | None = None
    """Where the job runs; None is where sbatch was called."""
    arguments: tuple[str, ...] = ()
    """For templates of modules other than training."""

    @property
    def log_file(self) -> str:
        """Where SLURM writes what the script says; %j is the job's number. It opens the file before the script begins."""
        return self.log or f"{self.output}/logs/slurm-%j.out"

    @property
    def processes(self) -> int:
        """Processes a node."""
        return self.processes_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.processes * self.nodes

    def problems(self) -> list[str]:
        """A sentence for everything that is wrong."""
        return [*self._size_problems(), *self._queue_problems(), *self._site_problems()]

    def check(self) -> Job:
        """This job. Raises `UserError` with all that is wrong with it, at once."""
        if problems := self.problems():
            raise UserError("; ".join(problems))
        return self

    def _size_problems(self) -> list[str]:
        problems = []
        if not NAME.fullmatch(self.name):
            problems.append(f"--name {self.name!r} must be letters, digits, '.', '_' and '-', 64 at most")
        if self.launcher not in LAUNCHERS:
            known = f"{', '.join(LAUNCHERS)}{nearest(self.launcher, LAUNCHERS)}"
            problems.append(f"--launcher {self.launcher!r} is none of {known}")
        if self.nodes < 1:
            problems.append(f"--nodes must be at least 1, not {self.nodes}")
        if self.gpus_per_node < 0 or self.processes_per_node < 0:
            problems.append("--gpus-per-node and --processes-per-node cannot be negative")
        elif self.processes < 1:
            problems.append(
                "--gpus-per-node 0 runs on CPUs: say with --processes-per-node how many processes a node has"
            )
        elif self.gpus_per_node and self.processes != self.gpus_per_node:
            problems.append(
                f"--processes-per-node {self.processes} is not --gpus-per-node {self.gpus_per_node}: leave it out, as each "
                "GPU has one process"
            )
        if self.gpu_type is not None and not NAME.fullmatch(self.gpu_type):
            problems.append(f"--gpu-type {self.gpu_type!r} must be letters, digits, '.', '_' and '-'")
        if self.cpus_per_task is not None and self.cpus_per_task < max(self.processes, 1):
            problems.append(
                f"{self.cpus_per_task} CPUs a node are fewer than its {self.processes} processes: ask for more"
            )
        if self.memory is not None and not MEMORY.fullmatch(self.memory):
            problems.append(f"--mem {self.memory!r} is no size: write for example 480G, or 0 for all that a node has")
        return problems

    def _queue_problems(self) -> list[str]:
        problems = []
        limit = seconds(self.time)
        if limit is None:
            problems.append(f"--time {self.time!r} is no time limit: write HH:MM:SS, D-HH:MM:SS or minutes")
        if not 0 < self.warning_seconds <= LONGEST_WARNING:
            problems.append(f"--warning-seconds must be from 1 to {LONGEST_WARNING}, not {self.warning_seconds}")
        elif limit is not None and self.warning_seconds >= limit:
            problems.append(
                f"--warning-seconds {self.warning_seconds} is not less than the time limit of {limit} s: training would be "
                "stopped at its start"
            )
        if self.max_requeues < 0:
            problems.append(f"--max-requeues cannot be negative, and is {self.max_requeues}")
        for option in QUEUE:
            value = getattr(self, option)
            if value is not None and not WORD.fullmatch(value):
                problems.append(f"--{option} {value!r} has characters that no such name has")
        if self.array is not None and not ARRAY.fullmatch(self.array):
            problems.append(f"--array {self.array!r} must be like 0-7, or 0-7%4 for four at a time")
        if self.dependency is not None and not DEPENDENCY.fullmatch(self.dependency):
            example = "afterok:123 (or after, afterany, afternotok, singleton)"
            problems.append(f"--dependency {self.dependency!r} must be like {example}")
        return problems

    def _site_problems(self) -> list[str]:
        problems = []
        for option in self.sbatch_options:
            found = OPTION.fullmatch(option)
            if not found:
                problems.append(
                    f"sbatch_options: {option!r} must be like --exclusive or --comment=text, without spaces"
                )
            elif found[1] in OWN_OPTIONS:
                problems.append(f"sbatch_options: --{found[1]} is written by `curvelora launch` itself: leave it out")
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                problems.append(f"environment: {name!r} is no name of a variable")
            elif name in OF_THE_LAUNCHER:
                problems.append(f"environment: {name} is set by the launcher: leave it out")
        texts = {"the recipe": self.recipe, "the output": self.output, "the module": self.module}
        texts |= {f"environment {name}": value for name, value in self.environment.items()}
        texts |= {repr(line): line for line in (*self.setup, *self.overrides, *self.arguments)}
        problems += [f"{what} must be one line" for what, text in texts.items() if any(ord(c) < 32 for c in text)]
        for what, path in (("output", self.output), ("current folder", self.folder or "")):
            if re.search(r"[\s%\"'\\$`]", path):  # `#SBATCH` has patterns and quotes of its own
                problems.append(
                    f"the {what} {path!r} has a space, %, $, a quote or a backslash, which sbatch would read as its own: take "
                    "another name"
                )
        return problems


def seconds(limit: str) -> int | None:
    """Seconds of a time limit as sbatch takes it; None for other text.

    Args:
        limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.
    """
    if found := DAYS.fullmatch(limit):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if not CLOCK.fullmatch(limit):
        return None
    parts = [int(part) for part in limit.split(":")]
    if len(parts) == 1:
        return parts[0] * 60
    return sum(part * factor for part, factor in zip(reversed(parts), (1, 60, 3600), strict=False))
