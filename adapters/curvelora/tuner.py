"""The PEFT side that all methods share: a config base class and the tuner that puts layers into a model."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from curvelora.errors import UserError, nearest
from curvelora.layers.adapter_layer import AdapterLayer
from curvelora.layers.base_weight import keep_4bit_layout
from curvelora.layers.mixed_batch import rows_with_adapters
from curvelora.merging import Merge


@dataclass
class LowRankConfig(PeftConfig):
    """Fields that every low-rank method of this project has, with PEFT's names and meanings where PEFT has them.

    Args:
        r: rank, at least 1 and at most min(d_in, d_out) of every adapted layer.
        alpha: numerator of the scale s = alpha / r, positive.
        dropout: probability with which entries of the adapter's input are zeroed in training, in [0, 1); the base path
            never sees it.
        target_modules: names (suffixes) of linear modules, one regular expression, or "all-linear"; None takes PEFT's LoRA
            default for the architecture.
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: indices of the layers to adapt; needs a list in `target_modules`.
        layers_pattern: name of the list that the indices count in, where it is not the usual one.
        modules_to_save: modules that train in full and are saved with the adapter, for example a new classification head.
        rank_pattern: module name or regular expression -> rank, for modules that differ from `r`.
        alpha_pattern: the same for `alpha`.

    Raises:
        UserError: a value out of its range.
    """

    r: int = field(default=8, metadata={"help": "rank"})
    alpha: float = field(default=16, metadata={"help": "scale s = alpha / r"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "which linear modules to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "which modules to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layer indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "what those indices count"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained in full"})
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "ranks that differ from r"})
    alpha_pattern: dict[str, float] | None = field(default_factory=dict, metadata={"help": "alphas that differ"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        alphas = [] if self.alpha == self.alpha_rule else [self.alpha]
        check_low_rank(self.r, alphas, self.dropout, self.rank_pattern, self.alpha_pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern says what layers_to_transform counts: give layers_to_transform as well")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError(
                "layers_to_transform needs target_modules as a list of names; write the layers into the pattern"
            )

    alpha_rule: ClassVar[str | None] = None  # a word that alpha may be instead of a number; `scale` knows what it means

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.r

    @property
    def merge(self) -> Merge:
        """Whether the update can be added to the base weight; `why_not_exact` says what stands in the way."""
        return Merge.EXACT

    why_not_exact: ClassVar[str] = ""

    @property
    def needs_unquantised_weight(self) -> bool:
        """Whether creating the adapter reads weights that a checkpoint which is quantised itself no longer has."""
        return False

    def for_module(self, key: str) -> LowRankConfig:
        """This config with the rank and alpha that hold for the module `key`."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        own = copy.copy(self)
        own.r = (self.rank_pattern or {}).get(get_pattern_key(list(self.rank_pattern or {}), key), self.r)
        own.alpha = (self.alpha_pattern or {}).get(get_pattern_key(list(self.alpha_pattern or {}), key), self.alpha)
        return own


def check_low_rank(r: Any, alphas: list[Any], dropout: Any, rank_pattern: Any, alpha_pattern: Any) -> None:
    """Raise `UserError` where one of the values that all low-rank methods have is out of its range."""
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        if not isinstance(pattern or {}, dict):
            raise UserError(
                f"{name} must map module names to numbers, not be {pattern!r}: write for example {name}: {{q_proj: 4}}"
            )
    for rank in (r, *(rank_pattern or {}).values()):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise UserError(f"rank must be a whole number of at least 1, not {rank!r}: write for example r=8")
    for alpha in (*alphas, *(alpha_pattern or {}).values()):
        if not is_number(alpha) or alpha <= 0:
            raise UserError(f"alpha must be a positive number, not {alpha!r}: the adapter is scaled by alpha / r")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"dropout must be at least 0 and below 1, not {dropout!r}: it is a probability")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number that fits into a float; True and False are none."""
    # NaN compares false, and a whole number beyond the range of floats compares right
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_switch(name: str, value: Any) -> None:
    """Raise `UserError` where the option `name` is neither True nor False."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `UserError` where the option `name` has a value that is none of its choices."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}{nearest(value, choices)}")


class AdapterModel(BaseTuner):
    """A PEFT tuner for any `AdapterLayer`; a method sets `prefix` and `tuner_layer_cls` and is done."""

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        configs = getattr(model, "peft_config", None)  # of the adapters that it has already
        before = dict(configs or {})
        try:
            super().__init__(model, *args, **kwargs)
        except Exception:
            if configs is not None:
                configs.clear()
                configs.update(before)
            raise

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        keep_4bit_layout(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT has it, but a refusal leaves no new layer behind, and what trained before trains again.

        PEFT would take the layers that were there before the refusal for an adapter of before, and on the next attempt keep
        what trained then: the whole base.
        """
        layers = [m for m in model.modules() if isinstance(m, self.tuner_layer_cls)]
        had_it = {id(layer) for layer in layers if adapter_name in layer.configs}
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for name, layer in list(model.named_modules()):
                if isinstance(layer, self.tuner_layer_cls) and id(layer) not in had_it:
                    layer.delete_adapter(adapter_name)
                    if not layer.configs:
                        model.set_submodule(name, layer.base_layer)
            for parameter, requires_grad in trained:
                parameter.requires_grad = requires_grad
            raise

    def _create_and_replace(
        self,
        peft_config: LowRankConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        config = peft_config.for_module(current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.add_adapter(adapter_name, config, self.model)
            return
        layer = self.tuner_layer_cls(target, current_key)
        layer.add_adapter(adapter_name, config, self.model)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Iterator:
        if adapter_names is None:
            yield
            return
        with rows_with_adapters(self.model, adapter_names, kwargs.get("num_beams") or 1):
            yield

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put `new_module` in the place of `child`; its tensors are where they belong (PEFT would move meta tensors)."""
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT has it, but all or nothing: every layer is asked first, and where one fails the others are unmerged.

        Raises:
            UserError: one of the adapters (the active ones where none is named) cannot be merged, or only approximately.
            ValueError: with `safe_merge`, a merged weight would not be finite.
        """
        self._check_merge(adapter_names)
        layers = [m for m in self.model.modules() if isinstance(m, AdapterLayer) and not m.merged]
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except Exception:
            for layer in layers:
                with onload_layer(layer):
                    layer.unmerge()
            raise

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names)
        return super()._unload_and_optionally_merge(merge, *args, adapter_names=adapter_names, **kwargs)

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, AdapterLayer):
                names = module.active_adapters if adapter_names is None else adapter_names
                if own := [name for name in names if name in module.configs]:
                    module.check_merge(own)
                    module.check_takes_update()

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        quantised = {
            m.quantization_backend.backend_name
            for m in self.model.modules()
            if getattr(m, "quantization_backend", None)
        }
        if quantised:
            warnings.warn(
                f"merging into a {' and '.join(sorted(quantised))} base quantises the sum again, which changes the model: "
                "evaluate the merged model separately, or merge into the unquantised base",
                stacklevel=3,
            )
