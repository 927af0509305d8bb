"""A run that was asked to stop: all processes agree on it after a step, an evaluation batch or a save, save once and leave.

Agreeing is one all-reduce of a single number a step. The trainer waits for the device after every step anyway (step times).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curvelora.errors import UserError
from curvelora_training.distributed import agree, everyones, rank, world_size
from curvelora_training.run_folder import RunFolder
from curvelora_training.signals import ASKED, Stopped


class EvaluationCut(Exception):
    """An evaluation is not brought to its end."""


def asked(device: torch.device) -> int:
    """The exit code with which some process was asked to leave, 0 for none. Every process has to call it."""
    if world_size() == 1:
        return ASKED.code
    code = torch.tensor(ASKED.code, device=device)
    torch.distributed.all_reduce(code, op=torch.distributed.ReduceOp.MAX)
    return int(code)


def stop_before_training(device: torch.device) -> None:
    """Raise `Stopped`, on every process, where one was asked to stop; from here on signals wait for the end of a step."""
    ASKED.let_through(False)
    if code := asked(device):
        raise Stopped(code, "stopped before the first step, so there was nothing to save: start again")


def with_the_first(work: Callable[[], None]) -> None:
    """Do on the first process what is left for it alone, while the others wait; all of them leave as it does.

    Nobody waits for the others any more, so a signal ends the work at once.

    Raises:
        Stopped: on every process; a signal asked the first one.
        UserError: on every process; what the work raised.
    """
    code, problem = 0, None
    if rank() == 0:
        try:  # around all of it: a signal may come between two lines, and the others have to learn of it
            ASKED.let_through(True)
            try:
                work()
            except UserError as error:
                problem = error
            ASKED.let_through(False)
        except Stopped as stopped:
            code = stopped.code
    agree(problem)
    if code := everyones(code)[0]:
        raise Stopped(code, "stopped while the test rows were scored: continue with the same command and --resume")


def evaluation_left(folder: RunFolder, step: int) -> bool:
    """Whether the attempt that wrote the checkpoint of this step left out an evaluation, which the next one makes up for."""
    stopped = folder.logged("stopped")
    return stopped is not None and stopped["at"] == step and stopped["evaluation_left"]


class StopWhenAsked(TrainerCallback):
    """Ends training where a signal asked for it, with one checkpoint of the last step that was made."""

    def __init__(self) -> None:
        self.code = 0
        self.evaluation_left = False
        self._saved: int | None = None

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        stop_before_training(args.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._asked(args):
            control.should_training_stop = True
            if not float(
                state.epoch
            ).is_integer():  # else at the end of the epoch, which may have an evaluation before it
                control.should_save = control.should_log = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._asked(args):
            self.evaluation_left = True
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
            raise EvaluationCut

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = state.global_step
        if self._asked(args):
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Also where training stops in the middle of an epoch: the trainer would then evaluate and save once more."""
        if self._asked(args):
            control.should_training_stop = True
            control.should_log = control.should_save = self._saved != state.global_step
            control.should_evaluate = control.should_evaluate and control.should_save

    def leave(self, folder: RunFolder, step: int) -> None:
        """After training: raise `Stopped`, on every process, where it was cut short by a signal."""
        if not self.code:
            return
        if rank() == 0:
            left = {"at": step, "code": self.code, "evaluation_left": self.evaluation_left}
            folder.log({"step": step, "stopped": left})
        where = folder.checkpoints / f"checkpoint-{step}"
        raise Stopped(
            self.code, f"stopped after step {step}, saved as {where}: continue with the same command and --resume"
        )

    def _asked(self, args: TrainingArguments) -> int:
        self.code = self.code or asked(args.device)
        return self.code
