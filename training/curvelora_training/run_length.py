"""How long a run is, before there is a trainer that could say: for schedules that must end within it."""

from __future__ import annotations

import math

from curvelora_training.config import TrainingSpec
from curvelora_training.distributed import world_size


def optimiser_steps(spec: TrainingSpec, rows: int) -> int:
    """Optimiser steps of a run on `rows` training rows, as transformers' Trainer counts them."""
    if spec.max_steps is not None:
        return spec.max_steps
    return math.ceil(spec.epochs * math.ceil(rows / (spec.batch_size * spec.accumulation * world_size())))
