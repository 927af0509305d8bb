"""A dispatch mode that looks into this package's own operators, which PyTorch would show as one call each."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from curvelora.layers import dense_delta

OPERATORS = {
    "curvelora::dense_delta_product": dense_delta._product._init_fn,
    "curvelora::dense_delta_gradients": dense_delta._gradients._init_fn,
}


class InsideOperators(TorchDispatchMode):
    """Calls `see(func, args, result)` around every ATen operation; a subclass defines it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        implementation = OPERATORS.get(func._schema.name)
        if implementation is not None:
            with self:
                return implementation(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.see(func, args, result)
        return result

    def see(self, func: Any, args: tuple, result: Any) -> None:
        """Note one operation."""
        raise NotImplementedError
