"""DeLoRA, PEFT's own: every rank-one part has a fixed length, and one trained number bounds the whole update."""

from __future__ import annotations

from peft import DeloraConfig

from curvelora.errors import UserError
from curvelora.merging import Merge
from curvelora.method import Method
from curvelora.tuner import check_low_rank, is_number


def _check(config: DeloraConfig) -> None:
    check_low_rank(config.r, [], config.module_dropout, config.rank_pattern, None)
    if not isinstance(config.lambda_pattern or {}, dict):
        raise UserError(
            f"lambda_pattern must map module names to numbers, not be {config.lambda_pattern!r}: write for example "
            "lambda_pattern: {q_proj: 5}"
        )
    for bound in (config.delora_lambda, *(config.lambda_pattern or {}).values()):
        if not is_number(bound) or bound <= 0:
            raise UserError(f"delora_lambda must be a positive number, not {bound!r}: it bounds the update")


METHOD = Method(
    name="delora",
    title="DeLoRA: the update's direction and its bound, decoupled",
    formula="h = W0 x + (lambda / r) B diag(1 / (|a_k| |b_k|)) A (w * x),  w_j = |column j of W0|",
    paper="DeLoRA (arXiv 2503.18225)",
    provided_by="peft",
    config_class=DeloraConfig,
    model_class=None,
    defaults={},
    aliases={"dropout": "module_dropout"},
    family=lambda config: "weight space",
    merge=lambda config: Merge.EXACT,
    identity_at_init=lambda config: config.init_weights is True,
    trainable_parameters=lambda config, d_out, d_in: config.r * (d_in + d_out) + 1,
    bases=("none",),
    cost="LoRA's two thin products, and a norm for each row of A and column of B",
    caveats=(
        "PEFT starts from B = 0 and clamps the norms at 1e-4, which multiplies the first gradient of B by up to 1e4: "
        "Adam does not notice, plain SGD and gradient clipping do. The authors' code starts from a random B and "
        "subtracts a frozen copy instead.",
        "It has no alpha: `delora_lambda` (15 in PEFT) is where the trained bound of each layer starts.",
        "`dropout` is PEFT's `module_dropout`, which drops entries of the adapter's input, whatever its name says.",
        "Linear layers on an unquantised base only: PEFT takes the columns' norms from the stored weight.",
        "PEFT ignores `adapter_names` here: rows cannot have adapters of their own.",
    ),
    check=_check,
)
