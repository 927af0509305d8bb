"""The registry: every method under its name, registered with PEFT when this module is imported."""

from __future__ import annotations

from curvelora.errors import UserError, nearest
from curvelora.method import Method
from curvelora.methods import (
    adalora,
    aurora,
    bitfit,
    delora,
    dora,
    fourierft,
    full,
    linear_probing,
    lora,
    loran,
    milora,
    moslora,
    neat,
    olora,
    pissa,
    ranlora,
    rslora,
    sinelora,
)
from curvelora.peft_registration import register

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        lora.LORA,
        lora.QLORA,
        loran.METHOD,
        ranlora.METHOD,
        aurora.METHOD,
        neat.METHOD,
        moslora.METHOD,
        pissa.METHOD,
        pissa.REWRITTEN_BASE,
        milora.METHOD,
        olora.METHOD,
        dora.METHOD,
        rslora.METHOD,
        adalora.METHOD,
        fourierft.METHOD,
        delora.METHOD,
        sinelora.METHOD,
        linear_probing.METHOD,
        bitfit.METHOD,
        full.METHOD,
    )
}

# Names that tables use and that no method here answers to -> what is meant, and what to take instead.
EXPLAINED: dict[str, str] = {
    "dora_dynamic": (
        "dora_dynamic is DoRA by dynamic rank distribution (arXiv 2405.17357), which is not implemented here: it prunes "
        "single-rank parts while training, and it is what AuroRA's and RanLoRA's tables refer to as DoRA; take dora for "
        "weight decomposition (arXiv 2402.09353) and do not compare it with those rows, or adalora for another method that "
        "distributes ranks"
    ),
}

for _method in METHODS.values():
    if _method.model_class is not None:
        register(_method.name, _method.config_class, _method.model_class)


def get_method(name: str) -> Method:
    """Return the method registered under `name`.

    Raises:
        UserError: there is none; the nearest name and the list are in the message, or what the name means elsewhere.
    """
    if name in EXPLAINED:
        raise UserError(EXPLAINED[name])
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)} (known: {', '.join(METHODS)})")
    return METHODS[name]
