"""Find everything that is wrong before saying anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from curvelora.errors import UserError


class Problems:
    """Collects the sentences of user errors."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Inside, a `UserError` is kept and ends the block."""
        try:
            yield
        except UserError as error:
            self.found += [line for line in str(error).split("\n") if line not in self.found]

    def add(self, sentence: str) -> None:
        """Keep a sentence."""
        if sentence not in self.found:
            self.found.append(sentence)

    def refuse(self) -> None:
        """Raise `UserError` with all of them, where there are any."""
        if len(self.found) == 1:
            raise UserError(self.found[0])
        if self.found:
            raise UserError(
                f"{len(self.found)} things are wrong:\n" + "\n".join(f"  - {problem}" for problem in self.found)
            )
