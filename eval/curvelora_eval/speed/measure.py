"""Time the original loop on a sample of rows, and our engine on more of them, which hold the sample."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from curvelora_eval.benchmarks import Benchmark, LoadedRows, Row
from curvelora_eval.benchmarks.protocols import GenerateProtocol
from curvelora_eval.predict.batches import plan
from curvelora_eval.predict.processes import Processes
from curvelora_eval.predict.run import DoesNotFit, predict, predictor_for
from curvelora_eval.spec import TaskSpec
from curvelora_eval.speed.original import Answer, answer_rows
from curvelora_eval.tasks import make_task

WARM_UP = 2  # rows that the loop answers before the clock starts
T = TypeVar("T")


def measure(
    model: nn.Module,
    tokenizer: Any,
    benchmark: Benchmark,
    loaded: LoadedRows,
    protocol: GenerateProtocol,
    template: str,
    original_rows: int,
    batch_sizes: Sequence[int],
    seed: int = 0,
) -> dict[str, Any]:
    """Both ways of scoring one task, one after the other with the same model in the same process.

    A clock runs over all that either does with rows: tokenising, generating, reading the answers. Loading the model is left out,
    and so is a warm-up of both.

    Args:
        loaded: what the engine scores.
        original_rows: rows for the loop, drawn from `loaded` with `seed`.
        batch_sizes: the engine is timed with each; one that does not fit into memory is recorded as such.

    Returns:
        task, rows, protocol, and under `original` and `engine` (one entry a batch size): seconds, rows_per_second,
        new_tokens_per_second, peak_memory_bytes (GPU only); for the engine also `ratio` to the loop, and of how many rows of the
        sample (`compared`) answer and text are the same.
    """
    sample = sorted(random.Random(seed).sample(range(len(loaded.rows)), min(original_rows, len(loaded.rows))))
    # only the arithmetic script switches the cache off
    use_cache = benchmark.kind != "arithmetic"
    chosen = [loaded.rows[i] for i in sample]

    def loop(rows: Sequence[Row]) -> list[Answer]:
        return answer_rows(model, tokenizer, protocol, template, rows, use_cache)

    loop(chosen[:WARM_UP])
    answers, seconds, peak = timed(lambda: loop(chosen))
    tokens = sum(answer.new_tokens for answer in answers)
    original = {
        "rows": len(sample),
        "batch_size": 1,
        "use_cache": use_cache,
        **_rates(len(sample), tokens, seconds, peak),
        "slowest_row_seconds": max(answer.seconds for answer in answers),
    }
    engines = []
    for size in batch_sizes:
        try:
            engine = _engine(model, tokenizer, loaded.rows, protocol, template, size)
        except DoesNotFit:
            torch.cuda.empty_cache()
            engines.append({"batch_size": size, "out_of_memory": True})
            continue
        records = engine.pop("records")
        pairs = [(answer, records[i]) for answer, i in zip(answers, sample, strict=True)]
        engine |= {
            "ratio": engine["rows_per_second"] / original["rows_per_second"],
            "compared": len(pairs),
            "same_answer": sum(answer.prediction == record["prediction"] for answer, record in pairs),
            "same_text": sum(answer.text.strip() == (record["text"] or "").strip() for answer, record in pairs),
        }
        engines.append(engine)
    lengths = [len(tokenizer(protocol.prompt(row, template))["input_ids"]) for row in loaded.rows]
    return {
        "task": benchmark.name,
        "rows": {"n": loaded.n, "published": loaded.published, "subset": loaded.subset, "sha256": loaded.sha256},
        "protocol": {"name": protocol.name, "template": template, "hash": protocol.hash(template)},
        "decoding": {"num_beams": protocol.num_beams, "max_new_tokens": protocol.max_new_tokens},
        "prompt_tokens": {
            "mean": sum(lengths) / len(lengths),
            "mean_of_sample": sum(lengths[i] for i in sample) / len(sample),
            "longest": max(lengths),
        },
        "original": original,
        "engine": engines,
    }


def _engine(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], protocol: GenerateProtocol, template: str, size: int
) -> dict[str, Any]:
    """Our engine on `rows`, its journal included; `records` are its predictions."""
    task = make_task(TaskSpec(kind="causal_lm"))
    with tempfile.TemporaryDirectory() as folder:

        def score(chosen: Sequence[Row], title: str) -> Any:
            predictor = predictor_for(protocol, template, task, chosen, tokenizer, model.config)
            decided_by = {"rows": len(chosen)}
            return predict(model, predictor, Path(folder, title), decided_by, size, Processes(), title, protocol.scores)

        whole = predictor_for(protocol, template, task, rows, tokenizer, model.config)
        longest = [rows[whole.row_of[unit]] for unit in plan(whole.lengths, size)[0]]
        score(longest, "warm-up")  # the batch that takes the most memory
        found, seconds, peak = timed(lambda: score(rows, f"batches of {size}"))
    rates = _rates(len(rows), found.tokens, seconds, peak)
    return {"rows": len(rows), "batch_size": size, **rates, "records": found.records}


def timed(action: Callable[[], T]) -> tuple[T, float, int | None]:
    """(what `action` returns, seconds, the most GPU memory allocated meanwhile; None on a CPU)."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = action()
    if gpu:
        torch.cuda.synchronize()
    return result, time.perf_counter() - started, torch.cuda.max_memory_allocated() if gpu else None


def _rates(rows: int, tokens: int, seconds: float, peak: int | None) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "new_tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak,
    }
