"""The page's tables. A cell is (text, link to the file that has its number, or None)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from curvelora_eval.lab.canvas import short
from curvelora_eval.lab.folder import Arm, Lab, dig, run_diverged
from curvelora_eval.report.load import number
from curvelora_eval.wording import percent

Cell = tuple[str, str | None]


@dataclass
class Table:
    """`rows` are (arm or None, name, cells); the names stand in the first column, under `headings[0]`."""

    title: str
    headings: list[str]
    rows: list[tuple[Arm | None, str, list[Cell]]]
    note: str = ""

    @property
    def folded(self) -> bool:
        """Whether it is too long to be met by whoever scrolls past."""
        return len(self.rows) > 12


def cost_table(lab: Lab, arms: Sequence[Arm], href: str | None) -> Table:
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("step, s [95 %]", lambda r: _interval(r.get("step_seconds"), "median")),
        ("× baseline [95 %]", lambda r: _interval(r.get("overhead"), "ratio")),
        ("tokens/s", lambda r: _count(r.get("tokens_per_second"))),
        ("per device", lambda r: _count(r.get("tokens_per_second_per_device"))),
        ("MFU", lambda r: _percent(r.get("mfu"))),
        ("of a GEMM", lambda r: _percent(r.get("mfu_of_gemm"))),
        ("peak, GB", lambda r: _scaled(r.get("peak_allocated_bytes"), 1e-9)),
        ("reserved, GB", lambda r: _scaled(r.get("peak_reserved_bytes"), 1e-9)),
        ("J / step", lambda r: _scaled(r.get("joules_per_step"), 1.0)),
        ("std(BA)", lambda r: _scaled(r.get("std_BA"), 1.0)),
    ]
    return _filled("Cost per arm", columns, [(arm, arm.label, lab.cost["arms"][arm.key], href) for arm in arms])


def seeds_table(lab: Lab) -> list[Table]:
    """One row a run: how it ended, its losses and its noise; runs without a result say why."""
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("status", lambda r: "diverged" if run_diverged(r) else str(r.get("status") or "–")),
        ("steps", lambda r: _count(r.get("steps"))),
        ("held-out loss", lambda r: _plain(dig(r, "heldout", "loss"), 5)),
        ("accuracy", lambda r: _percent(dig(r, "heldout", "accuracy"))),
        ("noise", lambda r: _plain(dig(r, "stability", "residual_std"))),
        ("paired noise", lambda r: _plain(dig(r, "stability", "paired_residual_std"))),
        ("spikes", lambda r: _count(dig(r, "stability", "spikes"))),
        ("deepest", lambda r: _plain(dig(r, "stability", "spike_depth"))),
        ("clipped", lambda r: _percent(dig(r, "stability", "clipped_share"))),
        ("gradient norm", lambda r: _plain(dig(r, "stability", "grad_norm", "median"))),
        ("largest", lambda r: _plain(dig(r, "stability", "grad_norm", "max"))),
        ("sharpness", lambda r: _plain(dig(r, "sharpness", "value"))),
        ("seconds", lambda r: _count(r.get("seconds"))),
    ]
    rows = [
        (arm, f"{arm.label}, seed {seed}", run, run_link(lab, run))
        for arm in lab.arms
        for seed, run in lab.runs(arm).items()
    ]
    known = {arm.key: arm for arm in lab.arms}
    for key, seeds in lab.failed.items():
        arm = known.get(key)
        name = arm.label if arm else key
        rows += [
            (arm, f"{name}, seed {seed}", {"status": f"failed: {why}"}, run_link(lab, None))
            for seed, why in seeds.items()
        ]
    return [_filled("Every run", columns, rows)] if rows else []


def presence_table(lab: Lab) -> list[Table]:
    """Per run, and per arm and module type in the first seed that has them."""
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("forward", lambda r: _percent(r.get("forward"))),
        ("derivative", lambda r: _percent(r.get("derivative"))),
        ("std(BA)", lambda r: _plain(r.get("std_u"))),
        ("|ω BA|, 5 / 50 / 95 %", lambda r: _listed(r.get("phase"), ("p05", "p50", "p95"))),
        ("f′ − 1, rms", lambda r: _plain(r.get("slope_rms"), 2)),
        (
            "f′ correlation, naive bf16 / rounded / fp32",
            lambda r: _listed(r.get("slope_correlation"), ("naive_bf16", "rounded_bf16", "fp32")),
        ),
        ("f adds, exact", lambda r: _plain(dig(r, "output_ratio", "exact"))),
        ("as rounded", lambda r: _plain(dig(r, "output_ratio", "rounded"))),
        ("nonlinear share", lambda r: _percent(r.get("nonlinear_share"))),
    ]
    runs, kinds = [], []
    for arm in lab.arms:
        measured = {seed: run for seed, run in lab.runs(arm).items() if run.get("presence")}
        for seed, run in measured.items():
            runs.append((arm, f"{arm.label}, seed {seed}", run["presence"], run_link(lab, run, "presence.jsonl")))
        for run in list(measured.values())[:1]:
            href = run_link(lab, run, "presence.jsonl")
            for kind, record in (run["presence"].get("types") or {}).items():
                kinds.append((arm, f"{arm.label}, {kind}", record, href))
    titles = (("Presence after the last step", runs), ("Presence per module type, first seed", kinds))
    return [_filled(title, columns, rows) for title, rows in titles if rows]


def spectra_table(lab: Lab) -> list[Table]:
    """Per module type and arm, of the first seed that has spectra; overlaps beside what chance gives."""
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("stable rank", lambda r: _plain(r.get("stable_rank"))),
        ("effective rank", lambda r: _plain(r.get("effective_rank"))),
        ("σ r+1 / σ 1", lambda r: _plain(r.get("next_after_rank"))),
        ("energy beyond r", lambda r: _plain(r.get("energy_beyond_rank"))),
        ("overlap top, out / in", lambda r: _pair(r, "overlap_top_left", "overlap_top_right")),
        ("tail, out / in", lambda r: _pair(r, "overlap_tail_left", "overlap_tail_right")),
        ("chance, out / in", lambda r: _pair(r, "chance_left", "chance_right")),
        ("‖update‖", lambda r: _plain(r.get("frobenius"))),
    ]
    rows = []
    for arm in lab.arms:
        run = next((run for run in lab.runs(arm).values() if dig(run, "spectra", "types")), None)
        for kind, record in (dig(run, "spectra", "types") or {}).items():
            update = record.get("update") if isinstance(record.get("update"), dict) else record
            rows.append((arm, f"{arm.label}, {kind}", update, run_link(lab, run)))
    note = "Overlap: share of the update's leading directions that lie among the base weight's first (top) or last (tail) ones."
    return [_filled("Spectra per module type, first seed", columns, rows, note)] if rows else []


def approximation_table(lab: Lab) -> list[Table]:
    """Relative errors of each form on the update of full fine-tuning, beside the best linear map's."""
    found = lab.results.get("approximation")
    records = {"": found} if dig(found, "best_linear") else dig(found, "layers") or found or {}
    rows = []
    for layer, record in records.items() if isinstance(records, dict) else ():
        if not dig(record, "best_linear"):
            continue
        for kind, errors in record.items():
            if isinstance(errors, dict) and number(errors.get("fit")) is not None:
                name = f"{kind.replace('_', ' ')}{f', {layer}' if layer else ''}"
                rows.append((None, name, errors, "results.json"))
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("error on fitted inputs", lambda r: _plain(r.get("fit"))),
        ("on held-out inputs", lambda r: _plain(r.get("held"))),
        ("floor of rank r, held-out", lambda r: _plain(r.get("floor_held"))),
        ("before fitting", lambda r: _plain(r.get("start"))),
    ]
    note = (
        "‖D x − g(x)‖ / ‖D x‖ for the update D of full fine-tuning. No map through r numbers gets below the best linear one "
        "on the inputs it is fitted to."
    )
    return [_filled("Approximation of a full update", columns, rows, note)] if rows else []


