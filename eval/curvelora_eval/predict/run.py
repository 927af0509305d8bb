"""Predict all rows of one task with one model: plan, journal, processes, progress, and a look at whether batches matter."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from curvelora.errors import UserError
from curvelora_eval.benchmarks.protocols import (
    ChoiceProtocol,
    GenerateProtocol,
    HeadProtocol,
    PerplexityProtocol,
    Protocol,
    Row,
)
from curvelora_eval.predict import journal
from curvelora_eval.predict.base import Output, Predictor, context_limit
from curvelora_eval.predict.batches import plan, share, spread
from curvelora_eval.predict.choices import Choices
from curvelora_eval.predict.generate import Generate
from curvelora_eval.predict.head import Head
from curvelora_eval.predict.perplexity import Perplexity
from curvelora_eval.predict.processes import Processes
from curvelora_eval.scoring import Score, statistic
from curvelora_eval.tasks import Task
from curvelora_eval.tasks.base import compute_context

PATIENCE = 2.0  # seconds between two running scores, at least
RANDOM = {"adapter-dropout", "checkpoint-sampling"}  # quirks that draw random numbers


class DoesNotFit(UserError):
    """A batch is larger than the device's memory."""


@dataclass(frozen=True)
class Predicted:
    """What came out of one task with one model.

    Args:
        records: a record a row, in order.
        seconds: of the busiest process, loading left out; over all runs where it was resumed.
        tokens: new tokens where text was generated, else tokens read.
        resumed: batches that earlier runs had done.
        repaired: sentences about half-written journals.
        independence: whether rows that were predicted again alone gave the same; None where that was not asked, or is random.
    """

    records: list[dict[str, Any]]
    seconds: float
    tokens: int
    resumed: int
    repaired: list[str]
    independence: dict[str, Any] | None


def predictor_for(
    protocol: Protocol,
    template: str,
    task: Task,
    rows: Sequence[Row],
    tokenizer: Any,
    config: Any,
    quirks: Sequence[str] = (),
) -> Predictor:
    """The predictor of a protocol's class, with the rows tokenised.

    Args:
        task: the model's task kind; a head's settings come from it.
        config: the model's, for its limit.
    """
    limit = context_limit(config)
    if isinstance(protocol, HeadProtocol):
        return Head(protocol, task, rows, tokenizer, limit)
    classes = {GenerateProtocol: Generate, ChoiceProtocol: Choices, PerplexityProtocol: Perplexity}
    found = next(predictor for kind, predictor in classes.items() if isinstance(protocol, kind))
    return found(protocol, template, rows, tokenizer, limit, quirks)


def predict(
    model: nn.Module,
    predictor: Predictor,
    folder: Path,
    decided_by: Mapping[str, Any],
    batch_size: int,
    processes: Processes,
    title: str,
    scores: Sequence[Score],
    quirks: Sequence[str] = (),
    check: int = 0,
) -> Predicted | None:
    """Predict what no journal in `folder` holds yet; the result on the first process, None on the others.

    Args:
        decided_by: everything that decides the predictions; the journals' header.
        title: of the progress bar.
        scores: of the protocol; the first one is shown while it runs.
        quirks: those that are the engine's own are obeyed here.
        check: so many units, spread over the lengths, are predicted again alone; none under quirks that draw random numbers.

    Raises:
        DoesNotFit: a batch is larger than the device's memory.
        UserError: the journals are of another evaluation or damaged, or another process has ended or writes here.
    """
    batches = plan(predictor.lengths, batch_size)
    repaired = processes.on_first(lambda: _prepare(folder, decided_by))
    done = journal.read(folder)
    processes.wait()  # nobody writes before all have read
    todo = [number for number in share(len(batches), processes.rank, processes.world) if number not in done]
    with journal.Journal(folder, processes.rank, decided_by) as mine, _mode(model, quirks):
        title += f" (1 of {processes.world} processes)" if processes.world > 1 else ""
        bar = _Progress(predictor, scores[0], batches, done, todo, title, shown=processes.first)
        for number in todo:
            started = time.perf_counter()
            outputs = _ask(model, predictor, batches[number], number if RANDOM & set(quirks) else None)
            entry = {
                "batch": number,
                "seconds": time.perf_counter() - started,
                "tokens": predictor.tokens(batches[number], outputs),
                "outputs": outputs,
            }
            mine.add(entry)
            bar.add(entry)
        bar.close()
        processes.wait()
        if not processes.first:
            return None
        entries = journal.read(folder)
        if missing := sorted(set(range(len(batches))) - set(entries)):
            raise UserError(f"{folder} lacks the batches {missing[:5]}: start the same command again, it does them")
        outputs = {
            unit: output
            for number, entry in entries.items()
            for unit, output in zip(batches[number], entry["outputs"], strict=True)
        }
        # what is drawn anew says nothing of batches
        checked = check and not RANDOM & set(quirks)
        independence = _independence(model, predictor, batches, outputs, check) if checked else None
    return Predicted(
        records=predictor.records(outputs),
        seconds=journal.seconds(folder),
        tokens=sum(entry["tokens"] for entry in entries.values()),
        resumed=len(done),
        repaired=repaired,
        independence=independence,
    )


