"""Rows from files, folders or the hub, as a `datasets.Dataset`, with clear words when something is wrong."""

from __future__ import annotations

import csv
import hashlib
import mimetypes
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, config, load_dataset, load_from_disk
from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

from curvelora.errors import UserError, nearest
from curvelora_eval.spec import DataSpec

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
NO_ROWS = "{} has no rows: nothing can be learnt or scored from it"
_FIELD = re.compile(r"\{(\w+)\}")


def load_rows(spec: DataSpec) -> Dataset:
    """Load the rows that `spec` names.

    Raises:
        UserError: no such file or task, unknown format, damaged file, unknown split, or no rows.
    """
    disable_progress_bar()  # reading a file is quick, and its bar would hide the one that matters
    set_verbosity(CRITICAL)  # what it logs about a damaged file is in the exception as well
    if spec.task is not None:
        from curvelora_eval.benchmarks.training import load_task_rows

        return load_task_rows(spec)
    for name in ("protocol", "template"):
        if getattr(spec, name) is not None:
            raise UserError(f"{name} belongs to a named task: name the task as `task`, or leave {name} out")
    path = Path(spec.path)
    if spec.limit is not None and spec.limit < 1:
        raise UserError(f"limit must be at least 1, not {spec.limit}: leave it out for all rows")
    _check_cache()
    try:
        if path.is_file():
            rows = _load_file(path, spec)
        elif path.is_dir():
            rows = _load_folder(path, spec)
        else:
            rows = _load_hub(spec)
    except UserError:
        raise
    except Exception as error:  # each reader has its own exceptions; all of them mean that the rows cannot be read
        if "corresponds to no data" in str(error):  # a header alone
            raise UserError(NO_ROWS.format(spec.path)) from error
        raise UserError(f"{spec.path} cannot be read as {path.suffix or 'a data set'}: {_root_cause(error)}") from error
    if isinstance(rows, DatasetDict):
        if spec.split not in rows:
            known = ", ".join(rows)
            raise UserError(
                f"{spec.path} has the splits {known}: name one of them as `split`{nearest(spec.split or '', rows)}"
            )
        rows = rows[spec.split]
    if spec.rename:
        for column in spec.rename:
            columns_of(column, rows.column_names)
        if taken := sorted(set(spec.rename.values()) & (set(rows.column_names) - set(spec.rename))):
            raise UserError(f"{spec.path}: rename cannot give the name {taken[0]!r}, which another column has")
        rows = rows.rename_columns(spec.rename)
    if spec.limit is not None:
        rows = rows.select(range(min(spec.limit, len(rows))))
    if len(rows) == 0:
        raise UserError(NO_ROWS.format(spec.path))
    return rows


def _load_file(path: Path, spec: DataSpec) -> Dataset:
    suffix = _suffix(path)
    if suffix not in FORMATS:
        raise UserError(f"{path} has the ending {suffix!r}, which is none of {', '.join(FORMATS)} (each also as .gz)")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: nothing can be learnt or scored from it")
    options: dict[str, Any] = {}
    if FORMATS[suffix] == "csv":
        # GLUE-style .tsv files hold bare quotation marks, which are text and not quoting
        options = {"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
        if spec.column_names:
            options["names"] = spec.column_names
        # the words "null" and "NA" are text too; without this they become missing values
        options["keep_default_na"] = False
    return load_dataset(FORMATS[suffix], data_files=str(path), split="train", **options)


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _check_cache() -> None:
    """`datasets` writes what it reads into a cache below HF_HOME; without this its failure would blame the data file."""
    cache = Path(config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be made ({error.strerror}): set HF_HOME to a folder that can be written"
        ) from error


def _load_folder(path: Path, spec: DataSpec) -> Dataset | DatasetDict:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    tables = {p.name.split(".")[0]: p for p in sorted(path.iterdir()) if p.is_file() and _suffix(p) in FORMATS}
    if tables:
        return DatasetDict({split: _load_file(file, spec) for split, file in tables.items()})
    files = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
    if not files:
        raise UserError(
            f"{path} is an empty folder: it should hold a saved data set, or images in one sub-folder a class"
        )
    if all(mimetypes.guess_type(file.name)[0] in (None, "text/plain") for file in files):
        return _load_texts(path, files)
    images = load_dataset("imagefolder", data_dir=str(path))
    return images if spec.split else images.get("train", images)


def _load_texts(path: Path, files: list[Path]) -> Dataset:
    """Rows of `text` and `label` (the sub-folder's name), in the order of the paths; Latin-1 where a text is not UTF-8."""
    if stray := [file for file in files if len(file.relative_to(path).parts) != 2]:
        raise UserError(
            f"{path} should hold texts in one sub-folder a class, and {stray[0].relative_to(path)} is elsewhere"
        )
    rows: dict[str, list[str]] = {"text": [], "label": []}
    for file in sorted(files):
        content = file.read_bytes()
        if b"\0" in content:
            raise UserError(f"{path}: {file.relative_to(path)} is neither a text nor an image")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        rows["text"].append(text)
        rows["label"].append(file.parent.name)
    return Dataset.from_dict(rows)


def _load_hub(spec: DataSpec) -> Dataset | DatasetDict:
    looks_local = spec.path.startswith((".", "/", "~")) or Path(spec.path).suffix in (*FORMATS, ".gz")
    if looks_local or spec.path.count("/") > 1:
        raise UserError(f"{spec.path} does not exist: check the path, which is taken from the folder you are in")
    try:
        return load_dataset(spec.path, split=spec.split)
    except Exception as error:
        reason = _root_cause(error)
        raise UserError(
            f"{spec.path} is neither a file or folder here nor a data set that the hub gave: {reason}"
        ) from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def columns_of(pattern: str, available: list[str]) -> list[str]:
    """The columns that a role's column name or template uses.

    Raises:
        UserError: one that does not exist, with the nearest and the list.
    """
    used = [pattern] if pattern in available else _FIELD.findall(pattern) or [pattern]
    for column in used:
        if column not in available:
            raise UserError(
                f"there is no column {column!r}{nearest(column, available)} (columns: {', '.join(available)})"
            )
    return used


def render(pattern: str, row: dict[str, Any]) -> Any:
    """The value of a role in one row: the column's own value, or the template filled in (missing values become empty)."""
    if pattern in row:
        return row[pattern]
    return _FIELD.sub(lambda match: "" if row[match[1]] is None else str(row[match[1]]), pattern)


def rows_fingerprint(spec: DataSpec) -> str | None:
    """`fingerprint` of what the rows were read from: of a named task its own file, not the whole data folder."""
    if spec.task is None:
        return fingerprint(spec.path)
    from curvelora_eval.benchmarks.training import task_file

    file = task_file(spec)
    return None if file is None else fingerprint(file)


def fingerprint(path: str | Path) -> str | None:
    """SHA-256 of a file, or of the names and contents below a folder; None for a hub name."""
    path = Path(path)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            # with its end and the size, or a name could run into the content
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
