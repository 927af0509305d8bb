"""The fixed list of what is refused, by whom and why. Any other refusal is a failing cell."""

from __future__ import annotations

from dataclasses import dataclass

from cases import Case

from curvelora.merging import Merge


@dataclass(frozen=True)
class Refusal:
    """One refusal of the matrix.

    Args:
        title: what is refused.
        reason: why, for the page.
        says: what the message must match.
    """

    title: str
    reason: str
    says: str


IMPOSSIBLE_MERGE = Refusal(
    "merging a method that is nonlinear in its input",
    "no change of the weight equals an update that depends on the input; RanLoRA merges with activation identity only",
    "cannot be merged.*no change of the weight equals it",
)
UNASKED_APPROXIMATION = Refusal(
    "merging AuroRA's dynamic mode without saying so",
    "merging replaces sigma(A x) by sigma(A) x, another function; it is done inside `allow_approximate()` or with "
    "`curvelora merge --approximate`, and the gap is measured",
    "merges only approximately.*allow_approximate",
)
MIXED_TRAINING = Refusal(
    "rows with adapters of their own in training",
    "`adapter_names` chooses an adapter for each row at inference only, as PEFT has it for LoRA",
    "adapter_names.*(training mode|inference only)",
)
NOT_LINEAR = Refusal(
    "embeddings, norms, convolutions as targets of this package's methods",
    "the methods are defined for linear layers; PEFT's LoRA adapts embeddings and convolutions too",
    "linear layers only.*leave it out of target_modules",
)
RANK_ABOVE_LAYER = Refusal(
    "a rank above min(d_in, d_out) with this package's methods",
    "more directions than the layer has; PEFT's LoRA accepts it",
    "is above min\\(d_in, d_out\\)",
)
QUANTISED_WITHOUT_WEIGHT = Refusal(
    "RanLoRA (init R, P) on a base that exists only quantised",
    "its factors come from the unquantised weight; `svd_source: dequantised` allows the other",
    "is quantised, and its factors come from the unquantised weight.*svd_source: dequantised",
)
REFUSALS = [
    IMPOSSIBLE_MERGE,
    UNASKED_APPROXIMATION,
    MIXED_TRAINING,
    NOT_LINEAR,
    RANK_ABOVE_LAYER,
    QUANTISED_WITHOUT_WEIGHT,
]


def merge_refusal(case: Case) -> Refusal | None:
    """The refusal that merging this case must meet, if any."""
    kinds = {Merge.IMPOSSIBLE: IMPOSSIBLE_MERGE, Merge.APPROXIMATE: UNASKED_APPROXIMATION}
    return kinds.get(case.entry.merge(case.config()))
