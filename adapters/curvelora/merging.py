"""Whether an adapter can be added to the base weight, and what a user says to merge one that can be only approximately."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from contextvars import ContextVar

from torch import nn

_approximate_allowed: ContextVar[bool] = ContextVar("approximate_allowed", default=False)


class Merge(enum.StrEnum):
    """Whether the update can be added to the base weight: `exact`, `approximate`, `impossible` or `when_annealed`."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    IMPOSSIBLE = "impossible"
    WHEN_ANNEALED = "when_annealed"

    @property
    def meaning(self) -> str:
        """The same in plain words."""
        return {
            Merge.EXACT: "the update can be added to the base weight and nothing changes but rounding",
            Merge.APPROXIMATE: "merging gives another function; it has to be allowed, and its gap should be measured first",
            Merge.IMPOSSIBLE: "no change of the base weight equals it; it is served as an adapter",
            Merge.WHEN_ANNEALED: "exact once its nonlinearity has been annealed away, impossible before",
        }[self]


@contextlib.contextmanager
def allow_approximate() -> Iterator[None]:
    """Inside, merging an adapter that merges only approximately is allowed: `with allow_approximate(): model.merge_adapter()`.

    Measure what it changes first, with `curvelora.output_change.merge_gap`.
    """
    token = _approximate_allowed.set(True)
    try:
        yield
    finally:
        _approximate_allowed.reset(token)


def approximate_is_allowed() -> bool:
    """Whether this code runs inside `allow_approximate`."""
    return _approximate_allowed.get()


@contextlib.contextmanager
def merged_form(model: nn.Module) -> Iterator[None]:
    """Inside, every adapter of `model` acts as it would after merging, and no weight is touched.

    So a merge can be judged on any base, also one that cannot take it, and apart from the rounding of merged weights.

    Raises:
        UserError: an active adapter that cannot be merged.
    """
    from curvelora.layers.adapter_layer import AdapterLayer

    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    with allow_approximate():
        for layer in layers:
            layer.check_merge([name for name in layer.active_adapters if name in layer.configs])
    try:
        for layer in layers:
            layer.in_merged_form = True
        yield
    finally:
        for layer in layers:
            layer.in_merged_form = False
