"""The work cut into jobs: one task with one model, and everything that decides its predictions."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curvelora.errors import UserError
from curvelora_eval.environment import installed_version
from curvelora_eval.evaluation.arms import Arm
from curvelora_eval.evaluation.ask import Plan
from curvelora_eval.evaluation.problems import Problems
from curvelora_eval.evaluation.question import Question
from curvelora_eval.models import attention, default_device, load_config, storage_of
from curvelora_eval.predict import journal
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import make_task

RESULT, PREDICTIONS, MERGED = "evaluation.json", "predictions.jsonl", "merged"
# libraries whose next version may compute otherwise
DECIDING = ("torch", "transformers", "tokenizers", "peft", "curvelora", "curvelora-eval")
BITSANDBYTES = ("nf4", "fp4", "int8")  # storages that it computes with


@dataclass(frozen=True)
class Job:
    """One task with one model.

    Args:
        arm, question: the model and the task.
        spec: the task kind that decides the model class.
        folder: of the results.
        decided_by: everything that decides the predictions, by name.
    """

    arm: Arm
    question: Question
    spec: TaskSpec
    folder: Path
    decided_by: Mapping[str, Any]

    @property
    def base(self) -> tuple[Any, ...]:
        """Jobs with the same value run on the same loaded base."""
        return self.spec.kind, tuple(self.spec.labels or ()), self.arm.trained

    def result(self) -> dict[str, Any] | None:
        """The finished result, or None.

        Raises:
            UserError: there is one of another evaluation, or it is damaged.
        """
        path = self.folder / RESULT
        if not path.is_file() or not (self.folder / PREDICTIONS).is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            journal.check_same(self.folder, found["decided_by"], self.decided_by)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): add --overwrite to start anew") from error
        return found


def make_jobs(plan: Plan, out: Path, batch_size: int, model_hash: str | None) -> list[Job]:
    """Every task of every model, a model at a time."""
    same = {
        "model": model_hash,
        "dtype": plan.model.dtype,
        "quantization": plan.model.quantization,
        "double_quantization": plan.model.quantization == "nf4" and plan.model.double_quantization,
        "batch_size": batch_size,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    rows = {question.name: question.rows_hash() for question in plan.questions}
    computed = functools.cache(lambda kind: _computed_by(plan.model, TaskSpec(kind=kind)))
    jobs = []
    for arm in plan.arms:
        content = arm.content()
        for question in plan.questions:
            spec = question.task_spec(arm)
            decided_by = {
                "task": question.benchmark.name,
                "split": question.loaded.split,
                "rows": rows[question.name],
                "protocol": question.protocol.name,
                "protocol_hash": question.protocol.hash(question.template),
                "quirks": list(question.quirks_for(arm)),
                "head": [spec.labels, spec.max_length] if spec.kind != "causal_lm" else None,
                "adapter": content,
                **same,
                **computed(spec.kind),
            }
            jobs.append(Job(arm, question, spec, out / arm.label / question.name, decided_by))
    return jobs


def _computed_by(model: ModelSpec, spec: TaskSpec) -> dict[str, Any]:
    """The attention that `auto` comes to on this machine, and the versions of all libraries that compute."""
    task = make_task(spec)
    chosen = attention(model, task, default_device()) or "sdpa where the architecture has it"
    names = list(DECIDING)
    if storage_of(model, load_config(model, task)) in BITSANDBYTES:
        names.append("bitsandbytes")
    if chosen == "flash_attention_2":
        names.append("flash-attn")
    return {"attention": chosen, "versions": {name: installed_version(name) for name in names}}


def prepare(jobs: Sequence[Job], overwrite: bool) -> None:
    """Refuse to mix evaluations, or with `overwrite` remove what stands in the way.

    Raises:
        UserError: folders hold something else; all of them, a line each.
    """
    problems = Problems()
    for job in jobs:
        if overwrite:
            clear(job)
            continue
        with problems.collect():
            if job.result() is not None:  # a kill between its writing and this leaves journals behind
                journal.clear(job.folder)
            for folder in (job.folder, job.folder / MERGED):
                if folder.is_dir():
                    journal.check_headers(folder, job.decided_by | ({"merged": True} if folder.name == MERGED else {}))
    problems.refuse()


def clear(job: Job) -> None:
    """Remove a job's results and journals."""
    for folder in (job.folder, job.folder / MERGED):
        if folder.is_dir():
            journal.clear(folder)
            for name in (RESULT, PREDICTIONS):
                (folder / name).unlink(missing_ok=True)
