"""One base model in memory for many adapters: each is put on, used, and taken off again without a trace, which is proved.

An adapter replaces modules inside the base. Taking it off puts every module, parameter and buffer back in its place; a checksum
over all of them, taken before the first adapter, then shows whether the base is what it was. Where it is not (biases that were
trained in place, a merge), the base is loaded again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvelora.loading import load_adapter

Checksum = dict[str, tuple[Any, ...]]
PLACES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


def checksum(model: nn.Module) -> Checksum:
    """Name -> dtype, shape and two sums over the bits of every parameter and buffer; exact, and quick on any device."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (str(tensor.dtype), tuple(tensor.shape), *_bit_sums(tensor)) for name, tensor in named}


def _bit_sums(tensor: torch.Tensor) -> tuple[int, int]:
    """Sums over all bits as whole numbers, and over every second of them (which a swap of neighbours changes)."""
    if tensor.numel() == 0:
        return 0, 0
    size = tensor.element_size()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size, torch.uint8)
    bits = tensor.detach().contiguous().reshape(-1).view(whole)
    return int(bits.sum(dtype=torch.int64)), int(bits[::2].sum(dtype=torch.int64))


class LoadedBase:
    """A base model that adapters are put on one after another.

    Args:
        load: loads the base; called at first use, and again where an adapter left something behind.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._model: nn.Module | None = None
        self._places: list[tuple[nn.Module, dict[str, dict[str, Any]]]] = []
        self._before: Checksum = {}
        self.loads = 0

    def bare(self) -> nn.Module:
        """The base without an adapter."""
        if self._model is None:
            self._model = self._load()
            self.loads += 1
            self._places = [(m, {name: dict(getattr(m, name)) for name in PLACES}) for m in self._model.modules()]
            self._before = checksum(self._model)
        return self._model

    def put_on(self, adapter: Path) -> nn.Module:
        """The base with the adapter in this folder, in eval mode.

        Raises:
            UserError: as `load_adapter`.
        """
        return load_adapter(self.bare(), adapter).eval()

    def take_off(self) -> str | None:
        """Put everything of the base back in its place and prove it.

        Returns:
            None where the base is what it was; otherwise a sentence, and the next use loads it again.
        """
        if self._model is None:
            return None
        for module, places in self._places:
            for name, before in places.items():
                kept = getattr(module, name)
                kept.clear()
                kept.update(before)
        self._model.requires_grad_(False)
        self._model.eval()
        for name in ("peft_config", "peft_type", "active_adapter"):
            self._model.__dict__.pop(name, None)
        self._model._hf_peft_config_loaded = False
        after = checksum(self._model)
        changed = [name for name in self._before if self._before[name] != after.get(name)]
        if not changed and len(after) == len(self._before):
            return None
        shown = ", ".join(changed[:2]) + (f" and {len(changed) - 2} more" if len(changed) > 2 else "")
        self.drop()
        return f"it changed the base itself ({shown or 'new tensors'}), which is loaded again before the next use"

    def drop(self) -> None:
        """Free the memory."""
        self._model, self._places = None, []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
