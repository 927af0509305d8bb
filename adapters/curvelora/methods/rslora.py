"""rsLoRA, PEFT's own: LoRA whose scale falls with the root of the rank, so that large ranks still learn."""

from __future__ import annotations

import dataclasses

from curvelora.methods.lora import LORA

METHOD = dataclasses.replace(
    LORA,
    name="rslora",
    title="rsLoRA: LoRA with a rank-stabilised scale",
    formula="h = W0 x + s B A x,  s = alpha / sqrt(r)",
    paper="rsLoRA (arXiv 2312.03732)",
    defaults={"use_rslora": True},
    internal_options=("use_rslora",),
    caveats=(
        "An alpha carried over from LoRA scales the update by sqrt(r) times as much, and the learning rate has to "
        "follow; at the default r = 8 and alpha = 8 that is 2.8 times.",
        "Its adapter is stored as LoRA's with `use_rslora`, which is how other tools read it.",
    ),
)
