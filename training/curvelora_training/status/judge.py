"""What the facts of a run folder mean: does it train, has it stopped, or does it hang; how fast, and how long still."""

from __future__ import annotations

import calendar
import itertools
import time
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_training.lease import STALE, describe_attempt, is_over
from curvelora_training.status.facts import Facts, number, read_run, rows_of_a_step, total_steps

UNRENEWED = 300.0  # seconds: five renewals that did not come
QUIET, TIMES = (
    120.0,
    5,
)  # a pause is too long from this many seconds on, where it is so many times the longest before it
STARTING = 1800.0  # seconds that a job may take until a process has loaded its model
RECENT = 5  # lines
AGAIN = {
    "gave_up": "it was requeued as often as allowed",
    "ended_by_slurm": "SLURM ended it (time, preemption or scancel)",
}
GOING = ("submitted", "requeued", "starting", "training", "evaluating")


def status_of(folder: Path, clock: Any = time.time) -> dict[str, Any]:
    """How a run stands, as plain data.

    Raises:
        UserError: the folder does not exist, or is no run folder.
    """
    facts = read_run(folder, clock)
    rates, total = _rates(facts), total_steps(facts)
    step = facts.lines[-1]["step"] if facts.lines else number((facts.result or {}).get("steps"))
    state, why = _state(facts, step, total)
    rows, losses = rows_of_a_step(facts), facts.losses
    left = None
    if state == "training" and total is not None and rates["recent"]:
        left = max(0.0, (total - step) / rates["recent"] - (facts.log_age or 0.0))
    whole = next((checkpoint for checkpoint in facts.checkpoints if checkpoint.flaw is None), None)
    starts = [attempt for attempt in facts.attempts if attempt.get("event") == "start"]
    return {
        "run": str(folder),
        "state": state,
        "why": why,
        "step": step,
        "total_steps": total,
        "epoch": _last(facts, "epoch"),
        "epochs": number(facts.setting("epochs")) if facts.setting("max_steps") is None else None,
        "loss": number(losses[-1]["loss"] if losses else (facts.result or {}).get("last_loss")),
        "eval_loss": _last(facts, "eval_loss"),
        "nonfinite_steps": sum("nonfinite" in line for line in facts.lines),
        "log_age_seconds": facts.log_age,
        "checkpoint": None
        if whole is None
        else {"name": whole.name, "step": whole.step, "age_seconds": whole.age, "hashed": whole.hashed},
        "damaged_checkpoints": {c.name: c.flaw for c in facts.checkpoints if c.flaw is not None},
        "steps_per_second": rates["whole"],
        "steps_per_second_recent": rates["recent"],
        "rows_per_second_recent": rates["recent"] * rows if rates["recent"] and rows else None,
        "seconds_left": left,
        "attempts": len(starts) if facts.attempts else None,
        "last_attempt": facts.attempts[-1] if facts.attempts else None,
        "holder": None if facts.lease is None else facts.lease | {"renewed_seconds_ago": facts.lease_age},
        "notes": facts.notes,
    }


def _last(facts: Facts, key: str) -> float | None:
    """The last number of this name in metrics.jsonl."""
    return next((line[key] for line in reversed(facts.lines) if number(line.get(key)) is not None), None)


def _state(facts: Facts, step: int | None, total: int | None) -> tuple[str, str | None]:
    """(state, why or what to do next)."""
    if facts.has_adapter and facts.result is not None:
        return "finished", None
    if facts.lease is not None:
        return _held(facts, step, total)
    return _left(facts, step, total)


def _held(facts: Facts, step: int | None, total: int | None) -> tuple[str, str | None]:
    """An attempt holds the folder."""
    if facts.lease and _dead(facts.lease):
        return "failed", f"process {facts.lease.get('pid')} is gone without a word (killed?); {_next(facts)}"
    if facts.lease_age > UNRENEWED:
        return "stalled", (
            f"the lease was not renewed for {span(facts.lease_age)}: its machine or its way to this file system is gone; another "
            f"attempt may take over after {span(STALE)}"
        )
    evaluating = _evaluating(facts, step, total)
    pause, longest = facts.log_age, _longest_pause(facts)
    if not evaluating and pause is not None and longest is not None and pause > max(QUIET, TIMES * longest):
        return "stalled", (
            f"no log line for {span(pause)}, and the longest pause before was {span(longest)}, though its lease is renewed: look "
            "at what its processes wait for"
        )
    if evaluating:
        return "evaluating", None
    return ("training" if facts.losses else "starting"), None


