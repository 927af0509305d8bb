"""The recipe: typed dataclasses, read from YAML with `key=value` overrides; every error is reported at once.

A section has its own dataclass; the model and the task are shared with evaluation (`curvelora_eval.spec`). The `adapter` section
takes `method` and that method's own options, checked against the method's config class.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from peft import PeftConfig
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from curvelora.errors import UserError, nearest
from curvelora.method import Method
from curvelora.registry import EXPLAINED, METHODS
from curvelora_eval.spec import DataSpec, ModelSpec, TaskSpec
from curvelora_training.recipes import find

_STRICT = {"extra": "forbid"}
Positive = Annotated[float, Field(gt=0, strict=True)]
NonNegative = Annotated[float, Field(ge=0, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(kw_only=True)
class RecipeData:
    """The rows of a run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    train: DataSpec
    """Rows to learn from. A bare path stands for `{path: ...}`, here and below."""
    validation: DataSpec | None = None
    """Rows whose loss is followed during training."""
    test: DataSpec | None = None
    """Unseen rows that are scored once at the end (evaluation.json)."""


@dataclass(kw_only=True)
class TrainingSpec:
    """How to train. Counts in steps are optimiser steps."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    learning_rate: Positive = 2e-4
    """Peak learning rate of the adapter."""
    head_learning_rate: Positive | None = None
    """Peak learning rate of a new head (and of modules_to_save); the adapter's where absent."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay of the adapter."""
    head_weight_decay: NonNegative | None = None
    """AdamW weight decay of the head's matrices; the adapter's where absent."""
    epochs: Positive = 3.0
    """Passes over the training rows, unless max_steps is given."""
    max_steps: Annotated[int, Field(ge=0)] | None = None
    """Stop after this many steps; 0 trains nothing and scores the untrained model."""
    batch_size: Count = 16
    """Rows a step and process, before accumulation."""
    accumulation: Count = 1
    """Batches whose gradients are added up before a step."""
    eval_batch_size: Count = 32
    """Rows a batch in evaluation."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Learning-rate schedule."""
    warmup: NonNegative = 0.0
    """Warm-up: below 1 a share of all steps, else a number of steps."""
    max_grad_norm: NonNegative = 1.0
    """Gradient clipping by global norm; 0 switches it off."""
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = (
        "adamw_torch"
    )
    """transformers' name of the optimiser."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    keep_products: Annotated[int, Field(ge=0)] = 0
    """With gradient_checkpointing, so many layers keep the results of large products: most of that time back for more memory."""
    kernels: Annotated[Literal["auto", "off", "fp8"], BeforeValidator(lambda v: "off" if v is False else v)] = "auto"
    """Fused kernels where adapter layers can take them; off: nowhere; fp8: LoRAN's gradients partly in FP8, to a bound."""
    liger: bool = False
    """liger-kernel's kernels in the rest of the model (RMSNorm, SwiGLU, RoPE, loss): less memory and time; needs a GPU."""
    group_by_length: bool = False
    """Batches of rows of similar length: less padding, a less random order."""
    log_every: Count = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: Count | None = None
    """Steps between two evaluations of the validation loss; once an epoch where absent."""
    save_every: Count | None = None
    """Steps between two checkpoints; once an epoch where absent."""
    keep_checkpoints: Count = 2
    """Older checkpoints beyond this many are deleted."""
    keep_best: bool = False
    """Write a checkpoint at every new lowest validation loss, and keep the last of them whatever its age."""
    timeout_minutes: Positive = 10.0
    """A process that waits this long for another one gives up, and the job ends; two hours while bases are loaded."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A step whose loss or gradient is NaN or infinite: end the run, leave the step out, or go back to the newest checkpoint."""
    max_rollbacks: Count = 3
    """With on_nonfinite: rollback, the run ends when it would have to go back more often."""
    deepspeed: str | None = None
    """A DeepSpeed JSON, for example ds_configs/zero2.json."""


