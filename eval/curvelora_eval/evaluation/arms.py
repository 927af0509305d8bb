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
        classes: of the bare model's head, as its checkpoint calls them.
        notes: what a reader of its scores must know, in sentences.
    """

    label: str
    folder: Path | None = None
    config: PeftConfig | None = None
    stored: tuple[ModelSpec, TaskSpec] | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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


def labels(folders: Sequence[Path], earlier: Sequence[Sequence[str]] = ()) -> list[str]:
    """A name for each adapter: its folder's, or the run's where it lies in RUN/adapter; with parents where names are the same.

    Args:
        earlier: for each folder the labels under which there are results of its adapter. It keeps one that is a name of this
            folder, with fewer or more parents, so that adding another adapter of the same name renames nobody.

    Raises:
        UserError: one folder is given twice.
    """
    names = _labels(folders, ())
    kept: dict[int, str] = {}
    for i, found in enumerate(earlier):
        part = _parts(folders[i])
        own = [name for name in found if name in {"-".join(part[-n:]) for n in range(1, len(part) + 1)}]
        if own := [name for name in own if name not in kept.values()]:
            kept[i] = names[i] if names[i] in own else own[0]
    taken = tuple(kept.values())
    rest = [i for i in range(len(folders)) if i not in kept]
    # a command has the same names when it is started again, so one that is free stays, with whatever the first time left
    if any(names[i] in taken for i in rest):
        for i, name in zip(rest, _labels([folders[i] for i in rest], taken), strict=True):
            names[i] = name
    return [kept.get(i, name) for i, name in enumerate(names)]


def _parts(folder: Path) -> tuple[str, ...]:
    place = folder.absolute()
    return place.parts[1:-1] if place.name == "adapter" and len(place.parts) > 2 else place.parts[1:]


def _labels(folders: Sequence[Path], taken: Sequence[str]) -> list[str]:
    """As short as they are different, from each other and from those that are taken."""
    places = [folder.absolute() for folder in folders]
    twice = [
        str(folders[places.index(place)]) for place, count in Counter(p.resolve() for p in places).items() if count > 1
    ]
    if twice:
        raise UserError(f"--adapter {twice[0]} is given twice: give every adapter once")
    parts = [_parts(folder) for folder in folders]
    depth = [1] * len(parts)

    def named() -> list[str]:
        return ["-".join(part[-n:]) for part, n in zip(parts, depth, strict=True)]

    while shared := {name for name, count in Counter([*named(), BASELINE, *taken]).items() if count > 1}:
        before = list(depth)
        for i, name in enumerate(named()):
            depth[i] = min(depth[i] + (name in shared), len(parts[i]))
        if depth == before:  # RUN/adapter beside RUN itself: nothing more to tell them apart by
            return [f"{i}-{part[-1]}" for i, part in enumerate(parts, 1)]
    return named()
