"""One run of a comparison: an arm with a seed, from its start to its held-out loss, with everything that is looked at on the way.

A run folder has steps.jsonl (a line a step), presence.jsonl (a line a look), path.safetensors (sketches of dW), adapter/ (the
trained adapter) and, last of all, run.json: a folder without it is not finished.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from curvelora_eval.environment import describe_environment
from curvelora_eval.files import write_json
from curvelora_eval.lab.approximation import approximation
from curvelora_eval.lab.path import Sketcher
from curvelora_eval.lab.presence import capture_inputs, measure_presence, summarise_presence
from curvelora_eval.lab.sharpness import adapter_sharpness
from curvelora_eval.lab.spectra import base_subspaces, by_module_type, spectra
from curvelora_eval.lab.updates import adapted_layers, base_weight, update_weight
from curvelora_training.bench.arms import FULL, Arm
from curvelora_training.bench.ground import Ground
from curvelora_training.bench.settings import PROBES
from curvelora_training.bench.step_graph import start_trial
from curvelora_training.bench.trial import Trial
from curvelora_training.distributed import rank, world_size

DIVERGED_AFTER = 10  # losses in a row that are not finite end a run: nothing comes back from there
FLUSH = 10  # steps between two writes, since reading a value waits for the device
SHARPNESS_TOLERANCE = 1e-2
SPECTRA_LAYERS = 28  # at most so many, spread evenly: four blocks of seven
APPROXIMATED_LAYERS, APPROXIMATION_TOKENS = 3, 1024
LOOK_TOKENS, TOKENS_A_RANK = 256, 16  # least number of tokens; best linear maps of rank r need many times r of them


def make_run(
    ground: Ground, arm: Arm, seed: int, folder: Path, progress: Callable[[int, float], None]
) -> dict[str, Any]:
    """Train one arm with one seed and write its folder; returns run.json.

    Args:
        progress: is told the step and the loss now and then.
    """
    settings, started = ground.settings, time.perf_counter()
    trial, prepare = start_trial(ground, arm, seed)
    notes = _Notes(folder, trial, ground, arm, seed) if rank() == 0 else None
    # a look costs as much as several steps, so a short run has fewer
    looks = look_steps(settings.steps, min(settings.looks, math.ceil(settings.steps / 5)))
    if notes and 0 in looks:
        notes.look(0)
    status, lost, pending = "completed", 0, []
    for step in range(settings.steps):
        batch = prepare(ground.source.batch(seed, step, rank(), world_size()))
        rate = trial.how.factor(step) * trial.how.learning_rate
        pending.append((step + 1, rate, trial.step(batch, observe=True)))
        last = step + 1 == settings.steps
        if len(pending) < FLUSH and not last and step + 1 not in looks:
            continue
        lines = [step_line(*entry, settings.max_grad_norm) for entry in pending]
        pending = []
        for line in lines:
            lost = 0 if line["loss"] is not None else lost + 1
        if notes:
            notes.write(lines)
            progress(step + 1, lines[-1]["loss"] if lines[-1]["loss"] is not None else math.nan)
            if step + 1 in looks:
                notes.look(step + 1)
        if lost >= DIVERGED_AFTER:
            status = "diverged"
            break
    if lost or not trial.finite:  # too short for ten lost steps, or lost in the last one
        status = "diverged"
    record = {
        "schema": 1,
        "kind": "lab_run",
        "arm": arm.as_dict(),
        "seed": seed,
        "status": status,
        "steps": trial.taken,
        "processes": world_size(),
        "recorded": trial.graph is not None,
        "trainable_parameters": trial.trainable_parameters,
        **trial.computed,
        "heldout": trial.held_out(ground.source.held_out(settings.held_out_batches)),
        "environment": describe_environment(),
    }
    if notes:
        record |= notes.finish(arm, status == "completed")
        record["seconds"] = time.perf_counter() - started
        write_json(folder / "run.json", record)
    return record


def look_steps(steps: int, looks: int) -> set[int]:
    """At most `looks` + 1 steps from 0 to the last one, evenly spread, both ends included."""
    if looks < 1:
        return set()
    return {round(i * steps / looks) for i in range(looks + 1)} if steps else {0}


def step_line(step: int, rate: float, record: dict[str, Any], max_grad_norm: float) -> dict[str, Any]:
    """A line of steps.jsonl; what is not finite is null."""
    norm = record["grad_norm"].item()
    return {
        "step": step,
        "loss": _finite(record["loss"].item()),
        "learning_rate": rate,
        "grad_norm": _finite(norm),
        "clipped": bool(max_grad_norm and norm > max_grad_norm),
        "grad_norms": {kind: _finite(value) for kind, value in _read(record["grad_norms"]).items()},
        "update_ratio": {kind: _finite(value) for kind, value in _read(record["update_ratio"]).items()},
    }


def _read(values: dict[str, Tensor]) -> dict[str, float]:
    """All of them in one transfer from the device."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Notes:
    """What is written down during a run."""

    def __init__(self, folder: Path, trial: Trial, ground: Ground, arm: Arm, seed: int) -> None:
        self.folder, self.trial, self.ground = folder, trial, ground
        self.rank = arm.options.get("r", ground.settings.rank)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.sketcher, self.sketches, self.sketched = Sketcher(), [], []
        self.presence: dict[str, Any] = {}
        self.inputs: dict[str, Tensor] = {}
        held = ground.source.held_out(PROBES) or [ground.source.batch(seed, step) for step in range(PROBES)]
        self.probes = [{key: value.to(ground.device.device) for key, value in probe.items()} for probe in held]
        self.first_inputs: dict[str, Tensor] = {}

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Append to steps.jsonl."""
        _append(self.folder / "steps.jsonl", lines)

    def look(self, step: int) -> None:
        """Measure presence and record where dW is."""
        model, half = self.trial.model, self.ground.settings.base != "fp32" and not self.trial.fp32
        self.inputs = self.capture(max(LOOK_TOKENS, TOKENS_A_RANK * self.rank))
        self.first_inputs = self.first_inputs or self.inputs
        dtype = torch.bfloat16 if half else torch.float32
        self.presence = measure_presence(model, self.inputs, dtype)
        if self.presence:
            _append(self.folder / "presence.jsonl", [{"step": step, "layers": self.presence}])
        # the same inputs throughout, or the path of a nonlinear adapter would show theirs
        self.sketches.append(self.sketcher.sketch(model, self.first_inputs).cpu())
        self.sketched.append(step)

    def capture(self, tokens: int, names: list[str] | None = None) -> dict[str, Tensor]:
        """Real inputs of the layers, at most about so many tokens, alike from each of the probes."""
        each, found = math.ceil(tokens / len(self.probes)), []
        with self.trial.precision():
            for probe in self.probes:
                found.append(capture_inputs(self.trial.model, probe, tokens=each, layers=names))
        return {name: torch.cat([part[name] for part in found if name in part]) for name in found[0]}

    def finish(self, arm: Arm, whole: bool) -> dict[str, Any]:
        """What run.json says of the end; parts that were not asked for, or cannot be had after a divergence, are None."""
        settings, model = self.ground.settings, self.trial.model
        found: dict[str, Any] = {"presence": None, "sharpness": None, "spectra": None, "approximation": None}
        if self.sketches:
            tensors = {"sketches": torch.stack(self.sketches), "steps": torch.tensor(self.sketched)}
            save_file(tensors, self.folder / "path.safetensors")
        if self.presence:
            found["presence"] = summarise_presence(self.presence)
        if hasattr(model, "save_pretrained") and arm.method != FULL:
            model.save_pretrained(self.folder / "adapter")
        if not whole:
            return found
        if settings.sharpness and not settings.random and arm.method != FULL:
            batches = self.probes[: settings.sharpness_batches]
            found["sharpness"] = adapter_sharpness(model, batches, tolerance=SHARPNESS_TOLERANCE)
        if settings.spectra and self.sketches:
            chosen = spread(list(self.inputs), SPECTRA_LAYERS)
            layers = self.spectra(self.rank, chosen)
            found["spectra"] = {"layers": layers, "types": by_module_type(layers)}
            if arm.method == FULL:
                found["approximation"] = self.approximate(spread(chosen, APPROXIMATED_LAYERS))
        return found

    def spectra(self, rank: int, names: list[str]) -> dict[str, Any]:
        """Spectra of these layers; the base's subspaces are computed once for all runs of this process."""
        known, adapted = self.ground.subspaces, adapted_layers(self.trial.model)
        for name in names:
            if (name, rank) not in known:
                known[name, rank] = base_subspaces(base_weight(adapted[name]), rank)
        own = {name: known[name, rank] for name in names}
        return spectra(self.trial.model, rank, self.inputs, names, subspaces=own)

    def approximate(self, names: list[str]) -> dict[str, Any]:
        """How well each method stands for the full update of these layers at equal rank, on real inputs."""
        layers, inputs = adapted_layers(self.trial.model), self.capture(APPROXIMATION_TOKENS, names)
        rank = min([self.ground.settings.rank, *(min(x.shape) // 4 for x in inputs.values())])
        return {name: approximation(update_weight(layers[name], x), x, rank) for name, x in inputs.items()}


def spread(names: list[str], most: int) -> list[str]:
    """At most so many of them, evenly spread over the model, in order; whole blocks of equal kinds where that is possible."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    each = max(1, most // max(1, len(kinds)))
    chosen = set()
    for group in list(kinds.values())[:most]:
        count = min(each, len(group))
        chosen |= {group[round((i + 0.5) * len(group) / count - 0.5)] for i in range(count)}
    return [name for name in names if name in chosen]


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
