"""The models that are compared: adapters by their folders, and the bare model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from curvelora.errors import UserError
from curvelora.loading import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, stored_shapes
from curvelora_eval.data import fingerprint
from curvelora_eval.spec import ModelSpec, TaskSpec, read_task

BASELINE = "baseline"


@dataclass(frozen=True, eq=False)
class Arm:
    """An adapter, or (folder None) the bare model.

    Args:
        label: names its results.
        folder: of the adapter.
        config: of the adapter.
        stored: base model and task of the training, where task.json says them.
    """

    label: str
    folder: Path | None = None
    config: PeftConfig | None = None
    stored: tuple[ModelSpec, TaskSpec] | None = None

    @property
    def trained(self) -> frozenset[str]:
        """Modules of the base that come with the adapter."""
        return frozenset(getattr(self.config, "modules_to_save", None) or ())

    def identity(self) -> dict[str, Any] | None:
        """Path and hash of the weights, as in evaluation.json; None for the bare model."""
        return self.folder and {"path": str(self.folder), "sha256": fingerprint(self.folder / WEIGHTS_FILE)}

    def content(self) -> list[str | None] | None:
        """Hashes of everything that decides what the adapter does; None for the bare model."""
        return self.folder and [fingerprint(self.folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]


def read_arm(label: str, folder: Path) -> Arm:
    """Read everything of an adapter but its weights.

    Raises:
        UserError: no adapter, pickled or damaged weights, a damaged config or task.json.
    """
    config = read_adapter_config(folder)
    stored_shapes(folder)
    return Arm(label, folder, config, read_task(folder))


def labels(folders: Sequence[Path]) -> list[str]:
    """A name for each adapter: its folder's, or the run's where it lies in RUN/adapter; with parents where names are the same.

    Raises:
        UserError: one folder is given twice.
    """
    places = [folder.absolute() for folder in folders]
    twice = [
        str(folders[places.index(place)]) for place, count in Counter(p.resolve() for p in places).items() if count > 1
    ]
    if twice:
        raise UserError(f"--adapter {twice[0]} is given twice: give every adapter once")
    parts = [p.parts[1:-1] if p.name == "adapter" and len(p.parts) > 2 else p.parts[1:] for p in places]
    depth = [1] * len(parts)

    def named() -> list[str]:
        return ["-".join(part[-n:]) for part, n in zip(parts, depth, strict=True)]

    while shared := {name for name, count in Counter([*named(), BASELINE]).items() if count > 1}:
        before = list(depth)
        for i, name in enumerate(named()):
            depth[i] = min(depth[i] + (name in shared), len(parts[i]))
        if depth == before:  # RUN/adapter beside RUN itself: nothing more to tell them apart by
            return [f"{i}-{part[-1]}" for i, part in enumerate(parts, 1)]
    return named()
