"""One unquantised weight out of the checkpoint that a quantised model was loaded from."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from curvelora.errors import UserError


def unquantised_weight(model: PreTrainedModel, module: str) -> Tensor:
    """Read the weight of `module` as the checkpoint of `model` has it; only this tensor is read.

    Args:
        model: names its checkpoint (`model.config._name_or_path`), a folder or a hub name that is in the local cache.
        module: the module's name in `model`.

    Raises:
        UserError: there is no such checkpoint, or it has no such weight in floating point.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if not path:
        raise UserError("the model does not say which checkpoint it was loaded from")
    try:
        files = _tensor_files(path)
        wanted = f"{module}.weight"
        # a checkpoint of the bare model has no prefix, one with a head has it
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        names = (wanted, wanted.removeprefix(prefix), prefix + wanted)
        name = next((name for name in names if name in files), None)
        if name is None:
            raise UserError(f"the checkpoint {path} has no tensor {wanted}")
        with safe_open(str(files[name]), framework="pt") as file:
            weight = file.get_tensor(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the checkpoint {path} cannot be read as safetensors ({str(error).splitlines()[0]})"
        ) from error
    if not weight.is_floating_point() or weight.ndim != 2:
        raise UserError(f"the checkpoint {path} is quantised itself: {name} is {weight.dtype}")
    return weight


def _tensor_files(path: str) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        whole = Path(cached_file(path, SAFE_WEIGHTS_NAME))
        with safe_open(str(whole), framework="pt") as file:
            return dict.fromkeys(file.keys(), whole)
    folder = Path(index).parent
    names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    return {name: folder / Path(file).name for name, file in names.items()}
