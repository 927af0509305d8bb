"""Rows of a named task from a local folder or the hub, checked before anything is scored."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from curvelora.errors import UserError
from curvelora_eval.benchmarks.base import Benchmark, LoadedRows, Row, Rows, Split

PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What unpacking a damaged file raises."""
MOST_BYTES = 2 << 30
"""No file of these tasks unpacks to more; one that does is not what it claims to be."""
SHOWN = 3  # faulty rows in one message


def find_file(benchmark: Benchmark, split: str, data_dir: Path) -> Path:
    """The file of `split` below `data_dir`, as it is or packed.

    Raises:
        UserError: the folder or the file is missing; says where it was looked for.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is no folder: name the folder that holds the tasks' data")
    wanted = benchmark.splits[split].files
    for name in wanted:
        for ending in ("", *PACKED):
            if (path := data_dir / (name + ending)).is_file():
                return path
    there = [name for name in benchmark.splits if name != split and has_file(benchmark.splits[name], data_dir)]
    hint = f"; splits that are there: {', '.join(there)}" if there else ""
    if benchmark.if_missing is not None:
        hint += f"; {benchmark.if_missing(data_dir)}"
    raise UserError(
        f"{benchmark.name} has no file for its split {split} below {data_dir}: looked for {' and '.join(wanted)} "
        f"(also with {', '.join(PACKED)}){hint}"
    )


def has_file(split: Split, data_dir: Path) -> bool:
    """Whether `find_file` would find one."""
    return any((data_dir / (name + ending)).is_file() for name in split.files for ending in ("", *PACKED))


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file, unpacked where its name says that it is packed.

    Raises:
        UserError: damaged, empty, or larger than `most` bytes when unpacked.
    """
    opener: Callable[[Path], BinaryIO] = PACKED.get(path.suffix, lambda name: name.open("rb"))
    try:
        with opener(path) as stream:
            content = stream.read(most + 1)
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from error
    if len(content) > most:
        raise UserError(
            f"{path} unpacks to more than {most >> 20} MiB, which no data of these tasks does: it was not read"
        )
    if not content.strip():
        raise UserError(f"{path} is empty: nothing can be learnt or scored from it")
    return content


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, without a byte-order mark and with every line end as it is.

    Raises:
        UserError: as `read_bytes`, or not UTF-8.
    """
    try:
        return io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8-sig", newline="").read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error


def load(
    benchmark: Benchmark, data_dir: Path | None = None, split: str | None = None, limit: int | None = None
) -> LoadedRows:
    """The rows of one split; `data_dir` None asks the hub.

    Args:
        benchmark: the task.
        data_dir: folder with the tasks' data, in the layout of `docs/tasks.md`.
        split: name of the split; None takes the task's own default.
        limit: only the first so many rows (of a text: lines).

    Raises:
        UserError: no such split or file, a damaged or empty file, duplicate ids, or answers outside the task's.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}: leave it out for all rows")
    name, described = benchmark.split(split)
    if data_dir is None:
        from curvelora_eval.benchmarks.hub import load_hub

        sha256 = None
        path, version, rows = load_hub(benchmark, name)
    else:
        file = find_file(benchmark, name, data_dir)
        version = None
        path, sha256, rows = str(file), _sha256(file), benchmark.read(file, name)
    check_rows(benchmark, rows, path)
    left_out = rows.left_out if isinstance(rows, Rows) else 0
    if limit is not None:
        rows = benchmark.take(rows, limit)
    return LoadedRows(
        rows,
        name,
        path,
        sha256,
        benchmark.count(rows),
        described.published,
        benchmark.unit,
        left_out=left_out,
        hub_version=version,
    )


def load_all(
    tasks: Sequence[Benchmark], data_dir: Path | None, split: str | None = None, limit: int | None = None
) -> list[LoadedRows]:
    """`load` for several tasks.

    Raises:
        UserError: what is wrong with any of them, all at once, a line each.
    """
    loaded, problems = [], []
    for task in tasks:
        try:
            loaded.append(load(task, data_dir, split, limit))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return loaded


def check_rows(benchmark: Benchmark, rows: Sequence[Row], path: str) -> None:
    """Ids are unique and every answer is one that the task knows.

    Raises:
        UserError: says which rows are at fault, both kinds at once.
    """
    problems = []
    if not rows:
        raise UserError(f"{path} has no rows: nothing can be learnt or scored from it")
    twice = [name for name, times in Counter(row.id for row in rows).items() if times > 1]
    if twice:
        problems.append(
            f"{len(twice)} ids occur more than once ({', '.join(twice[:SHOWN])}): a row must have an id of its own"
        )
    if benchmark.answers is not None:
        wrong = [row for row in rows if row.answer is not None and row.answer not in benchmark.answers]
        if wrong:
            shown = ", ".join(f"{row.id} has {row.answer!r}" for row in wrong[:SHOWN])
            problems.append(
                f"{len(wrong)} rows have an answer that {benchmark.name} does not know ({shown}): "
                f"it knows {', '.join(benchmark.answers)}"
            )
    if benchmark.numbers is not None:
        low, high = benchmark.numbers
        wrong = [row for row in rows if row.answer is not None and not _is_number(row.answer, low, high)]
        if wrong:
            shown = ", ".join(f"{row.id} has {row.answer!r}" for row in wrong[:SHOWN])
            wanted = f"no number from {low:g} to {high:g}" if math.isfinite(low) else "no number"
            problems.append(f"{len(wrong)} rows have an answer that is {wanted} ({shown})")
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))


def _is_number(text: str, low: float, high: float) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return math.isfinite(value) and low <= value <= high


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