def _prepare(folder: Path, decided_by: Mapping[str, Any]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return journal.repair(folder, decided_by)


@torch.inference_mode()
def _ask(model: nn.Module, predictor: Predictor, units: Sequence[int], seed: int | None = None) -> list[Output]:
    if seed is not None:  # so that a batch draws the same whenever and wherever it is done
        torch.manual_seed(seed)
    try:
        with compute_context(model):
            return predictor.predict(model, units)
    except (RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        longest = max(predictor.lengths[unit] for unit in units)
        raise DoesNotFit(
            f"{len(units)} sequences of up to {longest} tokens do not fit into the device's memory: give a smaller --batch-size"
        ) from error


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out: a GPU's, or (which torch says in words alone) the computer's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def _mode(model: nn.Module, quirks: Sequence[str]) -> Iterator[None]:
    """Eval mode, whatever mode the model came in; with the quirk, dropout stays on inside the adapter's layers."""
    model.eval()
    if "adapter-dropout" in quirks:
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                own = [m for name, m in layer.named_modules() if not name.startswith("base_layer")]
                for module in (m for m in own if m is layer or isinstance(m, nn.Dropout)):
                    module.training = True
    try:
        yield
    finally:
        model.eval()


def _independence(
    model: nn.Module, predictor: Predictor, batches: list[list[int]], outputs: Mapping[int, Output], count: int
) -> dict[str, Any]:
    """Predict some units again, each alone: how many answers differ, and by how much their numbers do at most."""
    differ, apart = 0, []
    chosen = spread(batches, count)
    for unit in chosen:
        units = predictor.together(unit)
        alone = [_ask(model, predictor, [u])[0] for u in units]
        other, distance = predictor.differs([outputs[u] for u in units], alone)
        differ += other
        apart += [] if distance is None else [distance]
    return {"checked": len(chosen), "differ": differ, "largest_difference": max(apart, default=None)}


class _Progress:
    """One bar: what earlier runs have done and what this process does (others go on beside it), and the score of that."""

    def __init__(
        self,
        predictor: Predictor,
        score: Score,
        batches: Sequence[Sequence[int]],
        done: Mapping[int, journal.Entry],
        todo: Sequence[int],
        title: str,
        shown: bool,
    ) -> None:
        self._predictor, self._score, self._batches = predictor, score, batches
        self._outputs: dict[int, Output] = {}
        self._shown_at, self._took = 0.0, 0.0
        for entry in done.values():
            self._take(entry)
        before = sum(len(batches[number]) for number in done)
        total = before + sum(len(batches[number]) for number in todo)
        self._bar = tqdm(total=total, initial=before, desc=title, unit=predictor.unit, disable=not shown)

    def add(self, entry: journal.Entry) -> None:
        self._take(entry)
        self._bar.update(len(entry["outputs"]))
        now = time.monotonic()
        if not self._bar.disable and now - self._shown_at > max(PATIENCE, 20 * self._took):
            self._show()
            self._shown_at, self._took = time.monotonic(), time.monotonic() - now

    def close(self) -> None:
        if not self._bar.disable:
            self._show()
        self._bar.close()

    def _take(self, entry: journal.Entry) -> None:
        units = self._batches[entry["batch"]]
        self._outputs.update(zip(units, entry["outputs"], strict=True))

    def _show(self) -> None:
        records = self._predictor.records(self._outputs)
        if not records:
            return
        found = statistic(records, self._score)(np.arange(len(records)))
        name, value = next(iter(found.items()))
        if value is not None:
            self._bar.set_postfix_str(f"{name} {value:.4f} so far")
