"""Writes a small lab folder and a small sweep folder of the schema that `curvelora bench compare` and `sweep` write."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

# key -> (label, overhead ratio or None, peak GB, noise of the loss, forward, derivative, what f adds to the output)
ARMS = {
    "qlora": ("QLoRA", None, 10.0, 0.020, None, None, None),
    "loran:identity": ("LoRAN identity", 1.31, 10.8, 0.020, 0.0, 0.0, 0.0),
    "loran:sinter": ("LoRAN Sinter (a = 5e-5)", 1.62, 11.0, 0.0201, 0.006, 0.4, 3.5e-5),
    "loran:sinter-large": ("LoRAN Sinter (a = 2e-2)", 1.62, 11.0, 0.034, 0.71, 0.99, 1.4e-2),
    "ranlora": ("RanLoRA", 1.09, 10.1, 0.022, None, None, None),
    "aurora": ("AuroRA", 1.27, 10.3, 0.024, None, None, None),
    "loran:identity@fp32": ("LoRAN identity in fp32", 3.1, 19.5, 0.02, 0.0, 0.0, 0.0),
    "loran:sinter@fp32": ("LoRAN Sinter (a = 5e-5) in fp32", 3.6, 20.2, 0.02, 0.999, 0.9999, 3.5e-5),
}
TYPES = ("q_proj", "v_proj", "down_proj")
LAYERS = tuple(f"model.layers.{i}.{'mlp' if t == 'down_proj' else 'self_attn'}.{t}" for i in range(2) for t in TYPES)
PHASES = {"data": 0.01, "forward": 0.3, "backward": 0.55, "communication": 0.04, "optimiser": 0.1}
STEP_SECONDS = 0.8


def write_lab(
    folder: Path, seeds=(42, 43, 44), steps=120, arms=tuple(ARMS), sweep: str | None = None, **changes
) -> dict:
    """Write the folder and return its results.json; `changes` replace top-level entries of it (`settings` are merged)."""
    results = lab_results(seeds, steps, arms)
    settings = results["settings"] | changes.pop("settings", {})
    results |= {"sweep": sweep} | changes | {"settings": settings}
    for key in arms:
        for seed, run in results["runs"].get(key, {}).items():
            place = folder / run["folder"]
            place.mkdir(parents=True)
            lines = [step_line(key, int(seed), step, steps) for step in range(1, run["steps"] + 1)]
            write_lines(place / "steps.jsonl", lines)
            if ARMS[key][4] is not None:
                write_lines(place / "presence.jsonl", [presence_line(key, i, steps) for i in range(1, 11)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    if results["cost"]:
        (folder / "cost.json").write_text(json.dumps(results["cost"]))
    return results


def lab_results(seeds=(42, 43, 44), steps=120, arms=tuple(ARMS)) -> dict:
    """results.json of a lab whose baseline is the first of `arms`."""
    rng = random.Random(7)
    runs = {
        key: {str(seed): run_record(key, seed, steps, position, rng) for position, seed in enumerate(seeds)}
        for key in arms
    }
    return {
        "schema": 1,
        "kind": "lab",
        "title": "QLoRA and its rivals on a 1B Llama",
        "settings": {
            "model": "llama-1b",
            "weights": "pretrained",
            "base": "nf4",
            "dtype": "bfloat16",
            "steps": steps,
            "seeds": list(seeds),
            "rank": 16,
            "alpha": 16.0,
            "dropout": 0.0,
            "target_modules": list(TYPES),
            "batch_size": 8,
            "sequence_length": 512,
            "learning_rate": 2e-4,
            "max_grad_norm": 1.0,
            "data": "shakespeare",
            "baseline": arms[0],
        },
        "environment": {
            "versions": {"torch": "2.11.0", "curvelora": "0.1.0"},
            "hardware": {"gpu": "NVIDIA H100 80GB HBM3", "gpus": 1, "cpu": "EPYC", "cpu_cores": 16},
            "commit": "0123456789ab",
        },
        "arms": {
            key: {
                "label": ARMS[key][0],
                "method": key.split(":")[0].split("@")[0],
                "options": {"amplitude": 5e-5, "frequency": 1e4} if "sinter" in key else {},
                "dtype": "float32" if key.endswith("@fp32") else "bfloat16",
                "trainable_parameters": 11_272_192,
            }
            for key in arms
        },
        "cost": cost_record(arms),
        "runs": runs,
        "pooled": {},
        "paths": {
            "explained": [0.71, 0.18],
            "runs": {key: {str(seeds[0]): path_points(key, steps)} for key in arms},
        },
        "approximation": None,
        "sweep": None,
        "verdict": {"cost": [], "stability": [], "presence": [], "limits": []},
    }


def summary(value: float, spread: float = 0.01) -> dict:
    low, high = value * (1 - spread), value * (1 + spread)
    return {"median": value, "low": low, "high": high, "p10": low, "p90": high, "n": 40}


def cost_record(arms=tuple(ARMS)) -> dict:
    records = {}
    for key in arms:
        _, ratio, gigabytes, *_ = ARMS[key]
        factor = 1.0 if ratio is None else ratio
        overhead = ratio and {"ratio": ratio, "low": ratio - 0.02, "high": ratio + 0.03, "pairs": 20}
        records[key] = {
            "std_BA": 0.01,
            "step_seconds": summary(STEP_SECONDS * factor),
            "phases": {name: summary(STEP_SECONDS * factor * share) for name, share in PHASES.items()},
            "tokens_per_second": 4096 / STEP_SECONDS / factor,
            "tokens_per_second_per_device": 4096 / STEP_SECONDS / factor,
            "mfu": 0.41 / factor,
            "mfu_of_gemm": 0.55 / factor,
            "peak_allocated_bytes": int(gigabytes * 1e9),
            "peak_reserved_bytes": int(gigabytes * 1.1e9),
            "joules_per_step": 410.0 * factor,
            "overhead": overhead,
        }
    return {
        "file": "cost.json",
        "device": "NVIDIA H100 80GB HBM3",
        "std_BA_target": 0.01,
        "rounds": 20,
        "steps_per_round": 2,
        "warmup_steps": 3,
        "tokens_per_step": 4096,
        "processes": 1,
        "peak_tflops": 989.0,
        "gemm_tflops": 740.0,
        "flops_formula": "tokens * (4 N + 6 P) + 6 * layers * tokens * length * width",
        "clocks": None,
        "arms": records,
    }


def run_record(key: str, seed: int, steps: int, position: int, rng: random.Random) -> dict:
    noise = ARMS[key][3]
    spikes = [steps // 3 + 7 * position, steps // 2 + 11 * position] if key == "loran:sinter-large" else []
    return {
        "folder": f"runs/{''.join(c if c.isalnum() else '_' for c in key)}/seed-{seed}",
        "status": "completed",
        "steps": steps,
        "seconds": steps * STEP_SECONDS,
        "heldout": {"loss": 2.31 + (0.04 if "large" in key else 0.0) + 0.004 * rng.random(), "accuracy": 0.52},
        "stability": {
            "steps": steps,
            "residual_std": noise * (1 + 0.02 * rng.random()),
            "residual_sigma": noise * 0.95,
            "paired_residual_std": noise * 0.2 * (1 + 0.2 * rng.random()),
            "spikes": len(spikes),
            "spike_steps": spikes,
            "spike_depth": 0.4 if spikes else None,
            "clipped_share": 0.02,
            "diverged": False,
            "diverged_at": None,
            "grad_norm": {"median": 0.4, "p95": 0.6, "max": 0.9},
            "grad_norms": {kind: {"median": 0.2, "p95": 0.3, "max": 0.5} for kind in TYPES},
            "update_ratio": {kind: {"median": 1e-3, "max": 4e-3} for kind in TYPES},
        },
        "presence": presence_record(key),
        "sharpness": {
            "value": 12.0 + 4 * (key == "loran:sinter-large") + rng.random(),
            "residual": 0.01,
            "iterations": 20,
        },
        "spectra": spectra_record(key),
    }


def presence_record(key: str) -> dict | None:
    _, _, _, _, forward, derivative, added = ARMS[key]
    if key in ("ranlora", "aurora"):
        share = 0.12 if key == "ranlora" else 0.34
        record = {"space": "activation", "nonlinear_share": share, "linear_from_zero": 1.1 * share, "entries": 4096}
    elif forward is None:
        return None
    else:
        dtype, bent = ("float32" if key.endswith("@fp32") else "bfloat16"), "sinter" in key
        correlation = {"naive_bf16": 0.55, "rounded_bf16": 0.9, "fp32": 1.0}
        rounded = added if dtype == "float32" else math.hypot(added, 4e-3 * forward**0.5) if forward else 0.0
        record = {
            "space": "weight",
            "forward": forward,
            "derivative": derivative,
            "std_u": 9.8e-3,
            "dtype": dtype,
            "output_ratio": {"exact": added, "rounded": rounded},
            "phase": {"p05": 6.0, "p25": 30.0, "p50": 66.0, "p75": 110.0, "p95": 190.0, "max": 500.0},
            "slope_rms": 60 * (0.02 if "large" in key else 5e-5) if bent else 0.0,
            "slope_correlation": correlation if bent else dict.fromkeys(correlation),
            "entries": 4096,
        }
    return record | {"types": {kind: record | {"layers": 2} for kind in TYPES}}


def spectra_record(key: str) -> dict:
    tail = {None: 0.0, 0.0: 1e-9}.get(ARMS[key][6], ARMS[key][6])
    plain = [0.9**i if i < 16 else 0.0 for i in range(48)]
    bent = [0.9**i if i < 16 else (tail or 0.0) * 0.99**i for i in range(48)]
    scalars = {"stable_rank": 5.3, "effective_rank": 14.1, "next_after_rank": tail, "frobenius": 1.3, "spectral": 0.56}
    overlaps = {f"overlap_{end}_{side}": 0.01 for end in ("top", "tail") for side in ("left", "right")}
    overlaps |= {"overlap_rank": 16, "chance_left": 0.008, "chance_right": 0.008}
    update = scalars | {"energy_beyond_rank": (tail or 0.0) ** 2} | overlaps
    types = {kind: {"update": update, "BA": update | {"energy_beyond_rank": 0.0}, "layers": 2} for kind in TYPES}
    layers = {
        name: {"update": update | {"singular_values": bent}, "BA": update | {"singular_values": plain}}
        for name in LAYERS
    }
    return {"types": types, "layers": layers}


def path_points(key: str, steps: int) -> list[list[float]]:
    turn = 0.06 * list(ARMS).index(key)
    return [[i * steps // 10, i * math.cos(turn + 0.02 * i), i * math.sin(turn + 0.05 * i) / 2] for i in range(11)]


def step_line(key: str, seed: int, step: int, steps: int) -> dict:
    # the baseline's noise comes from the batches, which all arms share
    noise = random.Random(1000 * seed + step).gauss(0, 0.05) + random.Random(f"{key}{seed}{step}").gauss(
        0, ARMS[key][3]
    )
    loss = 2.3 + 1.4 * math.exp(-5 * step / steps) + noise + (0.05 if key == "loran:sinter-large" else 0)
    norm = 0.4 + 0.3 * math.exp(-step / 20) + abs(noise)
    return {
        "step": step,
        "loss": loss,
        "learning_rate": 2e-4,
        "grad_norm": norm,
        "clipped": norm > 1,
        "grad_norms": {kind: norm * (0.4 + 0.2 * i) for i, kind in enumerate(TYPES)},
        "update_ratio": {kind: None if step == 1 else 2e-3 * (1 + i) * step**-0.5 for i, kind in enumerate(TYPES)},
    }


def presence_line(key: str, look: int, steps: int) -> dict:
    forward, derivative = ARMS[key][4], ARMS[key][5]
    grown = 1 - math.exp(-look / 2)
    record = presence_record(key) | {
        "forward": forward * grown,
        "derivative": derivative * grown,
        "std_u": 0.01 * grown,
    }
    del record["types"]
    return {"step": look * steps // 10, "layers": {name: record for name in LAYERS}}


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


AMPLITUDES, FREQUENCIES = [1e-5, 5e-5, 2e-3, 2e-2, 2e-1], [1e3, 5e3, 1e4, 5e4]


def write_sweep(folder: Path, **changes) -> dict:
    """Write a sweep over 5 amplitudes and 4 frequencies: the largest amplitude diverges at the two highest frequencies, and
    the last cell is missing; every cell has one seed."""
    cells = []
    for amplitude in AMPLITUDES:
        for frequency in FREQUENCIES:
            lost = amplitude == 2e-1 and frequency >= 1e4
            missing = amplitude == 1e-5 and frequency == 5e4
            bend = amplitude * math.log10(frequency)
            name = f"cells/a{amplitude:g}-w{frequency:g}"
            if not missing:
                (folder / name).mkdir(parents=True)
            cells.append(
                {
                    "values": {"amplitude": amplitude, "frequency": frequency},
                    "seed": 42,
                    "status": "missing" if missing else "diverged" if lost else "completed",
                    "heldout_loss": None if lost or missing else 2.33 + 0.3 * bend - 0.02 * (amplitude == 2e-3),
                    "residual_std": None if lost or missing else 0.02 + 0.05 * bend,
                    "spikes": None if missing else 3 if lost else 0,
                    "diverged": lost,
                    "resolvability_forward": None if missing else min(1.0, 40 * amplitude),
                    "folder": name,
                }
            )
    sweep = {
        "schema": 1,
        "kind": "sweep",
        "settings": {"model": "llama-1b", "steps": 100, "seeds": [42], "title": "Amplitude and frequency of Sinter"},
        "axes": {"amplitude": AMPLITUDES, "frequency": FREQUENCIES},
        "baseline": {"heldout_loss": 2.335, "residual_std": 0.02},
        "cells": cells,
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return sweep
