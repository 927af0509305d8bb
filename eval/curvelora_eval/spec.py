"""What a run is about: the base model, the task and the rows, as plain dataclasses.

Training recipes contain these, and training writes the first two beside the adapter (`task.json`), so that an adapter can be
evaluated from its folder alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from curvelora.errors import UserError

TaskKind = Literal["causal_lm", "seq2seq", "sequence_classification", "regression", "image_classification"]
TASK_FILE = "task.json"


@dataclass(kw_only=True)
class ModelSpec:
    """The frozen base model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    path: str
    """Folder or hub name of a transformers checkpoint in safetensors."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Storage of the base and compute dtype of its matrix products; what trains is kept in float32 whatever this is."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """How the base's linear layers are stored (bitsandbytes); new heads stay unquantised."""
    double_quantization: bool = True
    """NF4 only: quantise the block scales as well (0.127 bit a weight instead of 0.5)."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """auto: flash attention where it is installed and the architecture has it, SDPA otherwise (eager on a CPU, where
    it was the faster)."""
    revision: str | None = None
    """Commit or tag, for hub names."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""


@dataclass(kw_only=True)
class TaskSpec:
    """What the model is asked to do with a row."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    kind: TaskKind
    """Decides the model class, the loss and the metrics."""
    columns: dict[str, str] = field(default_factory=dict)
    """Role -> column, or a template over columns such as "Question: {question}\\nAnswer:". Roles: text, text_pair, label
    (classification, regression); text, or prompt and completion (causal_lm); source, target (seq2seq); image, label."""
    labels: list[str] | None = None
    """Classification: the class names in order of their index; taken from the training rows where absent."""
    max_length: int = 256
    """Inputs are cut to this many tokens (cut rows are counted)."""
    max_target_length: int = 128
    """seq2seq: targets are cut to this many tokens."""
    max_new_tokens: int = 128
    """Generation: at most this many new tokens a row."""
    loss_on_prompt: bool = False
    """causal_lm with prompt and completion: count the prompt's tokens in the loss as well."""
    metrics: list[str] | None = None
    """Names from `curvelora_eval.metrics`; None takes the kind's own."""


@dataclass(kw_only=True)
class DataSpec:
    """Where rows come from."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    path: str
    """A .json, .jsonl, .csv, .tsv or .parquet file (also .gz), a folder of such files (a split each), a folder saved by
    `datasets`, a folder of images or of plain texts with one sub-folder a class, or a hub name. With task: the folder that
    holds the tasks' data, or `hub`."""
    split: str | None = None
    """For folders and hub names with several splits. With task: train where absent."""
    task: str | None = None
    """A named task (`curvelora tasks`), which then words the rows: prompt and completion, or text, text_pair and label."""
    protocol: str | None = None
    """With task: the protocol whose wording is taken; the task's first where absent."""
    template: str | None = None
    """With task: the protocol's wording, such as legacy or clean; its first where absent."""
    limit: int | None = None
    """Use only the first so many rows."""
    column_names: list[str] | None = None
    """Names for the columns of a .csv or .tsv file without a header."""
    rename: dict[str, str] | None = None
    """Column -> new name, where these rows call something otherwise than the other ones do."""


def write_task(folder: Path, model: ModelSpec, task: TaskSpec) -> None:
    """Write `task.json` into an adapter's folder."""
    record = {"schema": 1, "model": dataclasses.asdict(model), "task": dataclasses.asdict(task)}
    (folder / TASK_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_task(folder: Path) -> tuple[ModelSpec, TaskSpec] | None:
    """Read `task.json` back; None where the folder has none (an adapter that was not trained here).

    Raises:
        UserError: the file is damaged or of another version.
    """
    path = folder / TASK_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return _checked(ModelSpec(**record["model"])), _checked(TaskSpec(**record["task"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): write it again, or delete it and name the task yourself"
        ) from error


def _checked(spec: Any) -> Any:
    """`spec`, if every field that has a list of allowed values holds one of them; ValueError otherwise."""
    for name, hint in get_type_hints(type(spec)).items():
        if get_origin(hint) is Literal and getattr(spec, name) not in get_args(hint):
            raise ValueError(f"{name} is {getattr(spec, name)!r}, none of {', '.join(get_args(hint))}")
    return spec
