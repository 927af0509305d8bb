"""Results that documents quote: kept as small files, and written into the documents between marks, so that no number is typed.

    python -m curvelora_eval.lab.record --keep runs/lab docs/results/lab/minilm    the records and the page of a lab or sweep
    python -m curvelora_eval.lab.record README.md docs/sinter_lab.md               every marked block again

A block stands between `<!-- lab: KIND FILE ... -->` and `<!-- end of lab -->`, files relative to docs/results/lab. Kinds: `cost`
(records of `bench step`, or cost.json), `layers` (a record of `bench layer`), and of a results.json `runs`, `spectra`,
`verdict` and `presence` (the verdict's sentences on it alone).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from curvelora.cli import run_guarded
from curvelora.errors import UserError
from curvelora_eval.files import write_text
from curvelora_eval.lab.folder import dig
from curvelora_eval.wording import percent

RESULTS = Path("docs/results/lab")
BLOCK = re.compile(r"(<!-- lab: (\w+) ([^>]*?) -->\n).*?(<!-- end of lab -->)", re.DOTALL)
LINK_TO_A_RUN = re.compile(r'href="runs/[^"]*"')
KEPT = ("lab.json", "cost.json", "results.json", "sweep.json", "report.html")


def keep(folder: Path, target: Path) -> None:
    """Copy the records and the page; what the page takes from files of single runs, it then says to be from the whole.

    Raises:
        UserError: the folder holds neither a comparison nor a sweep.
    """
    if not any((folder / name).is_file() for name in ("results.json", "sweep.json")):
        raise UserError(f"{folder} holds no results.json or sweep.json: name a folder of `bench compare` or `sweep`")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in KEPT:
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8")
            if name.endswith(".json"):  # a record is data: without indentation it is half as large
                text = json.dumps(json.loads(text), separators=(",", ":"), allow_nan=False) + "\n"
            write_text(target / name, text)
    page = target / "report.html"
    if page.is_file():
        record = "results.json" if (target / "results.json").is_file() else "sweep.json"
        write_text(page, LINK_TO_A_RUN.sub(f'href="{record}"', page.read_text(encoding="utf-8")))


def rendered(text: str, results: Path) -> str:
    """`text` with every marked block written from the files that it names.

    Raises:
        UserError: an unknown kind of block, or a file that cannot be read.
    """

    def block(match: re.Match) -> str:
        start, kind, names, end = match.groups()
        if kind not in KINDS:
            raise UserError(f"there is no block of kind {kind!r} (known: {', '.join(KINDS)})")
        try:
            records = [json.loads((results / name).read_text(encoding="utf-8")) for name in names.split()]
        except (OSError, ValueError) as error:
            raise UserError(f"a block names {names}, which cannot be read below {results} ({error})") from error
        return start + "\n".join(KINDS[kind](records)) + "\n" + end

    return BLOCK.sub(block, text)


def _table(head: list[str], rows: list[list[str]], words: int = 1) -> Iterator[str]:
    """A Markdown table; all but the first `words` columns are numbers."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join(['---'] * words + ['---:'] * (len(head) - words))} |"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _cost(records: list[dict[str, Any]]) -> Iterator[str]:
    head = ["model", "arm", "step, s", "× baseline [95 %]", "tokens/s", "MFU", "peak GB", "J a step"]
    rows = []
    for record in records:
        model = Path(dig(record, "settings", "model") or "").stem
        shape = f"{model}, {record['tokens_per_step']:,} tokens"
        for key, arm in record["arms"].items():
            ratio, peak, joules = arm["overhead"], arm["peak_allocated_bytes"], arm["joules_per_step"]
            share = arm["mfu"]
            rows.append(
                [
                    shape,
                    key,
                    f"{arm['step_seconds']['median']:.3f}",
                    "1" if ratio is None else f"{ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
                    f"{arm['tokens_per_second']:,.0f}",
                    "–" if share is None else f"{100 * share:.1f} %",
                    "–" if peak is None else f"{peak / 1e9:.2f}",
                    "–" if joules is None else f"{joules:,.0f}",
                ]
            )
            shape = ""
    yield from _table(head, rows, 2)


def _layers(records: list[dict[str, Any]]) -> Iterator[str]:
    layers = [layer for record in records for layer in record["layers"]]
    arms = list(layers[0]["arms"])
    rows = []
    for layer in layers:
        cells = []
        for arm in arms:
            found = layer["arms"][arm]
            ratio = "" if found["overhead"] is None else f" ({found['overhead']['ratio']:.2f} ×)"
            cells.append(f"{1e3 * found['step_seconds']['median']:.2f}{ratio}")
        rows.append([f"{layer['d_out']} x {layer['d_in']}", *cells])
    yield from _table(["layer, ms", *arms], rows)