@dataclass(kw_only=True)
class Published:
    """What a paper prints for this run; reports show it beside what was measured."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    source: str
    """The paper, and where in it."""
    metrics: dict[str, Finite] = field(default_factory=dict)
    """Metric -> value, in the units of evaluation.json (shares from 0 to 1). A name that evaluation.json has too, such as
    accuracy or rouge1, is shown beside it; others are shown by their name."""
    parameters: str | None = None
    """The number of trainable parameters as it is printed, for example 3.5M."""
    notes: list[str] = field(default_factory=list)
    """What to know before comparing, a sentence each."""


@dataclass(kw_only=True)
class Recipe:
    """One run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    output: str
    """Run folder: config, environment, metrics, checkpoints, adapter, model card and scores go there."""
    model: ModelSpec
    """The frozen base model."""
    task: TaskSpec
    """What the model is asked to do with a row."""
    data: RecipeData
    """The rows."""
    adapter: dict[str, Any]
    """`method`, one of `curvelora methods`, and that method's options."""
    training: TrainingSpec = field(default_factory=TrainingSpec)
    """How to train."""
    name: str | None = None
    """Title of the run in reports; the run folder's name where absent."""
    seed: int = 42
    """Seeds initialisation, data order and dropout."""
    published: Published | None = None
    """What a paper prints for this run; it changes nothing in training."""

    @property
    def method(self) -> Method:
        """The registry entry of the adapter."""
        return METHODS[self.adapter["method"]]

    def adapter_options(self) -> dict[str, Any]:
        """The adapter section without `method`."""
        return {key: value for key, value in self.adapter.items() if key != "method"}

    def peft_config(self, **more: Any) -> PeftConfig:
        """The PEFT config of the adapter, with `more` options added."""
        return self.method.build_config(**{**self.adapter_options(), **more})

    def as_yaml(self) -> str:
        """The resolved recipe: every default written out; reading it back gives the same recipe."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True, width=120)


class RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader, which also reads 1e-4 as a number; YAML 1.1 wants 1.0e-4 and makes a word of the other."""


RecipeLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """YAML as recipes use it. Raises `yaml.YAMLError`."""
    return yaml.load(text, RecipeLoader)


