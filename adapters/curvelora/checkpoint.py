"""One unquantised weight out of the checkpoint that a quantised model was loaded from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from curvelora.errors import UserError


def unquantised_weight(model: PreTrainedModel, module: str, revision: str | None = None) -> Tensor:
    """Read the weight of `module` as the checkpoint of `model` has it; only this tensor is read.

    Args:
        model: names its checkpoint (`model.config._name_or_path`), a folder or a hub name that is in the local cache.
        module: the module's name in `model`.
        revision: of the checkpoint on the hub; transformers does not tell it.

    Raises:
        UserError: there is no such checkpoint, or it has no such weight in floating point.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if not path:
        raise UserError("the model does not say which checkpoint it was loaded from")
    try:
        files = tensor_files(path, revision)
        wanted = f"{module}.weight"
        name = stored_names(model, files)(wanted)
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


def stored_names(model: PreTrainedModel, names: Iterable[str]) -> Callable[[str], str | None]:
    """The function from a tensor's name in `model` to its name in the checkpoint, None where there is none.

    Args:
        names: what the checkpoint holds.
    """
    # transformers 5 has renamed modules of many architectures, and checkpoints keep the old names
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    stored = {rename_source_key(name, renamings, [])[0]: name for name in names}
    # a checkpoint of the bare model has no prefix, one with a head has it
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def find(wanted: str) -> str | None:
        found = (stored.get(name) for name in (wanted, wanted.removeprefix(prefix), prefix + wanted))
        return next((name for name in found if name is not None), None)

    return find


def stored_tensor_shapes(path: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the headers of a checkpoint's safetensors files.

    Raises:
        UserError: there is no such checkpoint.
    """
    found: dict[str, tuple[int, ...]] = {}
    try:
        for file in sorted(set(tensor_files(path, revision).values())):
            with safe_open(str(file), framework="pt") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {path} cannot be read as safetensors ({str(error).splitlines()[0]})"
        ) from error
    return found


def tensor_files(path: str, revision: str | None) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        whole = Path(cached_file(path, SAFE_WEIGHTS_NAME, revision=revision))
        with safe_open(str(whole), framework="pt") as file:
            return dict.fromkeys(file.keys(), whole)
    folder = Path(index).parent
    names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    return {name: folder / Path(file).name for name, file in names.items()}
