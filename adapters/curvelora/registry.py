"""The registry: every method under its name, registered with PEFT when this module is imported."""

from __future__ import annotations

from curvelora.errors import UserError, nearest
from curvelora.method import Method
from curvelora.methods import linear_probing, lora, loran
from curvelora.peft_registration import register

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        lora.LORA,
        lora.QLORA,
        loran.METHOD,
        linear_probing.METHOD,
    )
}

for _method in METHODS.values():
    if _method.model_class is not None:
        register(_method.name, _method.config_class, _method.model_class)


def get_method(name: str) -> Method:
    """Return the method registered under `name`.

    Raises:
        UserError: there is none; the nearest name and the list are in the message.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)} (known: {', '.join(METHODS)})")
    return METHODS[name]


def method_of(config: object) -> Method:
    """Return the method that a PEFT config belongs to (LoRA for QLoRA: the config does not know the base).

    Raises:
        UserError: the config is of no registered method.
    """
    for method in METHODS.values():
        if type(config) is method.config_class:
            return method
    raise UserError(f"{type(config).__name__} belongs to no registered method (known: {', '.join(METHODS)})")