def _runs(records: list[dict[str, Any]]) -> Iterator[str]:
    head = [
        "arm",
        "held-out loss",
        "held-out accuracy",
        "loss noise",
        "own noise beside the baseline",
        "spikes",
        "diverged",
    ]
    head += ["resolvability, forward / derivative", "what f adds to a layer's output"]
    rows = []
    for record in records:
        for key, arm in record["arms"].items():
            pooled, runs = record["pooled"].get(key, {}), record["runs"].get(key, {})
            presence = [run["presence"] for run in runs.values() if run.get("presence")]
            spikes = dig(pooled, "spike_rate", "spikes")
            rows.append(
                [
                    arm["label"],
                    _mean(pooled, "heldout_loss"),
                    _mean(pooled, "heldout_accuracy", lambda x: f"{100 * x:.1f} %"),
                    _mean(pooled, "residual_std"),
                    _mean(pooled, "paired_residual_std", lambda x: f"{x:.2g}"),
                    "–" if spikes is None else str(spikes),
                    f"{dig(pooled, 'diverged', 'count')} of {dig(pooled, 'diverged', 'n')}",
                    *_presence_cells(presence),
                ]
            )
    yield from _table(head, rows)


def _spectra(records: list[dict[str, Any]]) -> Iterator[str]:
    head = ["arm", "sharpness", "stable rank", "effective rank, BA → update", "energy beyond rank r"]
    head += ["overlap with W0's first / last directions (chance)"]
    rows = []
    for record in records:
        for key, arm in record["arms"].items():
            kinds = [
                kind
                for run in record["runs"].get(key, {}).values()
                for kind in (dig(run, "spectra", "types") or {}).values()
            ]

            def mean(*path: str, kinds: list[dict[str, Any]] = kinds) -> float | None:
                values = [value for kind in kinds if (value := dig(kind, *path)) is not None]
                return sum(values) / len(values) if values else None

            ranks = mean("BA", "effective_rank"), mean("update", "effective_rank")
            overlaps = [mean("update", f"overlap_{end}_right") for end in ("top", "tail")]
            rows.append(
                [
                    arm["label"],
                    _mean(record["pooled"].get(key, {}), "sharpness", lambda x: f"{x:.3g}"),
                    _number(mean("update", "stable_rank"), ".3g"),
                    f"{_number(ranks[0], '.1f')} → {_number(ranks[1], '.1f')}",
                    _number(mean("update", "energy_beyond_rank"), ".1g"),
                    f"{_number(overlaps[0], '.2f')} / {_number(overlaps[1], '.2f')} "
                    f"({_number(mean('update', 'chance_right'), '.2f')})",
                ]
            )
    yield from _table(head, rows)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _mean(pooled: dict[str, Any], name: str, form: Callable[[float], str] = lambda x: f"{x:.4f}") -> str:
    """Mean over seeds, with its 95 % interval where there is one."""
    found = pooled.get(name) or {}
    if found.get("mean") is None:
        return "–"
    interval = "" if found["low"] is None else f" [{form(found['low'])}, {form(found['high'])}]"
    return form(found["mean"]) + interval


def _presence_cells(presence: list[dict[str, Any]]) -> list[str]:
    def mean(*path: str) -> float | None:
        values = [value for record in presence if (value := dig(record, *path)) is not None]
        return sum(values) / len(values) if values else None

    forward, derivative, ratio = mean("forward"), mean("derivative"), mean("output_ratio", "exact")
    nonlinear = mean("nonlinear_share")
    shares = "–" if forward is None else f"{percent(forward)} / {percent(derivative)}"
    if ratio is not None:
        return [shares, f"{ratio:.2g}"]
    return [shares, "–" if nonlinear is None else f"{nonlinear:.2g}"]


def _verdict(records: list[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        for part, sentences in record["verdict"].items():
            yield from (f"* **{part.capitalize()}**: {sentence}" for sentence in sentences)


KINDS: dict[str, Callable[[list[dict[str, Any]]], Iterator[str]]] = {
    "cost": _cost,
    "layers": _layers,
    "runs": _runs,
    "verdict": _verdict,
    "spectra": _spectra,
    "presence": lambda records: (f"* {s}" for record in records for s in record["verdict"]["presence"]),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="curvelora_eval.lab.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", nargs=2, type=Path, metavar=("FOLDER", "TARGET"), help="keep a folder's small files")
    parser.add_argument("documents", nargs="*", type=Path, help="documents to write again")
    args = parser.parse_args(argv)

    def work() -> int:
        if args.keep:
            keep(*args.keep)
        for document in args.documents:
            write_text(document, rendered(document.read_text(encoding="utf-8"), RESULTS))
        return 0

    return run_guarded(work)


if __name__ == "__main__":
    sys.exit(main())
