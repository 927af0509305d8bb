"""How stably one run trained, from the lines of its `steps.jsonl`; losses in nats per token, positions in optimiser steps.

Let x_1..x_n be the finite losses in the order of their steps (a null loss is one that was NaN or infinite).

Trend and noise
    trend      t_i = median(x_{i-m} .. x_{i+m}),  m = min(h, i - 1, n - i)
               A running median (Tukey 1977) keeps clear of spikes. The window shrinks evenly on both sides at the ends, so
               that a steadily falling loss leaves no residual there; the first and the last loss have no neighbours to be
               compared with and no residual. Default h = n / 20, within 5 and 50.
    residual   r_i = x_i - t_i
    residual_std    standard deviation of all r_i (spikes included); loss_variance is its square
    residual_sigma  sigma = 1.4826 median|r_i - median(r)|, the same for normal noise, but blind to spikes
    paired_residual_std
               the standard deviation of the residual of  x_i(arm) - x_i(baseline),  same trend removal. All arms see the
               same batches in the same order, so the noise of the data cancels and what the arm adds is left.

Spikes
    A spike is a maximal run of consecutive finite losses with r_i > k sigma, k = 6, where sigma > 0. Its depth is its largest
    r_i, its recovery the number of steps from its first to its last. An excursion longer than h steps is a change of
    level, which the trend follows, and so is one that the run does not come back from. A loss without noise (sigma = 0)
    has no scale to call anything a spike by and has none. Gradient spikes are the same, of log(grad_norm). A hard batch can
    be a spike as well, where the noise of the data is skewed: what counts is the difference to the baseline's spikes.

Divergence
    Over all steps with a loss, finite or not, let M_i be the median of the finite ones among the last w losses up to step
    i, w = n / 20 within 5 and 50, and F the median of the finite ones among the first 5. A run diverged if
        its losses are not finite from some step on until the end, or
        M_n > F + max(3 sigma, 1 % of |F|):  it ends above where it started.
    `diverged_at` is the first step from which one of the two holds at every step until the end; a median of w losses
    shows a jump about w / 2 steps late. F looks at so few steps because an unstable method fails early, and then a
    longer start would be the failure itself. Runs with fewer than 10 steps take half of them for F and for M_n. A run
    that fell and climbed back only part of the way did not diverge by this; `rise_from_best` = M_n - min_i M_i over full
    windows tells how far it climbed.

Fewer than 20 finite losses say nothing about noise: then all of the above is None, except M_n and F, and that losses which
are not finite until the end make `diverged` True however short the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curvelora.errors import UserError
from curvelora_eval.lab.statistics import over_seeds, rate_interval

# The scalars of `stability` that `pool` averages over seeds; "grad_norm_p95" is ["grad_norm"]["p95"].
POOLED = (
    *("first_loss", "last_loss", "rise_from_best", "residual_std", "residual_sigma", "loss_variance"),
    *("paired_residual_std", "spikes", "spike_depth", "spike_recovery", "gradient_spikes"),
    *("nonfinite_losses", "nonfinite_gradients", "clipped_share"),
)
NOISE = (
    *("residual_std", "residual_sigma", "loss_variance"),
    *("spikes", "spike_steps", "spike_depth", "spike_depth_sigma", "spike_recovery"),
)
GRAD_NORM = ("median", "p95", "max")


@dataclass(frozen=True)
class StabilitySettings:
    """The constants of the definitions; see the module.

    half_window is h and window is w, in steps (None: from the length of the run); start_window is the 5 steps of F;
    spike_threshold is k and divergence_threshold the 3 of 3 sigma, in robust standard deviations; min_rise is the 1 %, a
    fraction of F; min_steps is the 20.

    Raises:
        UserError: a window below 1, a threshold that is not positive, a negative min_rise, or min_steps below 4.
    """

    half_window: int | None = None
    window: int | None = None
    start_window: int = 5
    spike_threshold: float = 6.0
    divergence_threshold: float = 3.0
    min_rise: float = 0.01
    min_steps: int = 20

    def __post_init__(self) -> None:
        smallest = {"half_window": 1, "window": 1, "start_window": 1, "min_rise": 0, "min_steps": 4}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"{name} must be at least {least}, found {value}")
        for name in ("spike_threshold", "divergence_threshold"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, found {getattr(self, name)}; write 6 for six sigma")


def stability(
    steps: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]] | None = None,
    settings: StabilitySettings = StabilitySettings(),
) -> dict[str, Any]:
    """Measure one run; what the run leaves undefined is None.

    Args:
        steps: lines of `steps.jsonl`, in any order. Of lines with the same step the later one counts (the run was resumed).
            A field that a line lacks was not measured; one that is null was NaN or infinite.
        baseline: lines of the baseline's run with the same seed; steps that both runs have are compared.
        settings: the constants of the definitions.

    Returns: losses and depths in nats, step numbers as in the lines.
        steps, missing_steps, paired_steps: how many there are, lack between the first and the last, and have a finite loss
            here and in the baseline (None without one); half_window, window: h and w as used.
        first_loss, last_loss: F and M_n; last_loss is None where the losses end not finite. rise_from_best.
        residual_std, residual_sigma, loss_variance, paired_residual_std.
        spikes, spike_steps (first step of each), spike_depth and spike_depth_sigma (deepest, in nats and in sigma),
            spike_recovery (longest, in steps), gradient_spikes, gradient_spike_steps. Depths and recovery are None
            without a spike.
        nonfinite_losses, nonfinite_gradients (steps), first_nonfinite_step (of either).
        diverged, diverged_at.
        clipped_share: of the steps that say whether they clipped.
        grad_norm: {"median", "p95", "max"} of the finite norms before clipping; grad_norms: the same per module type.
        update_ratio: {"median", "max"} of ||step|| / ||parameters|| per module type.

    Raises:
        UserError: a line without a whole number as its step.
    """
    lines = _in_order(steps)
    at, loss = _series(lines, "loss")
    grad_at, grad_norm = _series(lines, "grad_norm")
    finite = np.isfinite(loss)
    half = settings.half_window or _twentieth(int(finite.sum()))

    # a norm of exactly 0 has no logarithm and is no spike
    usable = np.isfinite(grad_norm) & (grad_norm > 0)
    found = _noise(at[finite], loss[finite], half, settings)
    gradient = _noise(grad_at[usable], np.log(grad_norm[usable]), half, settings)
    bad_losses, bad_gradients = at[~finite], grad_at[~np.isfinite(grad_norm)]
    first_bad = min([*bad_losses.tolist(), *bad_gradients.tolist()], default=None)
    numbers = [step for step, _ in lines]
    clipped = [bool(line["clipped"]) for _, line in lines if line.get("clipped") is not None]
    return {
        "steps": len(lines),
        "missing_steps": numbers[-1] - numbers[0] + 1 - len(lines) if lines else 0,
        **_paired(at[finite], loss[finite], baseline, settings),
        **_ends(at, loss, found["residual_sigma"], settings),
        **found,
        "half_window": half,
        "gradient_spikes": gradient["spikes"],
        "gradient_spike_steps": gradient["spike_steps"],
        "nonfinite_losses": len(bad_losses),
        "nonfinite_gradients": len(bad_gradients),
        "first_nonfinite_step": first_bad,
        "clipped_share": sum(clipped) / len(clipped) if clipped else None,
        "grad_norm": _quantiles(grad_norm.tolist(), GRAD_NORM),
        "grad_norms": {name: _quantiles(v, GRAD_NORM) for name, v in _by_type(lines, "grad_norms").items()},
        "update_ratio": {name: _quantiles(v, ("median", "max")) for name, v in _by_type(lines, "update_ratio").items()},
    }


def pool(per_seed: Sequence[Mapping[str, Any]], level: float = 0.95) -> dict[str, dict[str, Any]]:
    """Pool the dicts of `stability` of one arm's seeds: metric -> `over_seeds` for `POOLED` and grad_norm_median, _p95, _max.

    Two entries have other keys:
        spike_rate  {"rate", "low", "high", "spikes", "steps"}: spikes per 1,000 steps of all seeds with the exact Poisson
                    interval; rate, low and high are None without a seed whose spikes could be counted
        diverged    {"count", "n"}: how many seeds diverged, of those where it can be said

    A seed without a value is dropped from its metric, so that `last_loss` is of the runs that survived: read it with
    `diverged`.
    """
    pooled: dict[str, dict[str, Any]] = {
        metric: over_seeds([seed.get(metric) for seed in per_seed], level) for metric in POOLED
    }
    for key in GRAD_NORM:
        norms = [seed.get("grad_norm") or {} for seed in per_seed]
        pooled[f"grad_norm_{key}"] = over_seeds([norm.get(key) for norm in norms], level)
    counted = [seed for seed in per_seed if seed.get("spikes") is not None]
    spikes, steps = sum(seed["spikes"] for seed in counted), sum(seed["steps"] for seed in counted)
    rate = rate_interval(spikes, steps / 1000, level) if steps else dict.fromkeys(("rate", "low", "high"))
    pooled["spike_rate"] = {**rate, "spikes": spikes, "steps": steps}
    known = [seed["diverged"] for seed in per_seed if seed.get("diverged") is not None]
    pooled["diverged"] = {"count": sum(known), "n": len(known)}
    return pooled


def running_median(values: np.ndarray, half_window: int) -> np.ndarray:
    """Centred running median of finite values (n,) -> (n,): over 2 m + 1 values, m = min(half_window, room on either side)."""
    last = len(values) - 1
    room = [min(half_window, i, last - i) for i in range(len(values))]
    return np.array([np.median(values[i - m : i + m + 1]) for i, m in enumerate(room)])


def trailing_median(values: np.ndarray, window: int) -> np.ndarray:
    """Median of the finite ones of the last `window` values up to each, (n,) -> (n,); NaN where there is none."""
    return np.array([_median(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))])


def _noise(at: np.ndarray, values: np.ndarray, half: int, settings: StabilitySettings) -> dict[str, Any]:
    """Residuals and spikes of finite values (n,) at the steps `at` (n,)."""
    found: dict[str, Any] = dict.fromkeys(NOISE)
    if len(values) < settings.min_steps:
        return found
    residual, at = _residual(values, half), at[1:-1]
    std = float(np.std(residual, ddof=1))
    sigma = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    high = (residual > settings.spike_threshold * sigma) & (sigma > 0)
    edges = np.flatnonzero(np.diff(high, prepend=False, append=False))
    first, last = edges[::2], edges[1::2] - 1
    found |= {"residual_std": std, "residual_sigma": sigma, "loss_variance": std**2}
    found |= {"spikes": len(first), "spike_steps": at[first].tolist()}
    if len(first):
        depth = float(residual[high].max())
        found |= {"spike_depth": depth, "spike_depth_sigma": depth / sigma}
        found["spike_recovery"] = int((at[last] - at[first] + 1).max())
    return found


def _residual(values: np.ndarray, half: int) -> np.ndarray:
    """x - trend of (n,) values, without the first and the last: (n - 2,)."""
    return (values - running_median(values, half))[1:-1]


def _paired(
    at: np.ndarray, loss: np.ndarray, baseline: Sequence[Mapping[str, Any]] | None, settings: StabilitySettings
) -> dict[str, Any]:
    if baseline is None:
        return {"paired_residual_std": None, "paired_steps": None}
    other_at, other = _series(_in_order(baseline), "loss")
    both, here, there = np.intersect1d(at, other_at[np.isfinite(other)], return_indices=True)
    difference = loss[here] - other[np.isfinite(other)][there]
    std = None
    if len(both) >= settings.min_steps:
        half = settings.half_window or _twentieth(len(both))
        std = float(np.std(_residual(difference, half), ddof=1))
    return {"paired_residual_std": std, "paired_steps": len(both)}


def _ends(at: np.ndarray, loss: np.ndarray, sigma: float | None, settings: StabilitySettings) -> dict[str, Any]:
    """Where the losses (n,), NaN where not finite, start and end, and whether that is a divergence."""
    n = len(loss)
    room = max(1, n // 2)  # the start and the end of a short run must not overlap
    window = min(settings.window or _twentieth(n), room)
    lost = np.logical_and.accumulate(np.isnan(loss)[::-1])[::-1]  # not finite from here to the end
    ended_lost = bool(n and lost[-1])
    trailing = trailing_median(loss, window)
    start = _median(loss[: min(settings.start_window, room)])
    end = trailing[-1] if n and not ended_lost else math.nan
    above = lost
    diverged, rise = (True if ended_lost else None), None
    if sigma is not None and math.isfinite(start):
        limit = start + max(settings.divergence_threshold * sigma, settings.min_rise * abs(start))
        # a window without a finite loss is no sign of recovery
        above = lost | np.isnan(trailing) | (trailing > limit)
        diverged = bool(above[-1])
        rise = float(end - np.nanmin(trailing[window - 1 :]))
    stays = np.logical_and.accumulate(above[::-1])[::-1]
    return {
        "window": window,
        "first_loss": _plain(start),
        "last_loss": _plain(end),
        "rise_from_best": _plain(rise),
        "diverged": diverged,
        "diverged_at": int(at[np.argmax(stays)]) if diverged else None,
    }


def _twentieth(n: int) -> int:
    return min(max(n // 20, 5), 50)


def _in_order(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """(step, line) by step; the later line of a step counts."""
    latest: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise UserError(f"line {number} of the steps has the step {step!r}; write the number of the optimiser step")
        latest[step] = line
    return sorted(latest.items(), key=lambda item: item[0])


def _series(lines: Sequence[tuple[int, Mapping[str, Any]]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and values (n,) of the lines that have `key`; NaN for null and infinite."""
    pairs = [(step, line[key]) for step, line in lines if key in line]
    values = np.array([math.nan if value is None else value for _, value in pairs], dtype=np.float64)
    values[~np.isfinite(values)] = math.nan
    return np.array([step for step, _ in pairs], dtype=np.int64), values


def _by_type(lines: Sequence[tuple[int, Mapping[str, Any]]], key: str) -> dict[str, list[float | None]]:
    """Module type -> its values under `key`, in the order in which the types first appear."""
    found: dict[str, list[float | None]] = {}
    for _, line in lines:
        for name, value in (line.get(key) or {}).items():
            found.setdefault(name, []).append(value)
    return found


def _quantiles(values: Sequence[float | None], names: Sequence[str]) -> dict[str, float | None]:
    shares = {"median": 0.5, "p95": 0.95, "max": 1.0}
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return {name: float(np.quantile(finite, shares[name])) if finite else None for name in names}


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
