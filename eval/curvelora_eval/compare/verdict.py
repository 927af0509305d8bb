"""The rule by which one arm is called better. It is stated here, in every compare.json, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curvelora_eval.compare.paired import holm
from curvelora_eval.report.verdict import lower_is_better
from curvelora_eval.scoring import FEWEST_ROWS

NOT_DISTINGUISHABLE = "not distinguishable"
UNDEFINED = "undefined"
TOO_FEW = "too few rows to tell"


def rule(level: float) -> str:
    """Return the rule in words."""
    return (
        f"An arm is better where the {100 * level:g} % paired bootstrap interval of the difference leaves 0 out and p, after "
        f"Holm's correction, is below {1 - level:g}; otherwise the two are {NOT_DISTINGUISHABLE}. p is McNemar's exact test "
        "where rows are right or wrong and each arm is one run, and the paired bootstrap's otherwise; where both arms have "
        "several seeds, it is the larger one of the bootstrap's (over seeds and rows) and, unless no run differs from another "
        "of its arm, the t-test's over seeds. The "
        "primary metrics of all tasks and arms are corrected together, so are all other metrics among themselves, and so is the "
        "macro average over tasks, which is a family of its own (one test an arm). Fewer than "
        f"{FEWEST_ROWS} rows (windows of a text) are {TOO_FEW}, and p of n rows is never below 2^(1 - n), the chance that "
        "all of them point one way."
    )


def decide(comparisons: Sequence[dict[str, Any]], level: float) -> None:
    """Correct the p-values of one family of tests together, and add `p_corrected`, `verdict` and `because` to each.

    Args:
        comparisons: each with `metric`, `arms` (the two letters, first the one that is subtracted), `difference`, `low`,
            `high`, `p`, `test` and `rows` (how many there were; of a macro average, in the smallest task).
        level: of the intervals; 1 - level is the share of false claims that the family may have.
    """
    tested = [each for each in comparisons if each["p"] is not None]
    for each, p in zip(tested, holm([each["p"] for each in tested]), strict=True):
        each["p_corrected"] = p
    for each in comparisons:
        each.setdefault("p_corrected", None)
        each["tests"] = len(tested)
        each["verdict"] = _verdict(each, level)
        each["because"] = _because(each, level)


def _verdict(found: dict[str, Any], level: float) -> str:
    if found["rows"] < FEWEST_ROWS:
        return TOO_FEW
    if found["low"] is None or found["p"] is None:
        return UNDEFINED
    if not _leaves_zero_out(found) or found["p_corrected"] >= 1 - level:
        return NOT_DISTINGUISHABLE
    first, second = found["arms"]
    gain = found["difference"] < 0 if lower_is_better(found["metric"]) else found["difference"] > 0
    return f"{second if gain else first} is better"


def _because(found: dict[str, Any], level: float) -> str | None:
    """Say why the verdict is not what the interval alone would give; None where it is."""
    if found["verdict"] != NOT_DISTINGUISHABLE or not _leaves_zero_out(found):
        return None
    if found["p"] >= 1 - level:
        return f"the interval leaves 0 out, but p of the {found['test']} is {p_text(found['p'])}"
    return (
        f"the interval leaves 0 out, but p of the {found['test']}, {p_text(found['p'])}, corrected for {found['tests']} tests "
        f"is {p_text(found['p_corrected'])}"
    )


def _leaves_zero_out(found: dict[str, Any]) -> bool:
    return found["low"] > 0 or found["high"] < 0


def p_text(p: float | None) -> str:
    """Return `0.031`, or `< 0.001`; no p-value shows as 0."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
