"""The one exception that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, said in one clear sentence: what is wrong, why, and what to write instead.

    The commands print the sentence alone and exit with code 2; `--debug` adds the traceback. It is a `ValueError` so that
    library users, and PEFT's own error handling, catch it as one.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name closest to `name`, or an empty string where none is close."""
    matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
