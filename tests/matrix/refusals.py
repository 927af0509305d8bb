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
MIXED_DORA = Refusal(
    "rows with adapters of their own with DoRA",
    "PEFT has them for LoRA without DoRA's magnitudes",
    "Cannot pass `adapter_names` when DoRA is enabled",
)
MIXED_NAMES = Refusal(
    "rows with an adapter that does not exist, or not one name a row",
    "a row without its adapter would silently be the base model's",
    "thrid|names for a batch of 2 rows|Length of `adapter_names`",
)
MIXED_MERGED = Refusal(
    "rows with adapters of their own while an adapter is merged",
    "a merged adapter is in the weight, and so in every row; `unmerge_adapter()` takes it out",
    "adapter_names.*(not merged|merged adapters)",
)
LAYERS_OF_A_PATTERN = Refusal(
    "`layers_to_transform` with a pattern or `all-linear`, `layers_pattern` without `layers_to_transform`",
    "layers are counted among listed names; a pattern can say them itself",
    "layers_to_transform.*(target_modules as a list|is a str)|layers_pattern.*layers_to_transform",
)
NOTHING_LEFT = Refusal(
    "RanLoRA's init K with v of zeros; AuroRA with neither F nor L",
    "the first would never train (A, B and v have no gradient), the second is LoRA",
    "nothing would ever train|leave no nonlinearity",
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
    "PiSSA, MiLoRA, OLoRA, RanLoRA (init R, P) on a base that exists only quantised",
    "their factors come from the unquantised weight; `svd_source: dequantised` allows the other",
    "is quantised, and its factors come from the unquantised weight.*svd_source: dequantised",
)
UNREADABLE_WEIGHT = Refusal(
    "the same, and NEAT, on a base whose quantiser cannot be read back (GPTQ, AWQ and others that PEFT only runs forward)",
    "their factors come from the weight (NEAT's in every pass), and there is none to take or compare with; init K and the other "
    "methods work",
    "is quantised with .*cannot be read back",
)
FORWARD_ONLY = Refusal(
    "merging into such a base",
    "the quantiser cannot store a changed weight; the adapter merges into the unquantised base (`curvelora merge`)",
    "which cannot take an update.*unquantised base",
)
REORDERED = Refusal(
    "merging into, or taking factors from, a 4-bit layer that was evaluated on a CPU with AVX512-BF16 before it had an adapter",
    "bitsandbytes stores its codes in another order then, which cannot be read back; add the adapter first",
    "stores its 4-bit weight in another order",
)
WEIGHT_WITH_ANOTHER = Refusal(
    "PiSSA, MiLoRA, OLoRA, RanLoRA (init R, P) while another adapter is merged",
    "their factors would be those of the changed weight; `unmerge_adapter()` first",
    "adapters are merged into it.*unmerge_adapter",
)
REFUSALS = [
    IMPOSSIBLE_MERGE,
    UNASKED_APPROXIMATION,
    MIXED_TRAINING,
    MIXED_DORA,
    MIXED_NAMES,
    MIXED_MERGED,
    LAYERS_OF_A_PATTERN,
    NOT_LINEAR,
    RANK_ABOVE_LAYER,
    NOTHING_LEFT,
    QUANTISED_WITHOUT_WEIGHT,
    UNREADABLE_WEIGHT,
    FORWARD_ONLY,
    REORDERED,
    WEIGHT_WITH_ANOTHER,
]


def merge_refusal(case: Case) -> Refusal | None:
    """The refusal that merging this case must meet, if any."""
    kinds = {Merge.IMPOSSIBLE: IMPOSSIBLE_MERGE, Merge.APPROXIMATE: UNASKED_APPROXIMATION}
    return kinds.get(case.entry.merge(case.config()))
