"""Fine-tuning entry points for nonlinear low-rank adapters."""

from __future__ import annotations

__version__ = "0.1.0"
