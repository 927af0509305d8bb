"""Linear probing: the base stays frozen and only the new head trains. The floor that an adapter has to beat."""

from __future__ import annotations

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from curvelora.merging import Merge
from curvelora.method import Method

METHOD = Method(
    name="linear_probing",
    title="linear probing: a new head on a frozen base",
    formula="logits = head(base(x)),  base frozen",
    paper="baseline of all three papers",
    provided_by="peft",
    # PEFT's own way to save and load `modules_to_save` without any adapter layer.
    config_class=LoraConfig,
    model_class=None,
    defaults={"target_modules": DUMMY_TARGET_MODULES},
    only_options=("modules_to_save",),
    family=lambda config: "model",
    merge=lambda config: Merge.EXACT,
    identity_at_init=lambda config: True,
    trainable_parameters=lambda config, d_out, d_in: 0,
    cost="less than LoRA: no adapter, and no gradient below the head",
    caveats=("Only for tasks with a new head (classification, regression); there is nothing to train otherwise.",),
)
