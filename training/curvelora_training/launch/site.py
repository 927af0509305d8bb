"""What one cluster needs and another does not: a file of the user's own, so that nothing of a site stands in a script's template.

    # ~/.config/curvelora/site.yaml, or the file that CURVELORA_SITE names
    partition: gpu
    account: my-project
    gpus_per_node: 8
    cpus_per_gpu: 12
    setup: [module load cuda/12.8, source /home/me/curvelora/.venv/bin/activate]
    environment: {HF_HOME: /scratch/me/huggingface}
    run_root: /scratch/me

The command line goes before it. The lines of `setup` are run by the job's shell as they stand.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import TypeAdapter, ValidationError

from curvelora.errors import UserError, nearest
from curvelora_training.config import Count, read_yaml

VARIABLE = "CURVELORA_SITE"


@dataclass(kw_only=True)
class Site:
    """Defaults of `curvelora launch`; what is absent is left to SLURM."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    partition: str | None = None
    """Where jobs go."""
    account: str | None = None
    """What they are charged to."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have, for example h100."""
    gpus_per_node: Count | None = None
    """GPUs that a job takes of each node."""
    gpu_type: str | None = None
    """Their type as the cluster names it, for example h100; any where absent."""
    cpus_per_gpu: Count | None = None
    """CPU cores for each of them; 8 where absent."""
    memory: str | None = None
    """Host memory of a node, for example 480G, or "0" for all of it."""
    time: str | None = None
    """Time limit of a job, for example "24:00:00" (in quotes); a longer run is continued by the next job."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell at the beginning of a job, such as module load and source .venv/bin/activate."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of a job, such as HF_HOME or NCCL_SOCKET_IFNAME."""
    sbatch_options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --exclusive."""
    run_root: str | None = None
    """Folder below which relative outputs of recipes lie; the current folder where absent."""

    def as_yaml(self) -> str:
        """Everything written out."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True, width=120)


def site_path() -> Path:
    """CURVELORA_SITE where it is set, else curvelora/site.yaml in the user's configuration folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "curvelora" / "site.yaml"


def load_site() -> Site:
    """Read the site file; all defaults where there is none.

    Raises:
        UserError: CURVELORA_SITE names a file that is not there, or every error of the file, in one message.
    """
    path = site_path()
    if not path.is_file():
        if os.environ.get(VARIABLE):
            raise UserError(f"{VARIABLE} names {path}, and there is no such file")
        return Site()
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the site file {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict | None):
        raise UserError(f"the site file {path} must be a mapping with keys such as partition, account and setup")
    try:
        return TypeAdapter(Site).validate_python(raw or {})
    except ValidationError as error:
        problems = [_described(item) for item in error.errors()]
        raise UserError(f"the site file {path}: {'; '.join(problems)}") from error


def _described(item: dict[str, Any]) -> str:
    """One of pydantic's errors as a clause."""
    key = ".".join(map(str, item["loc"]))
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f.name for f in dataclasses.fields(Site)]
        return f"unknown key {key!r}{nearest(key, known)} (known: {', '.join(known)})"
    if item["type"] == "string_type":
        return f"{key} must be text, found {item['input']!r}: put it in quotes"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, found {item['input']!r}"
