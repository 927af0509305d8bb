"""DoRA by weight decomposition, PEFT's own: LoRA turns the rows of the weight, a trained magnitude says how long they are."""

from __future__ import annotations

import dataclasses

from curvelora.methods.lora import LORA

METHOD = dataclasses.replace(
    LORA,
    name="dora",
    title="DoRA: weight-decomposed low-rank adaptation",
    formula="h = m * (W0 + s B A) x / |W0 + s B A|,  a norm for each row, s = alpha / r",
    paper="DoRA (arXiv 2402.09353)",
    defaults={"use_dora": True},
    internal_options=("use_dora",),
    family=lambda config: "weight space",
    cost="every pass forms the dense W0 + s B A for its norms: far above LoRA",
    caveats=(
        "Two methods are called DoRA: this one, and dynamic rank distribution (arXiv 2405.17357), which the tables of "
        "AuroRA and RanLoRA refer to; `curvelora methods dora_dynamic` says what that means for a comparison.",
        "The norm counts as a constant in the backward pass, as the paper proposes; the gradient of B and A is then "
        "not that of the formula.",
        "With dropout, PEFT recomputes the base's output from the dropped input, so that dropout reaches the term "
        "(m / norm - 1) W0 x as well, and a quantised base is dequantised in every pass.",
        "The magnitudes start from the stored weight: on an NF4 or int8 base from the dequantised one. Int8 needs a GPU, "
        "where it is PEFT's and not tried here: on a CPU PEFT 0.21 loses the scales of the weight.",
        "Two active adapters do not add up, `torch.compile` breaks the graph in every layer, and PEFT gives no rows "
        "adapters of their own.",
        "Its adapter is stored as LoRA's with `use_dora`, which is how other tools read it.",
    ),
)
