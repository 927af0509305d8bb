"""What must be the same in two evaluations before their difference means anything. There is no switch to waive it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from curvelora.errors import nearest
from curvelora_eval.benchmarks import BENCHMARKS
from curvelora_eval.compare.load import Arm, Evaluation


def problems(arms: list[Arm]) -> list[str]:
    """Return one sentence for each reason why the arms cannot be compared; empty where they can.

    Every evaluation is held against the one of the first arm's first run, so that all are like each other.
    """
    first = arms[0].runs[0]
    found = []
    for arm in arms:
        for number, run in enumerate(arm.runs):
            if run is first:
                continue
            name = arm.letter if len(arm.runs) == 1 else f"run {number + 1} of {arm.letter}"
            found += _tasks(first, run, name)
            for task in first:
                if task in run:
                    found += [f"{task}: {sentence}" for sentence in _unlike(first[task], run[task], name)]
    return found


def missing(arms: list[Arm], only: list[str] | None) -> list[str]:
    """Return a sentence for each name of a task that was asked for and that no arm holds."""
    there = {evaluation.result["task"] for arm in arms for run in arm.runs for evaluation in run.values()}
    return [
        f"no folder holds an evaluation of {name!r}, which --task names{nearest(name, BENCHMARKS)}"
        for name in dict.fromkeys(only or ())
        if name not in there
    ]


def notes(arms: list[Arm]) -> list[str]:
    """Return what a reader should know although the rows do compare: other base models, other files of the same rows."""
    first = arms[0].runs[0]
    found = []
    for what, value in _NOTED:
        seen = {
            arm.letter: sorted({_show(value(evaluation)) for run in arm.runs for evaluation in run.values()})
            for arm in arms
        }
        if len({tuple(values) for values in seen.values()}) > 1:
            found.append(
                f"{what} differs: " + "; ".join(f"{letter} {', '.join(v)}" for letter, v in seen.items()) + "."
            )
    for task in first:
        hashes = {_get(run[task], "dataset", "sha256") for arm in arms for run in arm.runs}
        if len(hashes) > 1:
            asked = {_get(run[task], "decided_by", "rows") for arm in arms for run in arm.runs}
            doubt = "; whether the texts are the same cannot be told" if None in asked else ", and so are the texts"
            found.append(
                f"{task}: ids and references are the same{doubt}; they were read from files that differ (sha256)."
            )
        subset = _get(first[task], "benchmark", "subset")
        if subset:
            found.append(f"{task}: {subset} published rows.")
    return found


def _tasks(first: dict[str, Evaluation], run: dict[str, Evaluation], name: str) -> Iterator[str]:
    only_first, only_run = sorted(set(first) - set(run)), sorted(set(run) - set(first))
    if only_first or only_run:
        parts = [f"only A has {', '.join(only_first)}"] if only_first else []
        parts += [f"only {name} has {', '.join(only_run)}"] if only_run else []
        both = sorted({first[task].result["task"] for task in set(first) & set(run)})
        hint = f"--task {','.join(both)} compares what both have" if both else "they have no task in common"
        yield f"A and {name} hold other tasks ({'; '.join(parts)}): {hint}"


def _unlike(a: Evaluation, b: Evaluation, name: str) -> Iterator[str]:
    settings = [(what, value(a), value(b)) for what, value in _ALIKE]
    differing = [(what, x, y) for what, x, y in settings if x != y]
    for what, x, y in differing:
        yield f"the {what} differs: A has {_show(x)}, {name} has {_show(y)}; evaluate both in the same way"
    if not differing:
        # The hash covers everything that decides a score, so it differs wherever the above does; then it says nothing new.
        for what, value in _FROZEN:
            if value(a) != value(b):
                yield f"the {what} differs, so another version wrote one of them: evaluate both with this version"
                return
    if _windows(a) != _windows(b):
        yield (
            f"the windows of the perplexity differ: A has {_windows(a)}, {name} has {_windows(b)}; more context before a token "
            "makes it easier, so evaluate both in the same windows"
        )
        return  # the ids of the windows differ as well, which says nothing new
    yield from _rows(a, b, name)


def _rows(a: Evaluation, b: Evaluation, name: str) -> Iterator[str]:
    missing, extra = a.records.keys() - b.records.keys(), b.records.keys() - a.records.keys()
    if missing or extra:
        example = next(row for row in (*a.records, *b.records) if row in missing or row in extra)
        yield (
            f"the rows differ: A has {len(a.records):,} and {name} {len(b.records):,}, {len(a.records) - len(missing):,} of "
            f"them with the same id (one of the others: {example!r}); evaluate both on the same rows"
        )
        return
    fields = [score.fields[1] for score in a.scores]
    for row, record in a.records.items():
        other = b.records[row]
        for field in fields:
            if record.get(field) != other.get(field):
                what = f"row {row!r} has {_show(record.get(field))} in A and {_show(other.get(field))} in {name}"
                if field == "tokens":
                    yield f"the numbers of tokens differ: {what}; perplexities of other tokenizers or windows do not compare"
                else:
                    yield f"the references differ: {what}; evaluate both on the same rows"
                return
    hashes = [_get(each, "decided_by", "rows") for each in (a, b)]
    if None not in hashes and hashes[0] != hashes[1]:
        yield (
            f"the questions differ: ids and references are the same, but A was asked other texts than {name} (decided_by.rows, "
            "their hash); evaluate both on the same rows"
        )


def _windows(evaluation: Evaluation) -> str | None:
    """Tokens a window and from one to the next; None for what is no perplexity of windows. A protocol may leave them to the
    model's limit, so its hash does not tell."""
    window, stride = (_get(evaluation, "decoding", key) for key in ("window", "stride"))
    return None if window is stride is None else f"{window} tokens, {stride} apart"


def _get(evaluation: Evaluation, *keys: str) -> Any:
    value: Any = evaluation.result
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _show(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


_Value = Callable[[Evaluation], Any]
_ALIKE: list[tuple[str, _Value]] = [
    ("split", lambda e: _get(e, "benchmark", "split") or _get(e, "dataset", "split")),
    ("prompt template", lambda e: e.protocol.get("template")),
    ("list of legacy quirks", lambda e: sorted(e.protocol.get("quirks") or [])),
    ("version of the protocol", lambda e: e.protocol.get("version")),
    ("version of the task", lambda e: _get(e, "benchmark", "version")),
    ("primary metric", lambda e: next(iter(e.result["metrics"]))),
]
_FROZEN: list[tuple[str, _Value]] = [
    ("hash of the protocol", lambda e: e.protocol.get("hash")),
    ("way of scoring", lambda e: e.result["scoring"]),
    (
        "decoding",
        lambda e: None if e.protocol else _get(e, "decoding"),
    ),  # in a protocol's hash, but for the model's own ids
]
_NOTED: list[tuple[str, _Value]] = [
    ("The base model", lambda e: _get(e, "model", "path")),
    ("The base's dtype", lambda e: _get(e, "model", "dtype")),
    ("The base's quantization", lambda e: _get(e, "model", "quantization")),
]
