"""The table of the matrix: every method with its configurations. A new method joins with a line here and its formula.

The first case of a method is its main one and goes through every cell. The others are variants whose properties differ; they go
through the cells on properties: formula, start, count, gradients, merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig

from curvelora import METHODS
from curvelora.method import Method

# What a method that PEFT provides may lack there (0.21) -> what the cells that are left out are about.
LACKS = {
    "rank": "a rank r, and patterns of ranks",
    "alpha": "an alpha by which the whole update is multiplied",
    "dropout": "dropout",
    "base apart": "dropout that leaves the base's own path alone",
    "fp64": "layers in fp64: the update is computed in fp32",
    "transposed": "layers that store their weight transposed",
    "vectors": "inputs without a leading dimension",
    "int8": "a base in int8 on a CPU",
    "second": "a second adapter on the model that is to train as well",
    "sums": "two active adapters that add up",
    "rows": "rows with adapters of their own",
    "refused rows": "an error where rows name adapters: PEFT ignores the names",
    "full graph": "torch.compile without graph breaks",
}
SIZES = ("r", "alpha", "init_r", "target_r", "total_step", "n_frequency")  # options that do not name a case


@dataclass(frozen=True)
class Case:
    """One configuration of a method.

    Args:
        method: its name in the registry.
        options: recipe options; targets and dropout are set by the cells.
        dead: ends of the names of tensors that are known never to get a gradient.
        lacks: what PEFT's implementation of the method does not have, of the names in `LACKS`; cells about it are left out.
        tensors: how many tensors of a layer train, at least.
        sized: rank -> the options that stand for it, where the method has no `r`.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    dead: tuple[str, ...] = ()
    lacks: frozenset[str] = frozenset()
    tensors: int = 2
    sized: Callable[[int], dict[str, Any]] = lambda r: {"r": r}

    def __post_init__(self) -> None:
        assert self.lacks <= LACKS.keys(), self.lacks

    @property
    def entry(self) -> Method:
        """The registry's entry."""
        return METHODS[self.method]

    def config(self, **options: Any) -> PeftConfig:
        """The PEFT config on the query and value projections of the tiny Llama, without dropout, unless `options` say else.

        `r` becomes what stands for it, and a dropout is left out where the method has none.
        """
        common = {"target_modules": ["q_proj", "v_proj"], "dropout": 0.0}
        given = common | self.options | (self.sized(options.pop("r")) if "r" in options else {}) | options
        if "dropout" in self.lacks:
            del given["dropout"]
        return self.entry.build_config(**given)

    def has(self, *features: str) -> bool:
        """Whether the cells about all of `features` apply."""
        return not self.lacks & set(features)

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype in which a layer can be compared with its formula."""
        return torch.float64 if self.has("fp64") else torch.float32

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.options.items() if k not in SIZES)])


MAIN = [
    Case("lora", {"r": 4, "alpha": 8}),
    Case("qlora", {"r": 4, "alpha": 8}),
    Case("loran", {"r": 4, "alpha": 8, "amplitude": 2e-2}),
    Case("ranlora", {"r": 4, "alpha": 8}),
    Case("aurora", {"r": 4, "alpha": 8}),
    Case("neat", {"r": 4, "alpha": 8}),
    Case("moslora", {"r": 4, "alpha": 8}),
    Case("pissa", {"r": 4, "alpha": 8}),
    Case("milora", {"r": 4, "alpha": 8}),
    Case("olora", {"r": 4, "alpha": 8}),
    Case(
        "dora",
        {"r": 4, "alpha": 8},
        lacks=frozenset(["alpha", "base apart", "vectors", "int8", "sums", "rows", "full graph"]),
    ),
    Case(
        "adalora",
        {"init_r": 4, "target_r": 2, "alpha": 8, "total_step": 100},
        lacks=frozenset(["rank", "second", "rows", "refused rows"]),
        sized=lambda r: {"init_r": max(r, 2), "target_r": 1},
    ),
    Case(
        "fourierft",
        {"n_frequency": 60},
        lacks=frozenset(["rank", "alpha", "dropout", "base apart", "fp64", "rows", "refused rows"]),
        tensors=1,
        sized=lambda r: {"n_frequency": r},
    ),
    Case("delora", {"r": 4}, lacks=frozenset(["alpha", "transposed", "rows", "refused rows"])),
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
    Case("dora", {"r": 3, "use_rslora": True}),
    Case("adalora", {"init_r": 4, "target_r": 2, "total_step": 9, "init_lora_weights": False}),
    Case("fourierft", {"n_frequency": 60, "init_weights": True}, tensors=1, lacks=frozenset(["dropout", "fp64"])),
    Case("delora", {"r": 3, "init_weights": False}),
    Case("aurora", {"r": 3, "mode": "static"}),
    Case("aurora", {"r": 3, "fixed": False}),
    Case("aurora", {"r": 3, "learnable": False}),
    Case("aurora", {"r": 3, "activation": "leaky_relu", "init_A": "xavier"}),
    Case("aurora", {"r": 3, "activation": "sigmoid", "grid_size": 3, "spline_order": 2, "grid_limit": 2.0}),
    Case("moslora", {"r": 3, "mixer_init": "orthogonal"}),
    Case("neat", {"r": 3, "depth": 2}),
    Case("neat", {"r": 3, "depth": 1, "activation": "tanh", "alpha": "r"}),
    Case("sinelora", {"r": 3}),
    Case("sinelora", {"r": 3, "gain": 50, "init_B_std": 0.02}),
]
# PEFT's LoRA with one of its switches set: in the cells on properties only, as variants are
VARIANTS += [Case("rslora", {"r": 4, "alpha": 8})]
CASES = [*MAIN, *VARIANTS]


def those_with(*features: str) -> list[Case]:
    """The main cases whose method has all of `features`."""
    return [case for case in MAIN if case.has(*features)]


# the main cases of this package's own methods
OURS = [case for case in MAIN if case.entry.provided_by == "curvelora"]

# Methods of the registry that put no layer into the model, or rewrite the base under it; they have tests of their own.
APART = {"linear_probing", "bitfit", "full", "pissa_rewritten_base"}
