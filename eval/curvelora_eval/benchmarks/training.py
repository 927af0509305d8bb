"""Rows of a named task as the columns that training needs, so that training and evaluation share one definition.

A recipe says `train: {path: DATA, task: boolq, split: train}`. Generative protocols give prompt and completion, in the wording
that the original trained with; heads give text, text_pair and label; texts give text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.benchmarks.base import Benchmark, LoadedRows
from curvelora_eval.benchmarks.protocols import GenerateProtocol, HeadProtocol, PerplexityProtocol, Protocol
from curvelora_eval.spec import DataSpec

HUB = "hub"
"""The path that stands for the Hugging Face hub."""
UNFIT = ("column_names", "rename")  # settings of files that are read as tables


def load_task_rows(spec: DataSpec) -> Dataset:
    """The rows of `spec.task`, below `spec.path` or from the hub; the split is train where none is named.

    Raises:
        UserError: everything that is wrong with the settings, at once; or what `benchmarks.load` finds wrong.
    """
    benchmark, protocol, template, split = _resolve(spec)
    loaded = benchmarks.load(benchmark, data_dir(spec), split, spec.limit)
    unlabelled = [row.id for row in loaded.rows if row.answer is None]
    if unlabelled and not isinstance(protocol, PerplexityProtocol):
        raise UserError(
            f"task {benchmark.name}, split {loaded.split}: {len(unlabelled)} of {len(loaded.rows)} rows have no answer, so "
            "nothing can be learnt from them: choose a labelled split"
        )
    return _table(loaded, protocol, template)


def data_dir(spec: DataSpec) -> Path | None:
    """The folder, or None for the hub."""
    return None if spec.path == HUB else Path(spec.path)


def task_file(spec: DataSpec) -> Path | None:
    """The file that holds the rows; None for the hub."""
    benchmark, _, _, split = _resolve(spec)
    folder = data_dir(spec)
    return None if folder is None else benchmarks.find_file(benchmark, split, folder)


def _resolve(spec: DataSpec) -> tuple[Benchmark, Protocol, str, str]:
    problems = [f"{name} has no meaning for a named task: leave it out" for name in UNFIT if getattr(spec, name)]
    benchmark = protocol = template = split = None
    try:
        benchmark = benchmarks.get(spec.task)
    except UserError as error:
        problems.append(str(error))
    if benchmark is not None:
        try:
            split, _ = benchmark.split(spec.split or "train")
        except UserError as error:
            problems.append(str(error))
        try:
            protocol = training_protocol(benchmark, spec.protocol)
            template = protocol.template(spec.template)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return benchmark, protocol, template, split


def training_protocol(benchmark: Benchmark, name: str | None) -> Protocol:
    """The protocol that words training rows: the named or the default one, of training sets their own.

    Raises:
        UserError: no such protocol, or one that has no training rows (loglikelihood).
    """
    if name is None and benchmark.training is not None:
        return benchmark.training
    protocol = benchmark.protocol(name)
    if not isinstance(protocol, GenerateProtocol | HeadProtocol | PerplexityProtocol):
        fit = [other for other, p in benchmark.protocols.items() if type(p) is not type(protocol)]
        raise UserError(f"protocol {protocol.name} only scores, and has no training rows: take {' or '.join(fit)}")
    return protocol


def _table(loaded: LoadedRows, protocol: Protocol, template: str) -> Dataset:
    if isinstance(protocol, GenerateProtocol):
        pairs = [protocol.training_text(row, template) for row in loaded.rows]
        return Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
    if isinstance(protocol, PerplexityProtocol):
        return Dataset.from_dict({"text": [protocol.text(row) for row in loaded.rows]})
    return _labelled(loaded, protocol)


def _labelled(loaded: LoadedRows, protocol: HeadProtocol) -> Dataset:
    columns: dict[str, list[Any]] = {}
    for row in loaded.rows:
        for name, value in protocol.columns(row).items():
            columns.setdefault(name, []).append(value)
    if protocol.labels is None:
        return Dataset.from_dict(columns)
    # the class names travel with the rows: their order decides which class is 1, which F1 is about
    columns["label"] = [protocol.labels.index(name) for name in columns["label"]]
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=list(protocol.labels)))
