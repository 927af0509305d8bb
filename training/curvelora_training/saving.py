"""The adapter on disk: written under a temporary name, and renamed when it is there; and what every saved adapter has to be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from peft import PeftModel, PeftType, get_peft_model_state_dict
from transformers import Trainer

from curvelora.errors import UserError
from curvelora.loading import stored_shapes
from curvelora_eval.spec import write_task
from curvelora_training.adalora import RANKED
from curvelora_training.checkpoint import temporary_for
from curvelora_training.distributed import agree, rank
from curvelora_training.prepare import Prepared
from curvelora_training.run_folder import RunFolder, whole_or_none


def save_adapter(trainer: Trainer, prepared: Prepared, folder: RunFolder) -> None:
    """Write adapter/; there is a whole adapter or none.

    Raises:
        UserError: it cannot be written, or what was written is not the adapter.
    """
    temporary, problem = temporary_for(folder.adapter), None
    try:
        with whole_or_none(temporary):
            trainer.save_model(str(temporary))
            if rank() == 0:
                write_task(temporary, prepared.recipe.model, prepared.recipe.task)
        if rank() == 0:
            with whole_or_none(temporary):
                shutil.rmtree(folder.adapter, ignore_errors=True)
                os.replace(temporary, folder.adapter)
    except UserError as error:
        problem = error
    agree(problem)


def check_saved(folder: Path, shapes: PeftModel) -> None:
    """Compare the file in `folder` with the adapter: names, and shapes, of which ZeRO-3 elsewhere leaves nothing.

    Args:
        shapes: the model with its adapter, on the meta device.

    Raises:
        UserError: a tensor is missing, foreign or of another shape.
    """
    # with BitFit PEFT also writes the bias of a head that was replaced, and under ZeRO-3 it does not
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(shapes, save_embedding_layers=False).items()
        if ".original_module." not in name
    }
    found = {name: shape for name, shape in stored_shapes(folder).items() if ".original_module." not in name}
    trimmed = shapes.peft_config["default"].peft_type is PeftType.ADALORA
    for name in (*wanted, *found):
        given, shape = found.get(name), wanted.get(name)
        if trimmed and RANKED.search(name) and given and shape and len(given) == len(shape):
            shape = tuple(map(min, given, shape))  # the file has no ranks that lost their budget
        if given != shape:
            raise UserError(
                f"the saved adapter is not whole: {name} has the shape {given} in the file, and {shape} in the model"
            )
