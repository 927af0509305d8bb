"""A loss or gradient that is NaN or infinite: which rows it came from, and what is done about it (`training.on_nonfinite`).

All processes decide alike and without asking each other, because they decide on the norm of the gradient that they share: a loss
that is not finite makes its gradient NaN (`poisoned`). Only where something is wrong are rows and losses gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from curvelora.errors import UserError
from curvelora_training.checkpointing import restore
from curvelora_training.config import TrainingSpec
from curvelora_training.distributed import everyones, rank
from curvelora_training.run_folder import RunFolder
from curvelora_training.zero3 import gather_kept

ROW = "row"  # the key of a row's index in features and batches; no model has an input of this name
IN_A_ROW = 10  # skipped steps after which it is not the rows
SHOWN = 64  # rows in a message; all are in metrics.jsonl


class Numbered(Dataset):
    """Encoded rows, each with its index (from 0, in file order)."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> Any:
        """A row, or a whole column by its name."""
        return self.rows[index] if isinstance(index, str) else self.rows[index] | {ROW: index}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """What the data loader asks for, a batch at once."""
        return [row | {ROW: index} for row, index in zip(self.rows.__getitems__(indices), indices, strict=True)]


class WithRows:
    """A collator for features that may have an index, which the batch then has too."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate
        self.tokenizer = getattr(collate, "tokenizer", None)  # the trainer saves it with the adapter

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [feature[ROW] for feature in features if ROW in feature]
        batch = self.collate([{key: value for key, value in feature.items() if key != ROW} for feature in features])
        return {**batch, ROW: torch.tensor(rows)} if rows else batch


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself; where it is not finite, its gradient becomes NaN, also where that would have been finite."""
    if loss.requires_grad:
        factor = torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss.dtype)
        loss.register_hook(lambda gradient: gradient * factor)
    return loss


class Guard(TrainerCallback):
    """Looks at every step before it is applied, and stops, skips it, or goes back to a checkpoint.

    A step that is skipped counts as one: its rows are used up and the learning rate goes on. Going back takes the adapter and the
    optimiser's moments from the newest whole checkpoint; rows and learning rate go on after the step that failed. Replaying the
    steps in between would end at the weights that failed, so it would be the same as skipping.

    Args:
        spec: `on_nonfinite` and `max_rollbacks`.
        folder: where checkpoints are, and where it is logged.
    """

    def __init__(self, spec: TrainingSpec, folder: RunFolder) -> None:
        self.spec = spec
        self.folder = folder
        self.skipped = 0
        self.rollbacks = 0
        self._in_a_row = 0
        self._rows: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []
        self._logged_loss = torch.tensor(0.0)
        self._schedule: int | None = None

    def summary(self) -> dict[str, int]:
        """For result.json."""
        return {"skipped_steps": self.skipped, "rollbacks": self.rollbacks}

    def note(self, trainer: Trainer, rows: torch.Tensor, loss: torch.Tensor) -> None:
        """Remember a batch of the step that runs, and its loss as a part of the step's."""
        if not self._losses:
            self._logged_loss = trainer._tr_loss.clone()
        self._rows.append(rows)
        self._losses.append(loss)

    def look(self, trainer: Trainer, norm: torch.Tensor | float | None) -> None:
        """Between the backward pass and the update (under DeepSpeed after it, which leaves such a step out by itself).

        Args:
            norm: of the whole gradient, the same on all processes; None where the engine computes none (ZeRO-0).

        Raises:
            UserError: the step is not finite and the run ends, on every process.
        """
        rows, losses, self._rows, self._losses = self._rows, self._losses, [], []
        known = float(_norm_of_weights(trainer.model) if norm is None else norm)
        if math.isfinite(known):
            self._in_a_row = 0
            return
        shares = everyones(
            {
                "loss": float(sum(losses)),
                "rows": torch.cat(rows).tolist(),
                "newest": self._newest_checkpoint() if rank() == 0 else None,
            }
        )
        loss = sum(share["loss"] for share in shares) / len(shares)
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and math.isfinite(loss) and scaler.get_scale() >= 1:
            return  # float16 finds its scale by such steps
        found = {
            "loss": _plain(loss),
            "grad_norm": None if norm is None else _plain(known),
            "rows": [row for share in shares for row in share["rows"]],
        }
        self._act(trainer, found, shares[0]["newest"], applied=norm is None)

    def on_step_end(self, *_: Any, lr_scheduler: Any = None, **__: Any) -> None:
        """Have the learning rate go on where an engine does not count the step that it left out."""
        if self._schedule is not None and lr_scheduler.last_epoch == self._schedule:
            lr_scheduler.step()
        self._schedule = None

    def _act(self, trainer: Trainer, found: dict[str, Any], newest: str | None, applied: bool) -> None:
        action, why, step = self.spec.on_nonfinite, "", trainer.state.global_step + 1
        if action == "skip" and applied:
            action, why = "stop", "; it cannot be skipped, as DeepSpeed without a gradient norm has applied it"
        elif action == "skip" and self._in_a_row + 1 >= IN_A_ROW:
            action, why = "stop", f"; as {IN_A_ROW - 1} steps before it were, so it is not the rows"
        elif action == "rollback" and newest is None:
            action = "stop"
        elif action == "rollback" and self.rollbacks >= self.spec.max_rollbacks:
            action, why = "stop", f"; the run went back {self.rollbacks} times already (training.max_rollbacks)"
        if rank() == 0:
            back = {"back_to": newest} if action == "rollback" else {}
            self.folder.log({"step": step, "nonfinite": {"action": action, **found, **back}})
        if action == "stop":
            raise UserError(_sentence(step, found, why, newest))
        self._schedule = trainer.lr_scheduler.last_epoch
        trainer._tr_loss.copy_(self._logged_loss)  # the step has no part in the mean that is logged next
        trainer._globalstep_last_logged += 1
        if action == "rollback":
            restore(trainer, Path(newest), schedule_goes_on=True)
            self.rollbacks += 1
        else:
            self.skipped += 1
            self._in_a_row += 1
        if trainer.is_deepspeed_enabled:
            gather_kept(trainer.model_wrapped)
        for parameter in trainer.model.parameters():
            parameter.grad = None  # an optimiser leaves what has no gradient as it is, its moments too
        if rank() == 0:
            done = "skipped" if action == "skip" else f"went back to {newest}"
            print(f"step {step} was not finite: {done} (rows are in {self.folder.metrics})", flush=True)

    def _newest_checkpoint(self) -> str | None:
        try:
            return str(found) if (found := self.folder.newest_checkpoint()) else None
        except UserError:  # one that would run code: as good as none
            return None


def _norm_of_weights(model: nn.Module) -> torch.Tensor:
    return torch.stack([p.detach().float().norm() for p in model.parameters() if p.requires_grad]).norm()


def _plain(number: float) -> float | str:
    """JSON has neither NaN nor infinity."""
    return number if math.isfinite(number) else str(number)


def _sentence(step: int, found: dict[str, Any], why: str, newest: str | None) -> str:
    rows = ", ".join(map(str, found["rows"][:SHOWN])) + (", ..." if len(found["rows"]) > SHOWN else "")
    kept = f"{newest} is whole and from before it" if newest else "there is no checkpoint to go back to yet"
    return (
        f"step {step} is not finite (loss {found['loss']}, gradient norm {found['grad_norm']}) on the training rows {rows}{why}: "
        f"{kept}; look at these rows, lower training.learning_rate, or set training.on_nonfinite=skip"
        + (" and --resume" if newest else "")
    )
