"""Make a method from outside known to PEFT under its own name.

PEFT looks every method up through the `PeftType` enum and offers no public way to extend it: `register_peft_method` refuses
a name that is no member, and a closed `enum.Enum` takes no new ones. So the member is added by hand, in the four places
where `enum` keeps its members (the same from Python 3.11 to 3.13), and the public function does the rest. Nothing else in this
project touches PEFT's internals.
"""

from __future__ import annotations

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def extend_peft_type(name: str) -> PeftType:
    """Return `PeftType.<NAME>`, created where it does not exist; `name` in lower case, for example "loran"."""
    member_name = name.upper()
    if member_name in PeftType.__members__:
        return PeftType[member_name]
    member = str.__new__(PeftType, member_name)
    member._name_ = member_name
    member._value_ = member_name
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    # `type.__setattr__`: EnumMeta's own __setattr__ exists to forbid exactly this.
    type.__setattr__(PeftType, member_name, member)
    PeftType._member_names_.append(member_name)
    PeftType._member_map_[member_name] = member
    PeftType._value2member_map_[member_name] = member
    return member


def register(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Register a method with PEFT; a second call with the same classes does nothing (modules can be imported twice).

    Raises:
        KeyError: the name or the prefix belongs to another method already.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

    peft_type = extend_peft_type(name)
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type) is config_class:
        return
    # PEFT 0.21 looks for the prefix among the keys of this table, which are no prefixes
    if any(prefix == model_class.prefix for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if other != peft_type):
        raise KeyError(f"There is already a prefix called {model_class.prefix!r}, please choose a unique prefix.")
    register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)
