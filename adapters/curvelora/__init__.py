"""Nonlinear low-rank adapters as a plug-in for PEFT: importing this package registers every method."""

from __future__ import annotations

import logging

# On CPUs with bf16 instructions bitsandbytes looks for an optional package at import and warns at every start without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)

from curvelora.activations import Activation
from curvelora.errors import UserError
from curvelora.methods.aurora import AuroraConfig, AuroraModel
from curvelora.methods.loran import LoranConfig, LoranModel
from curvelora.methods.milora import MiloraConfig, MiloraModel
from curvelora.methods.moslora import MosloraConfig, MosloraModel
from curvelora.methods.neat import NeatConfig, NeatModel
from curvelora.methods.olora import OloraConfig, OloraModel
from curvelora.methods.pissa import PissaConfig, PissaModel
from curvelora.methods.ranlora import RanloraConfig, RanloraModel
from curvelora.methods.sinelora import SineloraConfig, SineloraModel
from curvelora.registry import METHODS, get_method
from curvelora.resolvability import Resolvability, measure_resolvability, model_resolvability

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "Activation",
    "AuroraConfig",
    "AuroraModel",
    "LoranConfig",
    "LoranModel",
    "MiloraConfig",
    "MiloraModel",
    "MosloraConfig",
    "MosloraModel",
    "NeatConfig",
    "NeatModel",
    "OloraConfig",
    "OloraModel",
    "PissaConfig",
    "PissaModel",
    "RanloraConfig",
    "RanloraModel",
    "Resolvability",
    "SineloraConfig",
    "SineloraModel",
    "UserError",
    "get_method",
    "measure_resolvability",
    "model_resolvability",
]