def run_link(lab: Lab, run: dict | None, name: str = "run.json") -> str | None:
    """The file of this name in the run's folder, else steps.jsonl, else results.json: what is there."""
    folder = (run or {}).get("folder")
    candidates = [f"{folder}/{name}", f"{folder}/steps.jsonl", "results.json"] if folder else ["results.json"]
    return next((quote(path) for path in candidates if (lab.folder / path).is_file()), None)


def _filled(title: str, columns: Sequence, rows: Sequence, note: str = "") -> Table:
    """A table without the columns in which no row has anything."""
    texts = [[get(record) for _, get in columns] for *_, record, _ in rows]
    kept = [i for i in range(len(columns)) if any(line[i] != "–" for line in texts)]
    return Table(
        title,
        ["", *(columns[i][0] for i in kept)],
        [
            (arm, name, [(line[i], href if line[i] != "–" else None) for i in kept])
            for (arm, name, _, href), line in zip(rows, texts, strict=True)
        ],
        note,
    )


def _plain(value: object, digits: int = 3) -> str:
    return short(number(value), digits)


def _count(value: object) -> str:
    found = number(value)
    return "–" if found is None else f"{found:,.0f}"


def _percent(value: object) -> str:
    found = number(value)
    return "–" if found is None else percent(found)


def _scaled(value: object, factor: float) -> str:
    found = number(value)
    return "–" if found is None else short(found * factor)


def _interval(record: object, key: str) -> str:
    middle, low, high = (number(dig(record, name)) for name in (key, "low", "high"))
    if middle is None:
        return "–"
    return f"{short(middle)} [{short(low)}, {short(high)}]" if None not in (low, high) else short(middle)


def _pair(record: dict, one: str, other: str) -> str:
    return "–" if number(record.get(one)) is None else f"{_plain(record.get(one), 2)} / {_plain(record.get(other), 2)}"


def _listed(value: object, keys: Sequence[str]) -> str:
    """`6.0 / 66 / 190` of some numbers of a dictionary."""
    found = [number(dig(value, key)) for key in keys]
    return " / ".join(short(item, 2) for item in found) if any(item is not None for item in found) else "–"
