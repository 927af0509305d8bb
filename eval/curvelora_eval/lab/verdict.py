"""What a lab's numbers say, in plain sentences: cost, stability and presence against the baseline, and their limits.

Every sentence is derived from results.json (and sweep.json), never from the arms' names. Where an interval holds "no
difference" the sentence says that it cannot be told, and not that there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from curvelora_eval.lab.canvas import setting_text, short
from curvelora_eval.lab.folder import Arm, Lab, dig
from curvelora_eval.lab.presence_verdict import presence_sentences
from curvelora_eval.lab.statistics import paired_difference
from curvelora_eval.report.load import number
from curvelora_eval.wording import percent

# Fewer values than this have no 95 % interval of their median but their whole range (statistics.summarise).
FEW_PAIRS = 6


def verdict(results: dict[str, Any], sweep: dict[str, Any] | None = None) -> dict[str, list[str]]:
    """Return `{"cost", "stability", "presence", "limits"}`, each a list of sentences; only "limits" is never empty.

    Args:
        results: content of a lab's results.json.
        sweep: content of a sweep.json, or None.
    """
    lab = Lab(Path(), results, sweep)
    return {
        "cost": list(_cost(lab)),
        "stability": [*_failed(lab), *_divergence(lab), *_noise(lab), *_losses(lab), *_map(sweep)],
        "presence": list(presence_sentences(lab, sweep)),
        "limits": list(_limits(lab)),
    }


def _cost(lab: Lab) -> Iterator[str]:
    base = lab.baseline
    records = dig(lab.cost, "arms") or {}
    if not records or base is None or base.key not in records:
        return
    for arm in lab.arms:
        overhead = dig(records, arm.key, "overhead")
        ratio = number(dig(overhead, "ratio"))
        if ratio is None:
            continue
        low, high = number(overhead.get("low")), number(overhead.get("high"))
        known = None not in (low, high)
        interval = f" (95 % interval {low:.2f} to {high:.2f})" if known else ""
        same = (
            " and"
            if not (known and low <= 1 <= high)
            else "; the interval holds 1, so the two cannot be told apart; it takes"
        )
        if not known:
            same = ", without an interval, and"
        sentence = f"{arm.label} takes {ratio:.2f} times {base.label}'s step{interval}"
        memory = _memory_ratio(records, arm, base)
        if memory is not None:
            sentence += f"{same} {memory:.2f} times its peak memory"
        elif known and low <= 1 <= high:
            sentence += "; the interval holds 1, so the two cannot be told apart"
        yield sentence + "."
    step = number(dig(records, base.key, "step_seconds", "median"))
    used = number(dig(records, base.key, "mfu"))
    if step is not None:
        share = f" at {percent(used)} of the device's peak (MFU)" if used is not None else ""
        yield f"{base.label}'s step takes {_seconds(step)}{share}."


def _memory_ratio(records: dict, arm: Arm, base: Arm) -> float | None:
    mine, theirs = (number(dig(records, key, "peak_allocated_bytes")) for key in (arm.key, base.key))
    return mine / theirs if mine is not None and theirs else None


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _failed(lab: Lab) -> Iterator[str]:
    """Runs without a result, and arms without a run where others have one."""
    trained = bool(lab.failed) or any(lab.runs(arm) for arm in lab.arms)
    labels = {arm.key: arm.label for arm in lab.arms}
    for key in dict.fromkeys([*labels, *lab.failed]):
        label, reasons = labels.get(key, key), lab.failed.get(key, {})
        finished = len((lab.results.get("runs") or {}).get(key) or {})
        if reasons:
            why = "; ".join(dict.fromkeys(reasons.values()))
            yield f"{label} has no result in {len(reasons)} of {_plural(len(reasons) + finished, 'seed')} ({why})."
        elif trained and not finished:
            yield f"{label} has no run that finished."


def _divergence(lab: Lab) -> Iterator[str]:
    counts = {arm: len(lab.runs(arm)) for arm in lab.arms if lab.runs(arm)}
    if not counts:
        return
    span = _span(lab, max(counts.values()))
    finished = f"(up to {span} an arm)"
    lost = {arm: lab.diverged(arm) for arm in counts}
    for arm, seeds in lost.items():
        if seeds:
            when = [number(dig(lab.runs(arm)[seed], "stability", "diverged_at")) for seed in seeds]
            at = f" from step {min(step for step in when if step is not None):,.0f}" if any(when) else ""
            yield f"{arm.label} diverged in {len(seeds)} of {_plural(counts[arm], 'seed')}{at}."
    if not any(lost.values()):
        yield f"None of the runs that finished diverged {finished}." if lab.failed else f"No arm diverged in {span}."
    spikes = {arm: lab.values(arm, "stability", "spikes") for arm in counts}
    if not any(spikes.values()):
        return
    found = {arm: sum(values) for arm, values in spikes.items() if sum(values) > 0}
    if not found:
        if lab.failed:
            yield f"The loss of none of the runs that finished spiked {finished}."
        else:
            yield f"No arm's loss spiked in {span}."
        return
    parts = ", ".join(f"{arm.label} {count:.0f}" for arm, count in found.items())
    rest = " and the others none" if len(found) < len(spikes) else ""
    yield f"Loss spikes over all seeds: {parts}{rest}."


def _span(lab: Lab, seeds: int) -> str:
    steps = number(lab.settings.get("steps"))
    return f"{_plural(seeds, 'seed')} × {steps:,.0f} steps" if steps else _plural(seeds, "seed")


def _noise(lab: Lab) -> Iterator[str]:
    base = lab.baseline
    if base is None or not lab.values(base, "stability", "residual_std"):
        return
    single, told, alike = [], [], []
    for arm in lab.arms:
        pairs = _pairs(lab, arm, base, "stability", "residual_std")
        pairs = [(mine, theirs) for mine, theirs in pairs if mine > 0 and theirs > 0]
        if arm.baseline or not pairs:
            continue
        # A ratio is compared on the log scale, where twice and half are equally far from the same.
        logs = [math.log(mine / theirs) for mine, theirs in pairs]
        found = paired_difference(logs, [0.0] * len(logs))
        ratio = math.exp(found["mean"])
        if found["distinguishable"] is None:
            single.append(f"{arm.label} {short(ratio)}")
        elif found["distinguishable"]:
            told.append(
                f"{arm.label} {short(ratio)} ({short(math.exp(found['low']))} to {short(math.exp(found['high']))})"
            )
        else:
            alike.append((arm.label, ratio))
    if single:
        yield f"Loss noise as a multiple of {base.label}'s, in the one seed there is: {_listed(single)}."
    if told:
        yield f"Loss noise as a multiple of {base.label}'s, with 95 % intervals over seeds: {_listed(told)}."
    if alike:
        ratios = [ratio for _, ratio in alike]
        span = f"{short(min(ratios))} to {short(max(ratios))}" if len(ratios) > 1 else short(ratios[0])
        names = _listed([label for label, _ in alike])
        yield (
            f"The loss noise of {names} is {span} times {base.label}'s, "
            "which the seeds do not distinguish from 1 (95 % intervals)."
        )


def _losses(lab: Lab) -> Iterator[str]:
    """Held-out loss against the baseline, seed by seed."""
    base = lab.baseline
    if base is None or not lab.values(base, "heldout", "loss"):
        return
    alike = []
    for arm in lab.arms:
        pairs = _pairs(lab, arm, base, "heldout", "loss")
        if arm.baseline or not pairs:
            continue
        found = paired_difference([mine for mine, _ in pairs], [theirs for _, theirs in pairs])
        gap = abs(found["mean"])
        if found["distinguishable"]:
            side = "below" if found["mean"] < 0 else "above"
            low, high = sorted((abs(found["low"]), abs(found["high"])))
            yield (
                f"The held-out loss of {arm.label} is {short(gap)} {side} {base.label}'s "
                f"(95 % interval {short(low)} to {short(high)} over {_plural(found['n'], 'seed')})."
            )
        elif found["distinguishable"] is False:
            alike.append((arm.label, gap))
    if alike:
        names, largest = _listed([label for label, _ in alike]), max(gap for _, gap in alike)
        verb = "differs" if len(alike) == 1 else "differ by at most"
        amount = f"by {short(largest)}" if len(alike) == 1 else short(largest)
        noun = "loss" if len(alike) == 1 else "losses"
        yield (
            f"The held-out {noun} of {names} {verb} {amount} from {base.label}'s, which the seeds do not distinguish from 0."
        )


def _pairs(lab: Lab, arm: Arm, base: Arm, *path: str) -> list[tuple[float, float]]:
    mine, theirs = lab.runs(arm), lab.runs(base)
    pairs = ((number(dig(mine[seed], *path)), number(dig(theirs[seed], *path))) for seed in mine if seed in theirs)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _map(sweep: dict | None) -> Iterator[str]:
    """How much of the sweep diverged, and where its lowest loss lies."""
    cells = [cell for cell in (sweep or {}).get("cells", []) if cell.get("status") != "missing"]
    if not cells:
        return
    lost = [cell for cell in cells if cell.get("diverged") or cell.get("status") == "diverged"]
    runs = _plural(len(cells), "run")
    if not lost:
        yield f"None of the {runs} of the sweep diverged."
    else:
        least = min((number(dig(cell, "values", "amplitude")) or math.inf for cell in lost), default=math.inf)
        where = f", all of them from amplitude {setting_text(least)} on" if math.isfinite(least) else ""
        yield f"{len(lost)} of the {runs} of the sweep diverged{where}."
    scored = [cell for cell in cells if number(cell.get("heldout_loss")) is not None and cell not in lost]
    if not scored:
        return
    best = min(scored, key=lambda cell: cell["heldout_loss"])
    at = ", ".join(f"{name} {setting_text(v)}" for name, v in best["values"].items())
    sentence = f"The sweep's lowest held-out loss is {best['heldout_loss']:.4g} at {at}"
    base = number(dig(sweep, "baseline", "heldout_loss"))
    yield f"{sentence}; the baseline's is {base:.4g}." if base is not None else f"{sentence}."


def _limits(lab: Lab) -> Iterator[str]:
    settings = lab.settings
    if settings.get("weights") == "random":
        yield (
            "The base weights are random: time, memory and numerical presence carry over to a real model of this shape, "
            "but losses and gradients do not say how well the methods learn, nor how far BA grows in a real task."
        )
    seeds = max((len(lab.runs(arm)) for arm in lab.arms), default=0)
    if seeds == 1:
        yield "There is one seed, so nothing here says how much a result would move with another one."
    elif 1 < seeds < 5:
        yield (
            f"There are {seeds} seeds: their intervals (Student's t) are wide, and only large differences can show in them."
        )
    if len(lab.arms) > 1 and (seeds > 1 or lab.cost):
        yield (
            "Every interval is of 95 % by itself, not corrected for the number of arms and measures: of twenty comparisons of "
            "what is alike, one is expected to look different."
        )
    steps = number(settings.get("steps"))
    if seeds and steps:
        rate = 3000 / (steps * seeds)
        yield (
            f"{steps:,.0f} steps a run: an arm without a spike may still spike up to {rate:.2g} times in 1,000 steps "
            "(95 %), and what sets in later is not seen."
        )
    if lab.cost:
        target = number(lab.cost.get("std_BA_target"))
        if target is not None:
            yield (
                f"Step times are of adapters whose BA has standard deviation {setting_text(target)}, "
                "since a fresh one (B = 0) would make some kernels look faster than they are."
            )
        pairs = [number(dig(record, "overhead", "pairs")) for record in (lab.cost.get("arms") or {}).values()]
        fewest = min((count for count in pairs if count is not None), default=None)
        if fewest is not None and fewest < FEW_PAIRS:
            yield f"Step times come from {_plural(int(fewest), 'pair')} of rounds, so their intervals are likely too narrow."
        hardware = lab.environment.get("hardware")
        if hardware and not hardware.get("gpu"):
            yield "Step times are a CPU's; the ratios of a GPU are others."
        elif not number(lab.cost.get("peak_tflops")):
            yield "The device's peak is not known, so there is no MFU."
    else:
        yield "Cost was not measured in this run; see `curvelora bench compare --help`."
    if lab.sweep is None:
        yield "One amplitude and one frequency say nothing about others: `curvelora sweep` makes the map."


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
