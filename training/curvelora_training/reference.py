"""The recipe reference, docs/recipes.md, written from the dataclasses so that it cannot fall behind them.

python -m curvelora_training.reference > docs/recipes.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import typing

from curvelora_eval.spec import DataSpec, ModelSpec, TaskSpec
from curvelora_training.config import Published, Recipe, RecipeData, TrainingSpec
from curvelora_training.recipes_command import markdown

INTRODUCTION = """# Recipes

A recipe is one YAML file; `curvelora train --config recipe.yaml section.key=value ...` runs it with some values replaced.
Unknown keys, wrong types and impossible combinations are reported together, before any weight is loaded; `--dry-run`
prints the resolved recipe and what would train.
`--config` also takes the name of a recipe that comes with the project (`training/recipes`; `curvelora recipes` lists them, and so
does the [end of this page](#recipes-that-come-with-the-project)). The demo's, `demo`, runs on a CPU.

This page is written by `python -m curvelora_training.reference`.
"""
RECIPES = """## Recipes that come with the project

Names are MODEL_TASK_METHOD. Each says at its head what it reproduces, from which source, what its rows look like and how it is
launched. A line that says "not stated" (in the paper) or "not recorded" (here: the paper has a value that could not be had, or a
range) is a choice of this project, with its reason. What a paper prints for the run stands in `published`, and `curvelora report`
shows it beside what was measured. Those of source `ours` are in no paper. Models have their names on the hub; so have some data
sets, and the rows of the others lie under `data/`, in the formats in which they are published.
"""
MISSING = """### What is not there

* LoRAN on other GLUE tasks than MRPC, and on images: no source says that it was run there. QLoRA is there for each of them.
* DTD, the eighth of AuroRA's image sets: FourierFT, whose setting AuroRA takes, draws its test images at random.
* The image sets of RanLoRA's paper are not recorded: its recipes stand beside AuroRA's, on CIFAR-10 and six other sets.
* Random crops and mirrored images, which FourierFT trains on.
* Subject-driven generation with SDXL (AuroRA): there are no diffusion models here.
* Plain LoRA on Llama-3-70B: its counterpart there is QLoRA, as for everything at 70B.
* The learning rate of each task in RanLoRA's tables 12 to 15 is not recorded: recipes have one rate, and say at that line whence.
"""
SECTIONS: dict[str, type] = {
    "Top level": Recipe,
    "model": ModelSpec,
    "task": TaskSpec,
    "data": RecipeData,
    "data.train, data.validation, data.test": DataSpec,
    "training": TrainingSpec,
    "published": Published,
}


def field_texts(section: type) -> dict[str, str]:
    """Field -> the text below it in the source, on one line."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    texts = {}
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[node.target.id] = " ".join(str(below.value.value).split())
    return texts


def type_name(hint: object) -> str:
    """A type as a recipe's author would say it."""
    if typing.get_origin(hint) is typing.Annotated:
        return type_name(typing.get_args(hint)[0])
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    if arguments := [a for a in typing.get_args(hint) if a is not type(None)]:
        if typing.get_origin(hint) is list:
            return f"list of {type_name(arguments[0])}"
        return "mapping" if typing.get_origin(hint) is dict else " or ".join(map(type_name, arguments))
    names = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    return names.get(hint, "section")


def table(section: type) -> str:
    """One row a field: key, type, default, meaning."""
    hints, texts = typing.get_type_hints(section, include_extras=True), field_texts(section)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(section):
        if field.default is not dataclasses.MISSING:
            default = "" if field.default is None else str(field.default)
        else:
            default = "" if field.default_factory is not dataclasses.MISSING else "required"
        cells = (f"`{field.name}`", type_name(hints[field.name]), default, texts[field.name])
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, section in SECTIONS.items():
        parts.append(f"## {title}\n\n{table(section)}\n")
    parts.append(
        "## adapter\n\n`method` is one of `curvelora methods`; the other keys are that method's options, with its defaults "
        "(`curvelora methods loran`).\n`alpha` and `dropout` mean the same for every method.\n"
    )
    parts.append(f"{RECIPES}\n{markdown()}\n")
    parts.append(MISSING)
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(reference())
