"""Do the jobs: each base loaded once, each adapter put on and taken off, each task predicted, scored and written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from curvelora.errors import UserError
from curvelora_eval.evaluation.arms import Arm
from curvelora_eval.evaluation.ask import Plan
from curvelora_eval.evaluation.checkpoint_hash import checkpoint_hash
from curvelora_eval.evaluation.finished import RESULT
from curvelora_eval.evaluation.jobs import MERGED, PREDICTIONS, Job, make_jobs, prepare
from curvelora_eval.evaluation.loaded_base import LoadedBase
from curvelora_eval.evaluation.merged import merged_record, why_not_exact
from curvelora_eval.evaluation.problems import Problems
from curvelora_eval.evaluation.result import evaluation_record, lines, remarks, score_job
from curvelora_eval.evaluation.summary import write_summary
from curvelora_eval.evaluator import describe_interval
from curvelora_eval.files import make_folder, write_json, write_text
from curvelora_eval.intervals import Interval
from curvelora_eval.merge import merge_weights
from curvelora_eval.models import load_base, load_processor
from curvelora_eval.predict import journal
from curvelora_eval.predict.base import Predictor
from curvelora_eval.predict.processes import Processes
from curvelora_eval.predict.run import Predicted, predict, predictor_for
from curvelora_eval.tasks import make_task


@dataclass
class Work:
    """Everything that the jobs of one call share."""

    plan: Plan
    args: argparse.Namespace
    processes: Processes
    _predictors: dict[tuple[Any, ...], Predictor] = field(default_factory=dict)
    _problems: Problems = field(default_factory=Problems)
    """Of single results, on the first process; they keep no other result from being made."""

    def do(self) -> None:
        """Do all jobs that are not finished yet, and write the summary.

        Raises:
            UserError: results of another evaluation are in the way, a model cannot be loaded, another process has ended, or (once
                everything else is done) some predictions cannot be scored.
        """
        args, processes = self.args, self.processes
        for note in self.plan.notes:
            self._say(f"note: {note}")
        self.model_hash = processes.on_first(lambda: checkpoint_hash(self.plan.model))
        jobs = make_jobs(self.plan, args.out, args.batch_size, self.model_hash["sha256"])
        processes.on_first(lambda: prepare(jobs, args.overwrite))
        for base in dict.fromkeys(job.base for job in jobs):
            self._on_one_base([job for job in jobs if job.base == base])
        if processes.first:
            write_summary(make_folder(args.out), [arm.label for arm in self.plan.arms])
        self._say(f"written: {args.out / 'summary.md'}")
        processes.on_first(self._problems.refuse)

    def _on_one_base(self, jobs: list[Job]) -> None:
        spec, trained = jobs[0].spec, jobs[0].arm.trained
        base = LoadedBase(lambda: load_base(self.plan.model, make_task(spec), trained=trained))
        tokenizer = load_processor(self.plan.model, make_task(spec))
        for arm in dict.fromkeys(job.arm for job in jobs):
            own = [job for job in jobs if job.arm is arm]
            open_jobs, merging = self.processes.on_first(partial(self._left, own))
            number = self.plan.arms.index(arm) + 1
            title = f"{arm.label} ({number} of {len(self.plan.arms)})"
            if not open_jobs and not merging:
                self._say(f"{title}: finished before, nothing to do")
                continue
            if base.loads:
                self._say(f"{title}: the base in memory is what it was, and is used again")
            model = base.put_on(arm.folder) if arm.folder else base.bare()
            for i in open_jobs:
                self._one(own[i], model, tokenizer, title)
            if merging := self.processes.on_first(partial(self._scored, own, merging)):
                self._merged(arm, [own[i] for i in merging], model, tokenizer, title)
            if (note := base.take_off()) is not None:
                self._say(f"{arm.label}: {note}")
        base.drop()

    def _one(self, job: Job, model: nn.Module, tokenizer: Any, title: str) -> None:
        """One task with one model, from its rows to its files."""
        check = self.args.batch_check if self.args.batch_size > 1 else 0
        predictor = self._predictor(job, model, tokenizer)
        predicted = self._predict(job, model, predictor, title, job.folder, job.decided_by, check)
        if predicted is None:
            return
        with self._problems.collect():
            record = evaluation_record(
                job, self.plan.model, self.model_hash, predictor, predicted, self.args.batch_size, self.processes.world
            )
            write_text(job.folder / PREDICTIONS, lines(predicted.records))
            write_json(job.folder / RESULT, record)
            journal.clear(job.folder)
            self._report(f"{job.arm.label}, {job.question.name}", record["metrics"], predictor, predicted)
            for remark in remarks(record):
                self._say(f"  {remark}")

    def _predictor(self, job: Job, model: nn.Module, tokenizer: Any) -> Predictor:
        """The task's rows, tokenised once for all models that are asked in the same way."""
        question, quirks = job.question, job.question.quirks_for(job.arm)
        key = (question.name, quirks, json.dumps(asdict(job.spec)))
        if key not in self._predictors:
            self._predictors[key] = predictor_for(
                question.protocol,
                question.template,
                make_task(job.spec),
                question.loaded.rows,
                tokenizer,
                model.config,
                quirks,
            )
        return self._predictors[key]

    def _predict(
        self,
        job: Job,
        model: nn.Module,
        predictor: Predictor,
        title: str,
        folder: Path,
        decided_by: Mapping[str, Any],
        check: int = 0,
    ) -> Predicted | None:
        return predict(
            model,
            predictor,
            folder,
            decided_by,
            self.args.batch_size,
            self.processes,
            f"{title}, {job.question.name}",
            job.question.protocol.scores,
            job.question.quirks_for(job.arm),
            check,
        )

    def _left(self, jobs: list[Job]) -> tuple[list[int], list[int]]:
        """Which of one model's jobs have no result yet, and which lack the merged model's score."""
        results = [job.result() for job in jobs]
        merging = self.args.merge_check and jobs[0].arm.folder is not None
        return (
            [i for i, found in enumerate(results) if found is None],
            [i for i, found in enumerate(results) if merging and "merged" not in (found or {})],
        )

    def _scored(self, jobs: list[Job], merging: list[int]) -> list[int]:
        """Those of `merging` that have a result, beside which the merged model's can stand."""
        return [i for i in merging if jobs[i].result() is not None]

    def _merged(self, arm: Arm, jobs: list[Job], model: nn.Module, tokenizer: Any, title: str) -> None:
        """Add the adapter to the weights, predict again, and put the scores beside the adapter's own."""
        why = why_not_exact(arm, self.plan.model, jobs[0].spec)
        if why is None:
            try:
                model = merge_weights(model, arm.folder)
            except UserError as error:
                why = str(error)
        if why is not None:
            self._say(f"{title}: not merged, because {why}")
        for job in jobs:
            if why is not None:
                self._add(job, {"exact": False, "why": why})
                continue
            folder, decided_by = job.folder / MERGED, {**job.decided_by, "merged": True}
            predictor = self._predictor(job, model, tokenizer)
            predicted = self._predict(job, model, predictor, f"{title}, merged", folder, decided_by)
            if predicted is None:
                continue
            with self._problems.collect():
                metrics = score_job(job, predicted.records)
                before = [
                    json.loads(line) for line in (job.folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
                ]
                write_text(folder / PREDICTIONS, lines(predicted.records))
                self._add(job, merged_record(metrics, predicted.records, before))
                journal.clear(folder)
                self._report(f"{job.arm.label}, {job.question.name}, merged", metrics, predictor, predicted)

    def _add(self, job: Job, merged: dict[str, Any]) -> None:
        if self.processes.first:
            write_json(job.folder / RESULT, job.result() | {"merged": merged})

    def _report(self, title: str, metrics: dict[str, Interval], predictor: Predictor, predicted: Predicted) -> None:
        number = len(predicted.records)
        what = "windows" if predictor.unit == "window" else "rows"
        for name, value in metrics.items():
            self._say(f"{title}: {name} {describe_interval(value)}  ({number} {what})")

    def _say(self, sentence: str) -> None:
        if self.processes.first:
            print(sentence, flush=True)
