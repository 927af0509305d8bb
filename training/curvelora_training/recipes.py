"""The recipes that come with the project, by name.

They lie in training/recipes of a clone, and in share/curvelora/recipes where the package was installed from a wheel.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from curvelora.errors import UserError, nearest

SHARED = "share/curvelora/recipes"


def folder() -> Path:
    """Where the recipes lie.

    Raises:
        UserError: nowhere that is known.
    """
    beside = Path(__file__).resolve().parents[1]  # training/ of a clone; what `pip install --target` was given
    places = (beside / "recipes", beside / SHARED, Path(sysconfig.get_path("data")) / SHARED)
    for place in places:
        if (place / "demo.yaml").is_file():
            return place
    raise UserError(f"the recipes are nowhere that is known ({', '.join(map(str, places))}): name a recipe by its path")


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name_or_path: str | Path) -> Path:
    """The file of a recipe: a path that exists, else a recipe of the project by its name, with or without `.yaml`.

    Raises:
        UserError: neither; the nearest name is in the message.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.parent != Path():
        raise UserError(f"the recipe {path} does not exist")
    known = names()
    name = path.name.removesuffix(".yaml")
    if name in known:
        return folder() / f"{name}.yaml"
    raise UserError(
        f"the recipe {path} does not exist: there is neither such a file nor a recipe of that name{nearest(name, known)} "
        "(`curvelora recipes` lists them)"
    )
