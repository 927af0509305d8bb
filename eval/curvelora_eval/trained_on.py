"""The base that an adapter was trained on, as the adapter's own folder says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from curvelora.errors import UserError
from curvelora_eval.models import load_config, storage_of
from curvelora_eval.spec import ModelSpec, read_task
from curvelora_eval.tasks import Task


@dataclass(frozen=True)
class TrainedOn:
    """One base.

    Args:
        spec: the checkpoint and its dtype.
        storage: "none", "nf4", "int8", or how the checkpoint is quantised itself.
    """

    spec: ModelSpec
    storage: str

    @property
    def quantised(self) -> bool:
        """Whether what the adapter was trained on is not what it would be merged into."""
        return self.storage != "none"


def trained_on(adapter: Path, task: Task, trust_remote_code: bool) -> TrainedOn | None:
    """Read it from task.json; None where the folder has none.

    Args:
        trust_remote_code: never taken from the folder, which may come from elsewhere.
    """
    stored = read_task(adapter)
    if stored is None:
        return None
    spec = dataclasses.replace(stored[0], trust_remote_code=trust_remote_code)
    try:
        return TrainedOn(spec, storage_of(spec, load_config(spec, task)))
    except UserError:  # it is not here
        return TrainedOn(spec, spec.quantization)
