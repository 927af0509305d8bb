"""The cells: a task, a base, a method and an engine; what each sets in the recipe, and which are refused and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curvelora import METHODS
from curvelora_training.matrix.ground import ROWS, TASKS

# base -> what it sets in the recipe
BASES = {
    "fp32": ["model.dtype=float32"],
    "bf16": ["model.dtype=bfloat16"],
    "nf4": ["model.dtype=bfloat16", "model.quantization=nf4"],
    "int8": ["model.dtype=bfloat16", "model.quantization=int8"],
}
ALONE = "alone"  # one process on the same global batches
DDP, FSDP = "ddp", "fsdp2"
WHOLE = ("bitfit", "full", "linear_probing")  # methods without layers of their own, and so without a rank
OWN = {"fourierft": {"n_frequency": 50}, "adalora": {"init_r": 4, "target_r": 2}}


@dataclass(frozen=True)
class Cell:
    """One run. `engine` is "alone", "ddp", "fsdp2", or "zero" and what follows it in the name of its DeepSpeed file."""

    task: str
    base: str
    method: str
    engine: str
    launcher: str | None = None
    """None: in the process group that all such cells share."""

    @property
    def name(self) -> str:
        return ".".join(filter(None, (self.launcher, self.task, self.base, self.method, self.engine)))

    @property
    def stage(self) -> int | None:
        return int(self.engine[4]) if self.engine.startswith("zero") else None

    @property
    def environment(self) -> dict[str, str]:
        """What `accelerate launch` would set for this engine, for which recipes have no word."""
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if self.engine == FSDP else {}

    @property
    def alone(self) -> Cell:
        """The cell that this one has to agree with."""
        return Cell(self.task, self.base, self.method, ALONE)

    def overrides(self, configs: str, processes: int, targets: list[str] | None) -> list[str]:
        """What the cell sets in its task's recipe.

        Args:
            configs: folder of the DeepSpeed files.
            targets: modules to adapt; PEFT's default where None.
        """
        found = [f"adapter={json.dumps(self._adapter(targets))}", *BASES[self.base]]
        if self.engine == ALONE:
            # evaluation too: where the loss is a mean over tokens, several processes divide by the tokens of all of them
            found += [f"training.{name}={ROWS * processes}" for name in ("batch_size", "eval_batch_size")]
        elif self.stage is not None:
            found.append(f"training.deepspeed={configs}/{self.engine}.json")
        return found

    def _adapter(self, targets: list[str] | None) -> dict[str, Any]:
        """Small settings of the method, without dropout: its masks differ between one process and two."""
        own: dict[str, Any] = {"method": self.method}
        if self.method not in WHOLE:
            own |= {"target_modules": targets} if targets else {}
            own |= OWN.get(self.method, {"r": 4})
            if self.method not in (*OWN, "delora"):
                own |= {"alpha": 8, "dropout": 0.0}
        return own


@dataclass(frozen=True)
class Refusal:
    """A combination that is refused before anything is loaded: what applies, a part of the message, and why."""

    applies: Callable[[Cell], bool]
    said: str
    why: str


def _storage(cell: Cell) -> str:
    return cell.base if cell.base in ("nf4", "int8") else "none"


REFUSALS = (
    Refusal(
        lambda c: METHODS[c.method].required_quantization not in (None, _storage(c)),
        "means an adapter on a base in",
        "the method's name means LoRA on a base in NF4; on others it is `lora`",
    ),
    Refusal(
        lambda c: _storage(c) not in METHODS[c.method].bases,
        "does not work on a base in",
        "the method needs or changes the unquantised weights",
    ),
    Refusal(
        lambda c: c.method == "adalora" and c.stage is not None,
        "DeepSpeed has cleared them by then",
        "AdaLoRA ranks by the gradients after each optimiser step, and DeepSpeed has cleared them by then",
    ),
    Refusal(
        lambda c: c.method == "delora" and c.stage == 3,
        "which PEFT takes of ZeRO-3's placeholders",
        "DeLoRA needs the norms of the weights, which PEFT takes of ZeRO-3's empty placeholders",
    ),
    Refusal(
        lambda c: c.method == "dora" and c.base == "nf4" and c.stage == 3,
        "PEFT make another weight of the one that ZeRO-3 keeps in shares",
        "PEFT makes another weight of the one in NF4 for DoRA, which ZeRO-3 does not know (the process group died of it)",
    ),
    Refusal(
        lambda c: c.base == "int8" and c.stage == 3,
        "keeps its codes where ZeRO-3 does not look",
        "bitsandbytes keeps the codes of int8 layers where ZeRO-3 does not look, so every process would hold all of them",
    ),
    Refusal(
        lambda c: c.method == "full" and c.base == "bf16" and c.stage == 3,
        "what trains has to be float32",
        "what trains has to be fp32, and ZeRO-3 loads all of the base, which trains here, in bf16",
    ),
    Refusal(
        lambda c: c.base in ("nf4", "int8") and c.engine == FSDP,
        "which FSDP2 cannot share",
        "a quantised weight is bytes with scales beside them, which FSDP2 cannot share",
    ),
    Refusal(
        lambda c: c.method == "full" and c.engine == FSDP,
        "leaves nothing frozen for FSDP2",
        "full fine-tuning leaves nothing frozen, and only that lies in shares with FSDP2 here",
    ),
    Refusal(
        lambda c: c.method == "bitfit" and c.base != "fp32",
        "trains biases in fp32",
        "biases that train are fp32, and a half-precision model cannot add them to its own numbers",
    ),
    Refusal(
        lambda c: c.method == "bitfit" and c.task == "lm",
        "bias",
        "Llama's linear layers have no biases to train",
    ),
    Refusal(
        lambda c: c.method == "linear_probing" and c.task == "lm",
        "trains a new head",
        "a language model has no new head to train",
    ),
)


def refusal(cell: Cell) -> Refusal | None:
    """Why the cell is refused, or None where it has to train."""
    return next((rule for rule in REFUSALS if rule.applies(cell)), None)


@dataclass(frozen=True)
class Bounds:
    """How far a cell may be from one process: relative, but for the adapter's entries, which are absolute."""

    loss: float
    largest_entry: float
    mean_entry: float
    score: float
    shift: float = 1e-3


