"""What a run that is continued shares with the one that was stopped: its recipe, and a step's rows on any number of processes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from curvelora.errors import UserError
from curvelora_training.checkpoint import found_in, read_manifest
from curvelora_training.config import Recipe, TrainingSpec, differing_keys, read_yaml
from curvelora_training.distributed import rank, world_size
from curvelora_training.row_order import share_step
from curvelora_training.run_folder import RunFolder

# These change no update, though other engines and kernels round otherwise; the last three say what to do when something fails.
MAY_CHANGE = {"output", "name"} | {
    f"training.{key}"
    for key in (
        *("eval_batch_size", "keep_checkpoints", "keep_best", "deepspeed", "gradient_checkpointing", "keep_products"),
        *("kernels", "liger", "timeout_minutes", "on_nonfinite", "max_rollbacks"),
    )
}
SHARED = {"training.batch_size", "training.accumulation"}  # nor do these, where their product with the processes stays


def with_its_steps(recipe: Recipe) -> Recipe:
    """The recipe with batches for as many processes as there are now, so that a step keeps the rows that it had.

    One with other batches than the run began with stays as it is.

    Raises:
        UserError: these processes cannot share a step's rows, or the checkpoints are in shares of another number of them.
    """
    folder, spec = RunFolder(recipe.output), recipe.training
    facts = _newest_facts(folder)
    if facts is None or folder.is_complete():
        return recipe
    if facts["shares"] is not None and facts["processes"] != world_size():
        raise UserError(
            f"{folder.path} has its checkpoints in shares of {facts['processes']} processes, as DeepSpeed saves full "
            f"fine-tuning, and {world_size()} cannot continue it: start {facts['processes']}"
        )
    rows, began = facts["global_batch"], (_stored(folder) or {}).get("training", {})
    if _rows(spec) == rows or (began.get("batch_size"), began.get("accumulation")) != (
        spec.batch_size,
        spec.accumulation,
    ):
        return recipe
    size, accumulation = share_step(rows, spec.batch_size, world_size())
    if rank() == 0:
        print(
            f"the run was on {facts['processes']} and is on {world_size()} processes now: with batches of {size} and "
            f"accumulation {accumulation} a step keeps its {rows} rows",
            flush=True,
        )
    return dataclasses.replace(recipe, training=dataclasses.replace(spec, batch_size=size, accumulation=accumulation))


def check_same_recipe(recipe: Recipe) -> None:
    """Raise `UserError` where the run was started with another recipe: it would not be continued exactly."""
    folder = RunFolder(recipe.output)
    stored, facts = _stored(folder), _newest_facts(folder)
    if stored is None:
        return
    same_step = facts is not None and (folder.is_complete() or facts["global_batch"] == _rows(recipe.training))
    allowed = MAY_CHANGE | (SHARED if same_step else set())
    # what a paper prints, and the rows that are scored when all is done
    changed = {k: v for k, v in differing_keys(stored, recipe).items() if not re.match(r"(published|data\.test)\b", k)}
    if differences := [text for key, text in changed.items() if key not in allowed]:
        path = folder.path / "config.yaml"
        raise UserError(
            f"{folder.path} was started with another recipe ({'; '.join(differences)}), so it cannot be continued exactly: "
            f"resume with {path}, or name another output"
        )


def _rows(spec: TrainingSpec) -> int:
    """Rows a step, over all processes that there are now."""
    return spec.batch_size * spec.accumulation * world_size()


def _stored(folder: RunFolder) -> dict[str, Any] | None:
    """The recipe with which the run was started."""
    path = folder.path / "config.yaml"
    return read_yaml(path.read_text(encoding="utf-8")) if path.is_file() else None


def _newest_facts(folder: RunFolder) -> dict[str, Any] | None:
    """What the newest manifest says that can be read; whether its checkpoint is whole is looked at later."""
    for checkpoint in found_in(folder.checkpoints):
        try:
            return read_manifest(checkpoint)
        except ValueError:
            continue
    return None
