"""The run folder: what a run leaves behind, under fixed names.

config.yaml        the resolved recipe          environment.json   versions, hardware, commit
metrics.jsonl      a line each log              result.json        how the run went (training)
checkpoints/       for --resume                 evaluation.json    scores on unseen rows
adapter/           adapter, model card, task    predictions.jsonl  what was predicted on them
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.files import make_folder, write_json, write_text
from curvelora_training.checkpoint import newest_whole, sweep

CONTENTS = (
    *("config.yaml", "environment.json", "metrics.jsonl", "result.json", "evaluation.json", "predictions.jsonl"),
    *("checkpoints", "adapter"),
)
RESUMABLE = "mend that and continue with --resume; what was saved before is whole"
FULL = 1 << 20  # bytes; a disk with less is called full


class RunFolder:
    """Paths and writers of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.fence: Callable[[], None] = lambda: None
        """Called before every write; raises where another attempt writes here now."""

    def held(self) -> list[str]:
        """What the folder holds of an earlier run."""
        return [name for name in CONTENTS if (self.path / name).exists()]

    def check_free(self, resume: bool, overwrite: bool) -> None:
        """Raise `UserError` where the folder holds a run and neither resume nor overwrite was asked for; changes nothing."""
        if (held := self.held()) and not (resume or overwrite):
            raise UserError(
                f"{self.path} holds a run already ({', '.join(held)}): add --resume to continue it, --overwrite to replace it, "
                "or name another output"
            )

    def is_complete(self) -> bool:
        """Whether the run that the folder holds came to its end."""
        return self.adapter.is_dir() and (self.path / "result.json").is_file()

    def open(self, resume: bool, overwrite: bool) -> None:
        """Create the folder, or take over an existing one.

        Raises:
            UserError: as `check_free` does, or the folder cannot be written.
        """
        self.check_free(resume, overwrite)
        make_folder(self.path)
        if overwrite and not resume:
            for name in self.held():
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink()
        sweep(self.checkpoints)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole, or None; newer ones that are not are named and set aside."""
        return newest_whole(self.checkpoints)

    def forget_after(self, step: int) -> None:
        """Drop the metrics after `step`, which a resumed run will write again."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # the line that was being written when the run was stopped
        write_text(self.metrics, "".join(line + "\n" for line in kept))

    def logged(self, key: str) -> Any:
        """The last value of `key` in metrics.jsonl, or None."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        return next((record[key] for line in reversed(lines) if key in (record := json.loads(line))), None)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; values that JSON cannot hold (NaN, infinity) become null."""
        self.fence()
        plain = _finite(record)
        try:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(plain, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.metrics} cannot be written ({error.strerror}): {RESUMABLE}") from error

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        """Write one of the JSON files, whole or not at all; as in `log`, NaN and infinity become null: runs may diverge."""
        self.fence()
        write_json(self.path / name, _finite(record))

    def write_text(self, name: str, text: str) -> None:
        """Write one of the text files, whole or not at all."""
        self.fence()
        write_text(self.path / name, text)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _finite(v) if isinstance(v, dict) else v for k, v in record.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in nested.items()}


@contextlib.contextmanager
def whole_or_none(temporary: Path) -> Iterator[None]:
    """Save into `temporary`; what is there when saving fails, or is stopped, is removed.

    Args:
        temporary: named by `temporary_for`; messages call it by the name that it was to get.

    Raises:
        UserError: it could not be saved. A full disk is an OSError, a SafetensorError, a RuntimeError (torch) or a plain
            Exception (tokenizers), so none is told apart here.
    """
    try:
        yield
    except BaseException as error:
        free = shutil.disk_usage(next(p for p in temporary.absolute().parents if p.exists())).free
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        # torch's own words for a full disk are "unexpected pos 64 vs 0"
        why = "No space left on device" if free < FULL else " ".join(str(error).split()) or type(error).__name__
        final = temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp"))
        raise UserError(f"{final} cannot be saved ({why}): {RESUMABLE}") from error