def bounds(cell: Cell) -> Bounds:
    """The bounds of this cell.

    Four steps move an entry by up to 2.5e-3, and AdamW's first ones go by the signs of gradients, which rounding decides where
    they are zero but for rounding: the largest difference says little then, the mean one has to be far smaller.
    """
    if cell.base != "fp32":
        return Bounds(loss=2e-3, largest_entry=3e-3, mean_entry=2.5e-4, score=0.2)
    if cell.method == "full" and cell.task == "lm":
        return Bounds(loss=1e-4, largest_entry=3e-3, mean_entry=2.5e-4, score=1e-3)
    return Bounds(loss=1e-5, largest_entry=1e-5, mean_entry=2.5e-4, score=1e-5)


def all_cells(tasks: list[str], bases: list[str], methods: list[str], engines: list[str]) -> list[Cell]:
    """Every combination, refused ones too; engine by engine."""
    return [Cell(t, b, m, e) for t in tasks for b in bases for e in engines for m in methods]


def launched_cells(cell: Cell, launchers: list[str], engines: list[str]) -> list[Cell]:
    """The method of `cell` under every launcher and engine.

    deepspeed's launcher always means DeepSpeed, and FSDP2 is asked for in Accelerate's configuration alone.
    """
    only = {DDP: ("torchrun", "accelerate"), FSDP: ("accelerate",)}
    return [
        Cell(cell.task, cell.base, cell.method, engine, launcher)
        for launcher in launchers
        for engine in engines
        if "_" not in engine and launcher in only.get(engine, (launcher,))
    ]


def default_targets(task: str, model: str | None) -> list[str] | None:
    """The modules to adapt in the tiny models; None, PEFT's own choice, in others."""
    return list(TASKS[task][1]) if model is None else None
