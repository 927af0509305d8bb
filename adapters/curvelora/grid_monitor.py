"""How often AuroRA's spline is asked beyond its grid, where it fades out and then has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvelora.methods.aurora import AuroraLayer
from curvelora.spline import Grid


class GridMonitor:
    """Counts the spline inputs of every AuroRA layer of a model in training passes; attach it by creating it.

    Counts stay on the device until `take`. Recomputation under gradient checkpointing counts a pass twice, which leaves the
    shares as they are.

    Args:
        model: any model with AuroRA layers, or without.
        adapter: whose inputs to count.
    """

    def __init__(self, model: nn.Module, adapter: str = "default") -> None:
        self.adapter = adapter
        self.counts: Tensor | None = None  # beyond the grid, beyond the support, all
        for module in model.modules():
            if isinstance(module, AuroraLayer) and adapter in module.aurora_spline:
                module.grid_monitor = self

    @torch.no_grad()
    def see(self, adapter: str, z: Tensor, grid: Grid) -> None:
        """Count the entries of z, where it is of the monitor's adapter."""
        if adapter != self.adapter:
            return
        beyond_grid = (z < grid.low) | (z > grid.high)
        beyond_support = (z < grid.support[0]) | (z > grid.support[1])
        # a count on the device: a Python number would make torch.compile start again with every pass
        found = torch.stack([beyond_grid.sum(), beyond_support.sum(), beyond_grid.sum().new_full((), z.numel())])
        if self.counts is None:
            self.counts = torch.zeros_like(found)
        self.counts += found.to(self.counts.device)

    def take(self) -> dict[str, float] | None:
        """Shares of inputs `beyond_grid` and `beyond_support` since the last call; None where there were none."""
        grid, support, total = (0, 0, 0) if self.counts is None else self.counts.tolist()
        if not total:
            return None
        self.counts.zero_()
        return {"beyond_grid": grid / total, "beyond_support": support / total}