def _left(facts: Facts, step: int | None, total: int | None) -> tuple[str, str | None]:
    """Nobody holds the folder, and the run is not finished."""
    last = facts.attempts[-1] if facts.attempts else {}
    code, since = last.get("code"), _seconds_since(last.get("time"), facts.now)
    newer = since is not None and (facts.log_age is None or since < facts.log_age)
    if last.get("event") == "start" and newer:
        if since > STARTING:
            return (
                "stalled",
                f"job {last.get('job')} began {span(since)} ago, and no process of it has taken the folder",
            )
        return "starting", f"job {last.get('job')} began {span(since)} ago"
    if last.get("event") == "end" and last.get("why") == "requeued":
        return "requeued", f"job {last.get('job')} ended with code {code}, and SLURM starts it again; {_next(facts)}"
    if last.get("event") == "end" and code not in (0, 75, None):
        return (
            "failed",
            f"job {last.get('job')} ended with code {code} ({last.get('why')}): look at its logs; {_next(facts)}",
        )
    stopped = next((line["stopped"] for line in facts.lines[-1:] if isinstance(line.get("stopped"), dict)), None)
    if stopped is not None or (facts.has_adapter and step == total):
        what = "before its scores" if stopped is None else f"with code {stopped.get('code')}"
        if last.get("event") == "end" and last.get("why") in AGAIN:
            what = f"{what}; {AGAIN[last['why']]}"
        return "stopped", f"{what}; {_next(facts)}"
    if not facts.lines and not facts.config and not facts.attempts:
        return "submitted", "nothing of it has run yet"
    return "failed", f"it ended without finishing and without being stopped: look at its output; {_next(facts)}"


def _next(facts: Facts) -> str:
    """What a user does about it."""
    if whole := next((c for c in facts.checkpoints if c.flaw is None), None):
        return f"--resume continues from step {whole.step}"
    return "there is no whole checkpoint, so --resume begins anew"


def _dead(holder: dict[str, Any]) -> bool:
    try:
        return is_over(holder, describe_attempt() | {"slurm_job": None})
    except (KeyError, TypeError, ValueError):  # a lease with other fields than ours
        return False


def _evaluating(facts: Facts, step: int | None, total: int | None) -> bool:
    """After the last step come the scores of the unseen rows; after some steps that of the validation rows, which is logged."""
    if not facts.losses or step is None:
        return False
    if total is not None and step >= total:
        return True
    data = facts.config.get("data")
    if not isinstance(data, dict) or data.get("validation") is None or "eval_loss" in facts.lines[-1]:
        return False
    every, epoch = number(facts.setting("evaluate_every")), number(facts.lines[-1].get("epoch"))
    return step % every == 0 if every else epoch is not None and float(epoch).is_integer()


def _segments(facts: Facts) -> list[list[dict[str, Any]]]:
    """The lines of each attempt, as far as it can be told: `seconds` begins anew in every one."""
    segments: list[list[dict[str, Any]]] = []
    for line in facts.lines:
        if "stopped" in line and segments:
            segments[-1].append(line | {"seconds": segments[-1][-1]["seconds"]})
        if number(line.get("seconds")) is None:
            continue
        if not segments or "stopped" in segments[-1][-1] or line["seconds"] < segments[-1][-1]["seconds"]:
            segments.append([])
        segments[-1].append(line)
    return segments


def _longest_pause(facts: Facts) -> float | None:
    """The longest time between two lines of the last attempt; None before there are two of training."""
    last = _segments(facts)[-1:]
    times = [line["seconds"] for line in last[0]] if last else []
    if sum("loss" in line for line in (last[0] if last else [])) < 2:
        return None
    return max(after - before for before, after in itertools.pairwise(times))


def _rates(facts: Facts) -> dict[str, float | None]:
    """Steps a second between log lines, evaluations and saves in between included: of all attempts, and of the last lines."""
    steps, seconds, recent = 0, 0.0, None
    for segment in _segments(facts):
        losses = [line for line in segment if "loss" in line]
        if len(losses) < 2:
            continue
        steps += losses[-1]["step"] - losses[0]["step"]
        seconds += losses[-1]["seconds"] - losses[0]["seconds"]
        last = losses[-RECENT - 1 :]
        span_ = last[-1]["seconds"] - last[0]["seconds"]
        recent = (last[-1]["step"] - last[0]["step"]) / span_ if span_ > 0 else None
    return {"whole": steps / seconds if seconds > 0 else None, "recent": recent}


def _seconds_since(text: Any, now: float) -> float | None:
    """Since a time such as 2026-11-28T14:00:00Z."""
    try:
        return max(0.0, now - calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except (TypeError, ValueError):
        return None


def span(seconds: float) -> str:
    """Seconds in words, to about two digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    for size, unit, below in ((60, "min", 100 * 60), (3600, "h", 48 * 3600)):
        if seconds < below:
            count = seconds / size
            return f"{count:.1f} {unit}" if count < 10 else f"{count:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def statuses(folders: list[Path], clock: Any = time.time) -> tuple[list[dict[str, Any]], list[str]]:
    """(the status of every run, what is wrong with the folders that are none)."""
    found, problems = [], []
    for folder in folders:
        try:
            found.append(status_of(folder, clock))
        except UserError as error:
            problems.append(str(error))
    return found, problems
