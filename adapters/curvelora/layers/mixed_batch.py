"""One batch whose rows use different adapters: `model(ids, adapter_names=["a", "__base__", "b"])`, as for PEFT's LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from curvelora.errors import UserError, nearest
from curvelora.layers.adapter_layer import AdapterLayer

BASE = "__base__"


@contextlib.contextmanager
def rows_with_adapters(model: nn.Module, names: list[str], beams: int) -> Iterator[None]:
    """Inside, every adapter layer of `model` gives row i of its input to the adapter `names[i]` ("__base__" for none).

    Args:
        names: one a row.
        beams: beam search repeats every row that many times, except in an encoder.

    Raises:
        UserError: the model is training, or a name that no layer has.
    """
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    known = {name for layer in layers for name in layer.configs}
    if model.training:
        raise UserError("adapter_names chooses an adapter for each row at inference only: call model.eval() first")
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise UserError(
            f"adapter_names has {', '.join(map(repr, unknown))}{nearest(unknown[0], known)} "
            f"(known: {', '.join(sorted(known))}; {BASE} is the model without an adapter)"
        )
    repeated = [name for name in names for _ in range(beams)]
    encoder = _encoder(model)
    of_encoder = set(encoder.modules()) if encoder is not None else set()
    handles = [
        module.register_forward_pre_hook(_passing(names if module in of_encoder else repeated), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, AdapterLayer | AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _passing(names: list[str]) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"adapter_names": names}

    return hook


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder; transformers gives any other model itself."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder
