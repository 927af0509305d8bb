"""A run under an engine against one process on the same global batches: how far apart they are, and which engine ran."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from curvelora_training.matrix.cells import DDP, FSDP, Bounds, Cell, bounds

# Shifts below are compared as if they were this. Each is a difference of outputs that are rounded: in fp32 to 1e-7, so that one
# of 1e-5 (a RanLoRA whose start is its base to first order) is known to 1 % only; on half-precision bases to 4e-3, which is as
# much as DoRA's start there (PEFT rounds its magnitudes to bf16).
SMALL_SHIFT = {"fp32": 1e-4}
SMALL_SHIFT_ROUNDED = 0.1
FROZEN = {"fp32": "float32", "bf16": "bfloat16", "nf4": "bfloat16, uint8", "int8": "bfloat16, int8"}


def compare(cell: Cell, run: Path, alone: Path, processes: int) -> tuple[dict[str, float], list[str]]:
    """(What was measured, what is wrong with it).

    Args:
        run: run folder of the cell.
        alone: run folder of the one process.
    """
    measured: dict[str, float] = {}
    wrong = engine_problems(cell, _read(run, "result.json")["engine"], processes)
    limits = bounds(cell)
    for kind in ("loss", "eval_loss"):
        given, wanted = ([line[kind] for line in _lines(f) if kind in line] for f in (run, alone))
        if len(given) != len(wanted) or not given:
            wrong.append(f"{len(given)} values of {kind}, and one process has {len(wanted)}")
            continue
        measured[kind] = max(map(relative, given, wanted))
    shifts = [(_read(f, "result.json")["start_shift"] or {}).get("relative") or 0.0 for f in (run, alone)]
    small = SMALL_SHIFT.get(cell.base, SMALL_SHIFT_ROUNDED)
    measured["start_shift"] = abs(shifts[0] - shifts[1]) / max(shifts[1], small)
    scores = [_read(f, "evaluation.json") for f in (run, alone)]
    measured["score"] = relative(*(s["metrics"][s["primary_metric"]]["value"] for s in scores))
    measured |= _adapters(run, alone, wrong)
    return measured, wrong + _beyond(measured, limits)


def relative(given: float | None, wanted: float | None) -> float:
    """|given - wanted| / |wanted|; infinite where one of them is no number (null in the files of a run that diverged)."""
    if given is None or wanted is None:
        return math.inf
    if given == wanted:
        return 0.0
    found = abs(given - wanted) / abs(wanted) if wanted else math.inf
    return found if math.isfinite(found) else math.inf


def engine_problems(cell: Cell, used: dict[str, Any], processes: int) -> list[str]:
    """What of `engine` in result.json is not as the cell asks."""
    engine = {DDP: "DistributedDataParallel", FSDP: "FSDP2"}.get(cell.engine, "DeepSpeedEngine")
    wanted = {"engine": engine, "zero_stage": cell.stage, "processes": processes, "trainable_dtype": "float32"}
    if cell.method != "full":
        wanted["frozen_dtype"] = FROZEN[cell.base]
    found = [f"{key} is {used[key]!r}, not {value!r}" for key, value in wanted.items() if used[key] != value]
    least = most = 1 / processes if cell.stage == 3 or cell.engine == FSDP else 1
    if cell.engine == FSDP:
        most = (least + 1) / 2  # positions, tied embeddings and what lies outside of layers stay whole
    elif cell.stage == 3:
        most = 1.1 * least  # norms outside of layers and block scales stay whole
    if not least - 0.01 <= used["share_of_base"] <= most + 0.01:
        found.append(f"share_of_base is {used['share_of_base']:.3f}, not {most:.3f}")
    return found


def _adapters(run: Path, alone: Path, wrong: list[str]) -> dict[str, float]:
    """The largest and the mean absolute difference of a tensor's entries, over all tensors of the adapter."""
    given, wanted = (load_file(f / "adapter/adapter_model.safetensors") for f in (run, alone))
    largest = mean = 0.0
    for name, tensor in wanted.items():
        if ".original_module." in name:  # see curvelora_training.saving.check_saved
            continue
        if name not in given or given[name].shape != tensor.shape:
            wrong.append(f"the saved adapter has no {name} of the shape {tuple(tensor.shape)}")
            continue
        if not tensor.numel():  # AdaLoRA may leave a layer no rank
            continue
        apart = (given[name].double() - tensor.double()).abs()
        # what fp32 can hold of a large entry is no difference
        beyond = (apart - 1e-4 * tensor.double().abs()).clamp(min=0).max().item()
        if not math.isfinite(beyond):  # NaN is above nothing
            beyond = math.inf
        largest, mean = max(largest, beyond), max(mean, apart.mean().item())
    return {"largest_entry": largest, "mean_entry": mean}


def _beyond(measured: dict[str, float], limits: Bounds) -> list[str]:
    limit = {
        "loss": limits.loss,
        "eval_loss": limits.loss,
        "start_shift": limits.shift,
        "score": limits.score,
        "largest_entry": limits.largest_entry,
        "mean_entry": limits.mean_entry,
    }
    return [f"{k} differs by {v:.2g}, and {limit[k]:g} is the most" for k, v in measured.items() if not v <= limit[k]]


def _read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["step"] > 0]
