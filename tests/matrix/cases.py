"""The table of the matrix: every method with its configurations. A new method joins with a line here and its formula.

The first case of a method is its main one and goes through every cell. The others are variants whose properties differ; they go
through the cells on properties: formula, start, count, gradients, merge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from curvelora import METHODS
from curvelora.method import Method


@dataclass(frozen=True)
class Case:
    """One configuration of a method.

    Args:
        method: its name in the registry.
        options: recipe options; targets and dropout are set by the cells.
        dead: ends of the names of tensors that are known never to get a gradient.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    dead: tuple[str, ...] = ()

    @property
    def entry(self) -> Method:
        """The registry's entry."""
        return METHODS[self.method]

    def config(self, **options: Any) -> PeftConfig:
        """The PEFT config on the query and value projections of the tiny Llama, without dropout, unless `options` say else."""
        common = {"target_modules": ["q_proj", "v_proj"], "dropout": 0.0}
        return self.entry.build_config(**(common | self.options | options))

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.options.items() if k not in ("r", "alpha"))])


MAIN = [
    Case("lora", {"r": 4, "alpha": 8}),
    Case("qlora", {"r": 4, "alpha": 8}),
    Case("loran", {"r": 4, "alpha": 8, "amplitude": 2e-2}),
    Case("ranlora", {"r": 4, "alpha": 8}),
    Case("aurora", {"r": 4, "alpha": 8}),
    Case("sinelora", {"r": 4, "alpha": 8, "frequency": 20.0}),
]
VARIANTS = [
    Case("lora", {"r": 3, "alpha": 9, "use_rslora": True}),
    Case("lora", {"r": 4, "init_lora_weights": "gaussian"}),
    Case("lora", {"r": 4, "init_lora_weights": False}),
    Case("loran", {"r": 4}),
    Case("loran", {"r": 3, "alpha": 9, "amplitude": 2e-2, "scale_position": "inside"}),
    Case("loran", {"r": 4, "init_B_std": 0.02}),
    Case("loran", {"r": 4, "activation": "relu"}, dead=("loran_A", "loran_B")),
    Case("loran", {"r": 4, "activation": "relu", "init_B_std": 0.02}),
    Case("loran", {"r": 1, "activation": "sigmoid"}),
    *(
        Case("loran", {"r": 4, "activation": name})
        for name in ("identity", "tanh", "silu", "swish-25", "cos", "gaussian")
    ),
    Case("loran", {"r": 3, "amplitude": 2e-2, "frequency": 2e3, "learn": "both"}),
    Case(
        "loran",
        {"r": 3, "alpha": 6, "frequency": 2e3, "learn": "both", "granularity": "row", "scale_position": "inside"},
    ),
    Case("loran", {"r": 3, "amplitude": 0.3, "frequency": 100.0, "learn": "frequency", "granularity": "row"}),
    Case("loran", {"r": 3, "amplitude": 0.3, "frequency": 100.0, "learn": "both", "activation": "fourier", "terms": 3}),
    Case(
        "loran", {"r": 3, "amplitude": 0.3, "frequency": 50.0, "learn": "both", "activation": "chebyshev", "terms": 4}
    ),
    Case("loran", {"r": 3, "amplitude": 2e-2, "amplitude_schedule": {"kind": "anneal", "share": 0.8, "start": 0.5}}),
    Case("ranlora", {"r": 3, "init": "P"}),
    Case("ranlora", {"r": 3, "init": "K"}),
    Case("ranlora", {"r": 3, "use_v": False}),
    Case("ranlora", {"r": 3, "v_init": "zeros"}),
    Case("ranlora", {"r": 3, "activation": "relu", "scale_position": "inside"}),
    Case("ranlora", {"r": 3, "activation": "tanh", "factor_scaling": "divided"}),
    Case("ranlora", {"r": 3, "activation": "identity"}),
    Case("ranlora", {"r": 3, "activation": "identity", "factor_scaling": "divided"}),
    Case("ranlora", {"r": 3, "activation": "identity", "scale_position": "none", "init": "P"}),
    Case("ranlora", {"r": 3, "activation": "identity", "init": "K"}),
    Case("aurora", {"r": 3, "mode": "static"}),
    Case("aurora", {"r": 3, "fixed": False}),
    Case("aurora", {"r": 3, "learnable": False}),
    Case("aurora", {"r": 3, "activation": "leaky_relu", "init_A": "xavier"}),
    Case("aurora", {"r": 3, "activation": "sigmoid", "grid_size": 3, "spline_order": 2, "grid_limit": 2.0}),
    Case("sinelora", {"r": 3}),
    Case("sinelora", {"r": 3, "gain": 50, "init_B_std": 0.02}),
]
CASES = [*MAIN, *VARIANTS]
# the main cases of this package's own methods
OURS = [case for case in MAIN if case.entry.provided_by == "curvelora"]

# Methods of the registry that put no layer into the model; they have tests of their own.
WITHOUT_LAYERS = {"linear_probing"}
