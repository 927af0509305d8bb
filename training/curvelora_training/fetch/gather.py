"""From a recipe to a folder: what it needs, where it comes from, where it is put, and the overrides that make a run use it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curvelora import __version__
from curvelora.errors import UserError
from curvelora_eval.benchmarks.training import task_file
from curvelora_eval.data import FORMATS
from curvelora_eval.files import make_folder, write_json
from curvelora_eval.spec import DataSpec
from curvelora_training.config import Recipe
from curvelora_training.fetch.hub import Remote, bring_model, bring_rows, choose, find_model, find_rows
from curvelora_training.fetch.manifest import KIND, MANIFEST, PARTS, SCHEMA, describe, files_below, inside, strangers

ROLES = ("train", "validation", "test")


@dataclass
class Plan:
    """What is to be brought; made before anything is written.

    Attributes:
        model: of the hub, or None where it is local.
        rows: role -> commit, of data sets on the hub.
        local: key of the recipe (model.path, data.train.path, ...) -> files that lie here.
    """

    recipe: Recipe
    model: Remote | None = None
    rows: dict[str, str] = field(default_factory=dict)
    local: dict[str, list[Path]] = field(default_factory=dict)


def asked_by(recipe: Recipe) -> dict[str, Any]:
    """What decides the files; kept in the manifest, so that one of another recipe is noticed."""
    specs = {role: getattr(recipe.data, role) for role in ROLES}
    return {
        "model": {"path": recipe.model.path, "revision": recipe.model.revision},
        "data": {role: {"path": spec.path, "split": spec.split} for role, spec in specs.items() if spec is not None},
        "deepspeed": recipe.training.deepspeed,
    }


def make_plan(recipe: Recipe) -> Plan:
    """Find everything that the recipe names; nothing is downloaded.

    Raises:
        UserError: all that cannot be found, in one message.
    """
    plan, problems = Plan(recipe), []
    try:
        if _is_local(recipe.model.path):
            plan.local["model.path"] = _local_model(recipe)
        else:
            plan.model = find_model(recipe.model)
    except UserError as error:
        problems.append(str(error))
    for role in ROLES:
        spec = getattr(recipe.data, role)
        if spec is None:
            continue
        try:
            if spec.task is not None:
                plan.local[f"data.{role}.path"] = [_file_of_task(spec)]
            elif _is_local(spec.path, *FORMATS, ".gz"):
                plan.local[f"data.{role}.path"] = _local_files(spec.path)
            else:
                plan.rows[role] = find_rows(spec)
        except UserError as error:
            problems.append(f"data.{role}: {error}")
    if recipe.training.deepspeed is not None:
        try:
            plan.local["training.deepspeed"] = _local_files(recipe.training.deepspeed)
        except UserError as error:
            problems.append(f"training.deepspeed: {error}")
    if problems:
        raise UserError("; ".join(problems))
    return plan


def gather(plan: Plan, folder: Path, source: str, copy: bool = False, wheels: Path | None = None) -> dict[str, Any]:
    """Bring everything into `folder` and write its manifest, last; returns the manifest.

    Args:
        source: names the recipe.
        copy: local files too; else they are listed where they lie.
        wheels: a requirements file.

    Raises:
        UserError: something does not come, does not fit, or would lie outside of `folder`; the manifest is not written then.
    """
    make_folder(folder)
    for part in PARTS:  # a link that leads out would be written through
        inside(folder, part)
    _check_room(plan, folder, copy)
    (folder / MANIFEST).unlink(missing_ok=True)
    overrides: dict[str, str | None] = {}
    known: set[str] = set()
    if plan.model is not None:
        bring_model(plan.model, make_folder(folder / "model"))
        overrides["model.path"] = "model"
        known |= {f"model/{name}" for name in plan.model.files}
        if plan.recipe.model.revision is not None:
            overrides["model.revision"] = None
    for role, commit in plan.rows.items():
        spec, file = getattr(plan.recipe.data, role), make_folder(folder / "data") / f"{role}.parquet"
        inside(folder, f"data/{file.name}")
        bring_rows(spec, commit, file)
        overrides[f"data.{role}.path"] = f"data/{file.name}"
        known.add(f"data/{file.name}")
        if spec.split is not None:
            overrides[f"data.{role}.split"] = None
    local: dict[str, Any] = {}
    for key, files in plan.local.items():
        if copy:
            names, overrides[key] = _copy(plan.recipe, key, files, folder)
            known |= names
        else:
            local |= {str(path.resolve()): describe(path) for path in files}
    if wheels is not None:
        known |= build_wheels(wheels, make_folder(folder / "wheels"))
    if more := strangers(folder, known):
        raise UserError(
            f"{folder} holds files that do not belong to it ({', '.join(more[:3])}{', ...' * (len(more) > 3)}): delete them, or "
            "name another folder"
        )
    record = {
        "schema": SCHEMA,
        "kind": KIND,
        "recipe": source,
        "asked": asked_by(plan.recipe),
        "commits": {role: commit for role, commit in plan.rows.items()}
        | ({"model": plan.model.commit} if plan.model is not None else {}),
        "overrides": overrides,
        "curvelora": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wheels_for": described_platform() if wheels is not None else None,
        "local": local,
        "files": {name: describe(inside(folder, name)) for name in sorted(known)},
    }
    _compare_with_hub(plan, record)
    write_json(folder / MANIFEST, record)
    return record


def described_platform() -> str:
    """What wheels are for."""
    return f"Python {'.'.join(platform.python_version_tuple()[:2])}, {platform.system()} {platform.machine()}"


def build_wheels(requirements: Path, folder: Path) -> set[str]:
    """Download or build a wheel for everything in a requirements file; returns their names below the folder above.

    Raises:
        UserError: pip is missing or fails; its own last words are in the message.
    """
    if not requirements.is_file():
        raise UserError(f"--wheels: there is no file {requirements}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--disable-pip-version-check",
        "--wheel-dir",
        str(folder.resolve()),
    ]
    # from its own folder, which paths in it (-e ./adapters) start from
    run = subprocess.run(
        [*command, "--requirement", requirements.name],
        cwd=requirements.resolve().parent,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if run.returncode != 0:
        words = [line for line in run.stderr.splitlines() if line.strip()]
        raise UserError(f"pip could not get the wheels of {requirements}: {' '.join(words[-3:])[:400]}")
    return {f"{folder.name}/{path.name}" for path in folder.glob("*.whl")}


def _compare_with_hub(plan: Plan, record: dict[str, Any]) -> None:
    """Raise `UserError` where a file is not what the hub said that it is."""
    for name, (_, wanted) in plan.model.files.items() if plan.model is not None else ():
        if wanted is not None and record["files"][f"model/{name}"]["sha256"] != wanted:
            raise UserError(f"model/{name} is not what the hub has (its sha256 differs): delete it and fetch again")


def _is_local(path: str, *endings: str) -> bool:
    """As loading decides it: what is here, or can be no name of a repository."""
    looks = path.startswith((".", "/", "~")) or path.count("/") > 1 or (bool(endings) and Path(path).suffix in endings)
    return looks or Path(path).exists()


def _local_files(path: str) -> list[Path]:
    if not Path(path).exists():
        raise UserError(
            f"{path} does not exist here, and it is no name on the hub: get it first, as the recipe's head says"
        )
    if not (files := files_below(Path(path))):
        raise UserError(f"{path} is an empty folder")
    return files


def _file_of_task(spec: DataSpec) -> Path:
    """The one file of a named task, and not everything in its data folder."""
    if (file := task_file(spec)) is None:
        raise UserError(f"task {spec.task} is read from the hub by its own definition: give a data folder as path to fetch it")
    return file


def _local_model(recipe: Recipe) -> list[Path]:
    folder = Path(recipe.model.path)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist here, and it is no name on the hub")
    chosen = choose(recipe.model, {path.name: None for path in folder.iterdir() if path.is_file()})
    return [folder / name for name in chosen]


def _copy(recipe: Recipe, key: str, files: list[Path], folder: Path) -> tuple[set[str], str]:
    """Copy what lies here; returns the names below `folder`, and the new value of `key`."""
    if key == "model.path":
        root, target = Path(recipe.model.path), "model"
    else:
        role = key.split(".")[1]  # train, validation, test, deepspeed
        root = Path(recipe.training.deepspeed if role == "deepspeed" else getattr(recipe.data, role).path)
        target = f"data/{role}/{root.resolve().name}"
    names = set()
    for path in files:
        name = f"{target}/{path.relative_to(root).as_posix()}" if root.is_dir() else target
        place = inside(folder, name)
        make_folder(place.parent)
        temporary = place.with_name(f".{place.name}.tmp")
        try:
            shutil.copyfile(path, temporary)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
        names.add(name)
    return names, target


def _check_room(plan: Plan, folder: Path, copy: bool) -> None:
    """Raise `UserError` where the disk is too small for what is known to come."""
    coming = 0
    for name, (size, _) in plan.model.files.items() if plan.model is not None else ():
        path = folder / "model" / name
        coming += 0 if path.is_file() and path.stat().st_size == size else size or 0
    if copy:
        coming += sum(path.stat().st_size for files in plan.local.values() for path in files)
    free = shutil.disk_usage(folder).free
    if coming > free:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB of free space, and {coming / 1e9:.1f} GB are to come: name another one"
        )
