"""The registry: every method under its name, registered with PEFT when this module is imported."""

from __future__ import annotations

from curvelora.errors import UserError, nearest
from curvelora.method import Method
from curvelora.methods import aurora, linear_probing, lora, loran, ranlora, sinelora
from curvelora.peft_registration import register

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        lora.LORA,
        lora.QLORA,
        loran.METHOD,
        ranlora.METHOD,
        aurora.METHOD,
        sinelora.METHOD,
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
