"""evaluation.json of a named task: the score, and everything needed to trust, compare or repeat it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.benchmarks.protocols import HeadProtocol, PerplexityProtocol
from curvelora_eval.environment import describe_environment
from curvelora_eval.evaluation.jobs import Job
from curvelora_eval.evaluator import INTERVAL_SEED, LEVEL, RESAMPLES
from curvelora_eval.intervals import Interval
from curvelora_eval.predict.base import Predictor
from curvelora_eval.predict.run import Predicted
from curvelora_eval.scoring import score_records
from curvelora_eval.spec import ModelSpec
from curvelora_eval.wording import percent


def lines(records: Sequence[dict[str, Any]]) -> str:
    """predictions.jsonl: a record a line."""
    return "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in records)


def score_job(job: Job, records: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """Metric key -> value with interval, the primary one first.

    Raises:
        UserError: the records cannot be scored.
    """
    protocol = job.question.protocol
    try:
        return score_records(records, protocol.scores, LEVEL, RESAMPLES, INTERVAL_SEED)
    except ValueError as error:
        raise UserError(f"{job.folder}: {error}") from error


def counts(job: Job, records: Sequence[dict[str, Any]], predictor: Predictor) -> dict[str, int]:
    """Rows, and what happened to some of them; of texts, how many windows and tokens they are."""
    found = {"rows": len(job.question.loaded.rows)}
    if not isinstance(job.question.protocol, PerplexityProtocol):
        over = sum(record.get("over_limit", False) for record in records)
        found["unparsable"] = sum(record["prediction"] is None for record in records) - over
        found["truncated"] = sum(record.get("truncated", False) for record in records)
        found["over_limit"] = over
    else:
        found["windows"] = len(records)
        found["tokens"] = sum(record["tokens"] for record in records)
    if isinstance(job.question.protocol, HeadProtocol):
        found["at_max_length"] = predictor.cut
    return found


def evaluation_record(
    job: Job,
    model: ModelSpec,
    model_hash: dict[str, Any],
    predictor: Predictor,
    predicted: Predicted,
    batch_size: int,
    processes: int,
) -> dict[str, Any]:
    """The content of evaluation.json (docs/results_format.md)."""
    question, protocol, loaded = job.question, job.question.protocol, job.question.loaded
    metrics = score_job(job, predicted.records)
    rows, windows = len(loaded.rows), isinstance(protocol, PerplexityProtocol)
    seconds = predicted.seconds
    return {
        "schema": 1,
        "kind": "evaluation",
        "task": question.benchmark.name,
        "metrics": metrics,
        "primary_metric": next(iter(metrics)),
        "interval": {
            "method": f"percentile bootstrap over {'windows' if windows else 'rows'}",
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seed": INTERVAL_SEED,
        },
        "benchmark": {
            "kind": question.benchmark.kind,
            "split": loaded.split,
            "rows": rows,
            loaded.unit: loaded.n,
            "published": loaded.published,
            "limit": question.limit,
            "subset": loaded.subset,
            "left_out": loaded.left_out,
            "version": question.benchmark.version,
        },
        "protocol": {
            "name": protocol.name,
            "version": protocol.version,
            "template": question.template,
            "hash": protocol.hash(question.template),
            "quirks": list(question.quirks_for(job.arm)),
            "kind": protocol.kind,
        },
        "decoding": predictor.decoding,
        "scoring": [asdict(score) for score in protocol.scores],
        "counts": counts(job, predicted.records, predictor),
        "batch_independence": predicted.independence,
        "notes": list(job.arm.notes),
        "seconds": seconds,
        "rows_per_second": rows / seconds if seconds else None,
        "tokens_per_second": predicted.tokens / seconds if seconds else None,
        "tokens_counted": predictor.counted,
        "batch_size": batch_size,
        "processes": processes,
        "resumed_batches": predicted.resumed,
        "repaired": predicted.repaired,
        "model": asdict(model) | model_hash,
        "adapter": job.arm.identity(),
        "classes": question.classes(job.arm),
        "dataset": {
            "path": loaded.path,
            "split": loaded.split,
            "sha256": loaded.sha256,
            "hub_version": loaded.hub_version,
            "rows": rows,
        },
        "decided_by": dict(job.decided_by),
        **_environment(),
    }


@functools.cache
def _environment() -> dict[str, Any]:
    """The same for all results of one command."""
    return describe_environment()


def remarks(record: dict[str, Any]) -> list[str]:
    """What a reader of the score must know, in sentences."""
    found, rows = record["counts"], record["counts"]["rows"]
    reasons = [(name, value) for name, value in record["metrics"].items() if value.get("reason")]
    said = [v["reason"] if v["value"] is not None else f"{name} is undefined: {v['reason']}" for name, v in reasons]
    said = list(dict.fromkeys(said))  # several metrics may have one reason
    if (benchmark := record["benchmark"])["subset"]:
        first = f"the first {benchmark['limit']} only, " if benchmark["limit"] else ""
        said.append(first + benchmark["subset"])
    if left_out := benchmark.get("left_out"):
        said.append(f"{left_out} broken {'line' if left_out == 1 else 'lines'} of the file left out")
    if (classes := record.get("classes")) and classes["known_by"] != "name":
        why = (
            "the adapter numbers its classes" if classes["known_by"] == "number" else "nothing names the head's classes"
        )
        said.append(f"{why}: they are taken in the task's own order")
    if found.get("over_limit"):
        said.append(
            f"{found['over_limit']} rows are longer than the model's limit: they were not asked, and count as wrong"
        )
    if found.get("unparsable"):
        said.append(f"no answer found in {percent(found['unparsable'] / rows)} of the rows, which count as wrong")
    if found.get("truncated"):
        said.append(f"{percent(found['truncated'] / rows)} of the texts were cut off at the limit of new tokens")
    if found.get("at_max_length"):
        said.append(f"{found['at_max_length']} inputs were cut at the training's length limit")
    if (check := record["batch_independence"]) and check["differ"]:
        said.append(
            f"the batch size matters here: {check['differ']} of {check['checked']} answers were others when asked alone"
        )
    if record["protocol"]["quirks"]:
        said.append(f"with the original scripts' defects {', '.join(record['protocol']['quirks'])}")
    return said + record.get("notes", []) + record["repaired"]
