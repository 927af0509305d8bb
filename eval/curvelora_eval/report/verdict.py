"""What the numbers say, in plain sentences: who beats the baseline, by how much, and what the numbers cannot settle."""

from __future__ import annotations

from curvelora_eval.report.load import Run, number
from curvelora_eval.report.published import sources
from curvelora_eval.report.table import interval_level, is_share, score_text
from curvelora_eval.wording import percent

# Below this share of entries the nonlinearity rounds away almost everywhere, and the layer is a plain linear one.
ABSENT = 0.01
# The linear adapters that every other one is held against, beside the baseline.
LINEAR = ("lora", "qlora")


def verdict(runs: list[Run]) -> list[str]:
    """Return the sentences on score and resolvability, in the order of the runs; never empty."""
    return _scores(runs) + [sentence for run in runs for sentence in (*_resolvability(run), *_merged(run))]


def caveats(runs: list[Run]) -> list[str]:
    """Return what a reader must know before comparing: failed or cut runs, unlike hardware measures, dropped lines."""
    sentences = []
    for run in runs:
        if run.result.get("status") == "interrupted":
            sentences.append(f"{run.label} was interrupted after {run.result.get('steps') or 0:,} steps.")
        if run.result.get("error"):
            sentences.append(f"{run.label} ended with an error: {run.result['error']}")
        sentences += [f"{run.label}: {note}." for note in run.notes]
    kinds = {run.label: run.result.get("peak_memory_kind") for run in runs if run.result.get("peak_memory_bytes")}
    found = sorted({str(kind) for kind in kinds.values() if kind})
    if len(found) == 1:
        sentences.append(f"Peak memory is {found[0]}.")
    elif found:
        each = "; ".join(f"{label}: {kind or 'not stated'}" for label, kind in kinds.items())
        sentences.append(f"Peak memory was measured in different ways and does not compare ({each}).")
    return sentences + sources(runs)


def baseline(runs: list[Run]) -> Run:
    """Return the scored run with the fewest trainable parameters above 0, or the first run where none has any."""
    scored = [run for run in runs if run.score["value"] is not None] or runs
    sized = [run for run in scored if (number(run.result.get("trainable_parameters")) or 0) > 0]
    # An untrained arm has the parameters of its trained twin; the trained one is the fair opponent.
    rank = lambda run: (run.result["trainable_parameters"], run.result.get("status") == "untrained")  # noqa: E731
    return min(sized, key=rank) if sized else scored[0]


def _scores(runs: list[Run]) -> list[str]:
    base = baseline(runs)
    if base.score["value"] is None:
        return ["No run has been evaluated on unseen rows, so none can be called better."]
    others = [run for run in runs if run is not base]
    if not others:
        return ["There is one run, so there is nothing to compare it with."]
    linear = [run for run in others if run.result.get("method") in LINEAR and _is_trained(run)]
    rivals = [run for run in others if run is not linear[0] and _is_trained(run)] if linear else []
    return [_compare(run, base) for run in others] + [_compare(run, _opponent(run, linear)) for run in rivals]


def _opponent(run: Run, linear: list[Run]) -> Run:
    """Return the linear adapter that is nearest in size; for a linear one, the first, which is another one."""
    if run.result.get("method") in LINEAR:
        return linear[0]
    size = lambda run: number(run.result.get("trainable_parameters")) or 0  # noqa: E731
    return min(linear, key=lambda other: abs(size(other) - size(run)))


def _is_trained(run: Run) -> bool:
    return run.result.get("status") != "untrained" and run.score["value"] is not None


def _compare(run: Run, base: Run) -> str:
    if run.score["value"] is None:
        return f"{run.label} has no score on unseen rows, so it is not compared with {base.label}."
    if run.primary_metric != base.primary_metric:
        return (
            f"{run.label} is scored by {run.primary_metric} and {base.label} by {base.primary_metric}, "
            "so they are not compared."
        )
    if None not in (_rows(run), _rows(base)) and _rows(run) != _rows(base):
        return f"{run.label} and {base.label} were evaluated on different rows, so they are not compared."

    gain = run.score["value"] - base.score["value"]
    if gain == 0:
        return f"{run.label} and {base.label} have the same {base.primary_metric}."
    better = gain < 0 if lower_is_better(base.primary_metric) else gain > 0
    settled, open_ = ("beats", "is ahead of") if better else ("falls short of", "is behind")
    verb = settled if _apart(run, base) else open_
    return f"{run.label} {verb} {base.label} by {_amount(abs(gain), base.primary_metric)}; {_settled(run, base)}."


def _bounds(run: Run, base: Run) -> list[float | None]:
    return [side.score[key] for side in (run, base) for key in ("low", "high")]


def _apart(run: Run, base: Run) -> bool:
    """Whether both have an interval and the two do not touch."""
    bounds = _bounds(run, base)
    return None not in bounds and (bounds[0] > bounds[3] or bounds[1] < bounds[2])


def _settled(run: Run, base: Run) -> str:
    """Say whether the intervals settle it. Apart, they do; where they touch, the rows do not tell."""
    if None in _bounds(run, base):
        return "without an interval for both, the difference may be chance"
    level = interval_level([run, base])
    level = f"{level} " if level else ""
    if _apart(run, base):
        return f"the difference is larger than the {level}intervals, which do not overlap"
    return f"the {level}intervals overlap, so these rows do not settle which is better"


def lower_is_better(metric: str | None) -> bool:
    """Whether a smaller value is the better one: losses, perplexities and errors."""
    return metric is not None and metric.endswith(("loss", "perplexity", "error", "mse", "mae"))


def _amount(gain: float, metric: str | None) -> str:
    if not is_share(metric):
        return f"{gain:.3f} of {metric}" if gain >= 0.0005 else f"less than 0.001 of {metric}"
    points = f"{gain * 100:.1f}"
    if points == "0.0":
        return f"less than 0.1 points of {metric}"
    return f"{points} {'point' if points == '1.0' else 'points'} of {metric}"


def _rows(run: Run) -> object:
    dataset = run.evaluation.get("dataset") if run.evaluation else None
    return dataset.get("sha256") if isinstance(dataset, dict) else None


def _resolvability(run: Run) -> list[str]:
    found = run.result.get("resolvability")
    forward = number(found.get("forward")) if isinstance(found, dict) else None
    if forward is None or forward >= ABSENT:
        return []
    dtype = found.get("dtype") or "the compute dtype"
    return [
        f"{run.label} has a forward resolvability of {percent(forward)}: "
        f"the nonlinearity is numerically absent from the forward pass in {dtype}."
    ]


def _merged(run: Run) -> list[str]:
    """Say what merging costs where it gives another function."""
    if None in (merged := run.merged_score["value"], before := run.score["value"]):
        return []
    gap = run.result.get("merge_gap")
    moved = number(gap.get("relative")) if isinstance(gap, dict) else None
    outputs = "" if moved is None else f", with outputs that differ by {percent(moved)}"
    score, metric = score_text(run.merged_score, run.primary_metric), run.primary_metric
    if merged == before:
        return [f"{run.label}, merged as its method does it, is another function{outputs}; its {metric} stays {score}."]
    return [
        f"{run.label}, merged as its method does it, is another function: {metric} {score_text(run.score, metric)} becomes "
        f"{score}{outputs}."
    ]
