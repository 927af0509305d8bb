"""What the registry knows of a method: its definition for people, and its properties as functions of the config."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from curvelora.errors import UserError, nearest
from curvelora.merging import Merge

# Fields of a PEFT config that say how it is stored, not how the method behaves.
BOOKKEEPING = frozenset(
    ["task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"]
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of the registry.

    Args:
        name: registry name, lower case.
        title: one line for people.
        formula: the forward pass in the project's letters.
        paper: short name and arXiv number.
        provided_by: "curvelora" or "peft".
        config_class: the PEFT config.
        model_class: our tuner, registered with PEFT under `name`; None where PEFT has its own.
        defaults: the paper's values where they differ from the config class's own.
        aliases: names that recipes may use -> the config's field, so that `alpha` and `dropout` mean the same everywhere.
        family, merge, identity_at_init: properties of a config, tested against behaviour; the family is "weight space",
            "activation space, linear" and so on.
        trainable_parameters: (config, d_out, d_in) -> how many entries one layer trains.
        only_options: the recipe options that mean something, where that is not every field of the config class.
        internal_options: fields of the config class that the code sets itself and no recipe may.
        required_quantization: the quantisation of the base that is part of the method's definition, or None.
        bases: how the base may be stored, of "none" (unquantised), "nf4" and "int8".
        cost: cost class in words, beside LoRA.
        caveats: what a user must know, in plain sentences; at least one.
        check: raises `UserError` for values of a config that PEFT's own class accepts and no user means.
    """

    name: str
    title: str
    formula: str
    paper: str
    provided_by: str
    config_class: type[PeftConfig]
    model_class: type[BaseTuner] | None
    defaults: Mapping[str, Any]
    family: Callable[[Any], str]
    merge: Callable[[Any], Merge]
    identity_at_init: Callable[[Any], bool]
    trainable_parameters: Callable[[Any, int, int], int]
    cost: str
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    only_options: tuple[str, ...] | None = None
    internal_options: tuple[str, ...] = ()
    required_quantization: str | None = None
    bases: tuple[str, ...] = ("none", "nf4", "int8")
    caveats: tuple[str, ...]
    check: Callable[[Any], None] = lambda config: None

    def option_types(self) -> dict[str, Any]:
        """Recipe option -> its type; PEFT's bookkeeping fields are left out and aliases replace what they stand for."""
        hints = typing.get_type_hints(self.config_class)
        renamed = {target: alias for alias, target in self.aliases.items()}
        hidden = BOOKKEEPING | set(self.internal_options)
        names = [f.name for f in dataclasses.fields(self.config_class) if f.init and f.name not in hidden]
        types = {renamed.get(name, name): hints[name] for name in names}
        return types if self.only_options is None else {name: types[name] for name in self.only_options}

    def build_config(self, **options: Any) -> PeftConfig:
        """Build the config from recipe options.

        Raises:
            UserError: an option that the method does not have (with the nearest one that it has), or a refused value.
        """
        known = self.option_types()
        unknown = [name for name in options if name not in known and name not in self.aliases.values()]
        if unknown:
            raise UserError(
                "; ".join(f"method {self.name!r} has no option {name!r}{nearest(name, known)}" for name in unknown)
            )
        values = dict(self.defaults) | {self.aliases.get(name, name): value for name, value in options.items()}
        try:
            config = self.config_class(**values)
            self.check(config)
            return config
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, UserError) else UserError(f"method {self.name!r}: {error}") from error

    def settings(self, config: PeftConfig) -> dict[str, Any]:
        """The options that `config` has, under their recipe names: plain values, without what is unset or empty."""
        renamed = {target: alias for alias, target in self.aliases.items()}
        options = self.option_types()
        values = {renamed.get(k, k): v for k, v in config.to_dict().items()}
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items() if k in options}
        return {k: v for k, v in plain.items() if isinstance(v, int | float | str | list) and v != []}

    def describe(self, config: PeftConfig | None = None) -> dict[str, Any]:
        """The entry as plain data, with the properties of `config` (the method's defaults where it is None)."""
        config = config or self.build_config()
        return {
            "name": self.name,
            "title": self.title,
            "family": self.family(config),
            "formula": self.formula,
            "paper": self.paper,
            "provided_by": self.provided_by,
            "merge": self.merge(config).value,
            "identity_at_init": self.identity_at_init(config),
            "required_quantization": self.required_quantization,
            "bases": list(self.bases),
            "cost": self.cost,
            "defaults": {k: v for k, v in self.settings(config).items() if k != "target_modules"},
            "caveats": list(self.caveats),
        }
