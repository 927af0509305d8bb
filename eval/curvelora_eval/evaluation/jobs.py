"""The work cut into jobs: one task with one model, and everything that decides its predictions."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curvelora.errors import UserError
from curvelora_eval.environment import installed_version
from curvelora_eval.evaluation.arms import Arm
from curvelora_eval.evaluation.ask import Plan
from curvelora_eval.evaluation.finished import RESULT, identity, read_results
from curvelora_eval.evaluation.problems import Problems
from curvelora_eval.evaluation.question import Question
from curvelora_eval.models import attention, default_device, load_config, storage_of
from curvelora_eval.predict import journal
from curvelora_eval.spec import ModelSpec, TaskSpec
from curvelora_eval.tasks import make_task

PREDICTIONS, MERGED = "predictions.jsonl", "merged"
# libraries whose next version may compute otherwise
DECIDING = ("torch", "transformers", "tokenizers", "peft", "curvelora", "curvelora-eval")
CUTS = "batch_size"  # decides which rows share a batch, and so matters to a journal, but not to a finished result
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
            before, now = ({k: v for k, v in x.items() if k != CUTS} for x in (found["decided_by"], self.decided_by))
            journal.check_same(self.folder, before, now)
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
        CUTS: batch_size,
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
    """Refuse to mix evaluations, or with `overwrite` remove what is another one's; what is this one's stays.

    Raises:
        UserError: folders hold something else, or a label's other tasks are of another model (which `overwrite` does not remove,
            as nobody asks for these tasks anew); all of them, a line each.
    """
    problems = Problems()
    for sentence in _other_models(jobs):
        problems.add(sentence)
    foreign = []
    for job in jobs:
        for folder, check in ((job.folder, _check_own), (job.folder / MERGED, _check_merged)):
            try:
                check(job)
            except UserError as error:
                if overwrite:
                    foreign.append(folder)
                else:
                    problems.add(str(error))
    problems.refuse()
    for folder in foreign:
        clear(folder)


def _other_models(jobs: Sequence[Job]) -> Iterator[str]:
    """A sentence for every label that has scores of another model in tasks that are not asked now."""
    asked = {job.folder for job in jobs}
    for label, job in {job.arm.label: job for job in jobs}.items():
        place = job.folder.parent
        for name, record in read_results(place.parent).get(label, {}).items():
            found = journal.differences(identity(record.get("decided_by", {})), identity(job.decided_by))
            if found and place / name not in asked:
                yield (
                    f"{place / name} holds the score of another model, which is also called {label} ({'; '.join(found)}): name "
                    "another --out, or delete that folder"
                )
                break


def _check_own(job: Job) -> None:
    if job.result() is not None:  # a kill between its writing and this leaves journals behind
        journal.clear(job.folder)
    journal.check_headers(job.folder, job.decided_by)


def _check_merged(job: Job) -> None:
    journal.check_headers(job.folder / MERGED, job.decided_by | {"merged": True})


def clear(folder: Path) -> None:
    """Remove a job's results and journals, with those of its merged form."""
    for place in (folder, folder / MERGED):
        if place.is_dir():
            journal.clear(place)
            for name in (RESULT, PREDICTIONS):
                (place / name).unlink(missing_ok=True)
