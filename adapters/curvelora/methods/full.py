"""Full fine-tuning: every weight trains. The ceiling that adapters are compared with.

    h = W x + b        everything trains

Put on a model like any adapter, so that recipes, resume and evaluation are the same; there is no layer, and the "adapter" file
holds the whole model. Weights train in fp32 (`curvelora train` sees to that). Cost: gradients and two moments for every weight,
some 16 bytes each, where LoRA has them for a thousandth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from curvelora.errors import UserError
from curvelora.merging import Merge
from curvelora.method import Method
from curvelora.peft_registration import extend_peft_type


@dataclass
class FullConfig(PeftConfig):
    """Config of full fine-tuning.

    Args:
        modules_to_save: new heads; they train in full as with every method.
        target_modules: PEFT's word for no layer; not to be changed.
    """

    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained in full"})
    target_modules: str = field(default=DUMMY_TARGET_MODULES, metadata={"help": "no layer"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("full")


class NoLayer(BaseTunerLayer):
    """Stands for the layers that this method does not have."""


class FullModel(BaseTuner):
    """Full fine-tuning as a PEFT tuner: adds nothing, and saves everything."""

    prefix = "full_"
    tuner_layer_cls = NoLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT has it. Raises `UserError` for a packed base or a second adapter."""
        packed = next((name for name, p in model.named_parameters() if not p.is_floating_point()), None)
        if packed is not None:
            raise UserError(f"full fine-tuning needs an unquantised base, and {packed} is packed: load it unquantised")
        if len(self.peft_config) > 1:
            raise UserError("full fine-tuning changes the base itself, so a second adapter has nothing to stand on")
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Never called: no module is a target."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        trains = not any(config.inference_mode for config in self.peft_config.values())
        for name, parameter in model.named_parameters():
            if not _in_wrapper(model, name):
                parameter.requires_grad = trains

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state_dict.items() if not _in_wrapper(model, name)}


def _in_wrapper(model: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to a head, which PEFT's wrapper trains and saves itself."""
    parts = name.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(isinstance(model.get_submodule(path), AuxiliaryTrainingWrapper) for path in paths)


METHOD = Method(
    name="full",
    title="full fine-tuning: every weight trains",
    formula="h = W x + b,  everything trains",
    paper="baseline of all three papers",
    provided_by="curvelora",
    config_class=FullConfig,
    model_class=FullModel,
    defaults={},
    only_options=("modules_to_save",),
    bases=("none",),
    family=lambda config: "model",
    merge=lambda config: Merge.EXACT,
    identity_at_init=lambda config: True,
    trainable_parameters=lambda config, d_out, d_in: d_out * d_in,
    cost="gradients and two moments for every weight, all in fp32: some 16 bytes a weight",
    caveats=(
        "The file is as large as the model, and switching it off does not bring the base back.",
        "The papers state no learning rate for it; one that suits an adapter is usually ten times too high.",
        "On a bf16 base the weights train in fp32 and are rounded to bf16 when the file is put on the base again.",
    ),
)