class RecipeError(UserError):
    """All errors of a recipe, a line each.

    Args:
        source: names the recipe.
        problems: a sentence each.
        remainder: the recipe without the values that are wrong, where that still makes one: its files, rows and shapes can
            be checked as well, so that a user sees all errors at once.
    """

    def __init__(self, source: str, problems: list[str], remainder: Recipe | None = None) -> None:
        self.problems = problems
        self.remainder = remainder
        count = "one error" if len(problems) == 1 else f"{len(problems)} errors"
        super().__init__(f"{source} has {count}:\n" + "\n".join(f"  - {problem}" for problem in problems))


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides and check its form (names, types, the method's options).

    Args:
        path: a file, or the name of a recipe that comes with the project.

    Raises:
        RecipeError: every error of form, in one message.
        UserError: the file is missing or no YAML mapping, or an override has no `=`.
    """
    path = find(path)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"the recipe {path} must be a mapping with the keys {', '.join(_names(Recipe))}")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], source: str) -> Recipe:
    """Check the form of a recipe given as plain data; `source` names it in messages. Raises `RecipeError`."""
    raw = dict(raw)
    if isinstance(raw.get("data"), dict):
        raw["data"] = {key: {"path": value} if isinstance(value, str) else value for key, value in raw["data"].items()}
    adapter_problems: list[str] = []
    if isinstance(raw.get("adapter"), dict):
        raw["adapter"], adapter_problems = check_adapter(raw["adapter"])
    recipe, errors = _validate(raw)
    if errors or adapter_problems:
        for error in errors:
            _drop(raw, _location(error))
        remainder = recipe or _validate(raw)[0]
        problems = [*map(_describe, errors), *adapter_problems]
        raise RecipeError(source, problems, None if adapter_problems else remainder)
    return recipe


def _validate(raw: dict[str, Any]) -> tuple[Recipe | None, list[Any]]:
    """(the recipe, no errors) or (None, pydantic's errors)."""
    try:
        return _form().validate_python(raw), []
    except ValidationError as error:
        return None, error.errors()


@functools.cache
def _form() -> TypeAdapter[Recipe]:
    """The checks of a recipe; to build them takes longer than to run them."""
    return TypeAdapter(Recipe)


def _drop(raw: dict[str, Any], location: list[str]) -> None:
    """Delete the value at `location`, where there is one."""
    node: Any = raw
    for key in location[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(location[-1], None)


def differing_keys(stored: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """Dotted keys on which a stored resolved recipe and this one differ, each with both values for messages."""

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict) or not node:
            return {prefix.rstrip("."): node}
        return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}

    old, new = flat(stored), flat(read_yaml(recipe.as_yaml()))
    return {
        key: f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    }


def check_adapter(section: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The adapter section with its values converted to the method's types, and what is wrong with it."""
    name = section.get("method")
    if name in EXPLAINED:
        return section, [f"adapter.method {EXPLAINED[name]}"]
    if name not in METHODS:
        said = "is missing" if name is None else f"has an unknown name {name!r}{nearest(name, METHODS)}"
        return section, [f"adapter.method {said} (known: {', '.join(METHODS)})"]
    types = METHODS[name].option_types()
    problems, options = [], {}
    short = {target: alias for alias, target in METHODS[name].aliases.items()}  # lora_alpha -> alpha
    for key, value in section.items():
        if key == "method":
            continue
        key = short.get(key, key)
        if key not in types:
            problems.append(
                f"adapter.{key}: method {name!r} has no such option{nearest(key, types)} (`curvelora methods {name}`)"
            )
            continue
        try:
            options[key] = TypeAdapter(types[key]).validate_python(value, strict=True)
        except ValidationError as error:
            problems.append(f"adapter.{key}: {_lower(error.errors()[0]['msg'])}, found {value!r}")
    try:
        config = METHODS[name].build_config(**options)
    except UserError as error:
        problems.append(f"adapter: {error}")
        return {"method": name, **options}, problems
    return {"method": name, **METHODS[name].settings(config), **options}, problems


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"an override is written key=value, for example training.learning_rate=1e-4, not {override!r}")
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        child = node.get(parent)
        if isinstance(child, str) and node is raw.get("data"):
            child = {"path": child}  # data.train.limit=10 on top of a bare path
        if child is not None and not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent!r} is a single value ({child!r}) and has no key {last!r}")
        node[parent] = node = child or {}
    try:
        node[last] = read_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"override {override!r}: the value is no valid YAML ({' '.join(str(error).split())})"
        ) from error


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _location(item: dict[str, Any]) -> list[Any]:
    """Where pydantic found an error. A union (DataSpec | None) adds the branch's type name; no key has a capital letter."""
    return [part for part in item["loc"] if not str(part)[:1].isupper()]


def _describe(item: dict[str, Any]) -> str:
    """One pydantic error as a sentence with the full key."""
    location = _location(item)
    key = ".".join(map(str, location))
    kind, found = item["type"], item.get("input")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        siblings = _section_keys(location[:-1])
        return f"{key}: unknown key{nearest(location[-1], siblings)} (known here: {', '.join(siblings)})"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key} is missing"
    return f"{key}: {_lower(item['msg'])}, found {found!r}"


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]


def _section_keys(location: list[Any]) -> list[str]:
    sections = {
        "model": ModelSpec,
        "task": TaskSpec,
        "data": RecipeData,
        "training": TrainingSpec,
        "published": Published,
    }
    if not location:
        return _names(Recipe)
    return _names(DataSpec if location[0] == "data" and len(location) > 1 else sections.get(location[0], Recipe))
