"""Numbers in words, the same everywhere that people read them."""

from __future__ import annotations


def percent(share: float) -> str:
    """Return a share as a percentage; one above 0 never shows as `0.0 %`, nor one below 1 as `100.0 %`."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{share * 100:.1f} %"
