"""The lab report: one HTML page that needs no network and no script, written beside the JSON that it is drawn from.

    first screen    verdict in sentences, and five plots: overhead, loss, noise and spikes, resolvability, map of a sweep
    details         tables and small charts of cost, stability, presence, spectra and paths, settings and environment

Everything on it is read from the folder; numbers link to the file that they come from. Measured parts that are missing are
left out or named as missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from curvelora_eval.lab.canvas import arm_class, setting_text, short
from curvelora_eval.lab.details import sections
from curvelora_eval.lab.folder import Lab, read_lab, read_record
from curvelora_eval.lab.panels import first_screen, map_panel, relative, source
from curvelora_eval.lab.tables import Table
from curvelora_eval.lab.verdict import verdict
from curvelora_eval.report.load import number

BASES = {"nf4": "NF4 base", "bf16": "bf16 base", "fp32": "fp32 base"}


def write_lab_report(folder: Path, sweep: Path | None = None) -> Path:
    """Write report.html into a folder that `curvelora bench compare` has filled, and return its path.

    Args:
        folder: holds results.json, and the runs' steps.jsonl and presence.jsonl.
        sweep: a folder with sweep.json; without it the one that results.json names, if it is there.

    Raises:
        UserError: results.json or sweep.json is missing, damaged or of another schema, or the page cannot be written.
    """
    lab = read_lab(Path(folder), None if sweep is None else Path(sweep))
    said = verdict(lab.results, lab.sweep)
    files = {
        "cost": _files(lab, str(lab.cost.get("file") or "cost.json"), "results.json")[:1],
        "stability": _files(lab, "results.json"),
        "presence": _files(lab, "results.json"),
    }
    if lab.sweep_folder is not None:
        link = ("sweep.json", relative(lab.sweep_folder / "sweep.json", lab.folder))
        files["stability"].append(link)
        files["presence"].append(link)
    groups = [(name.capitalize(), *lead(said[name] or [MISSING[name]]), files[name]) for name in files]
    return _write(
        lab,
        title=str(lab.results.get("title") or "Nonlinear adapters beside their baseline"),
        facts=facts(lab),
        groups=groups,
        limits=said["limits"],
        panels=first_screen(lab),
        sections=sections(lab),
        settings=[
            ("Settings", _pairs(_without(lab.settings, "arms"))),
            ("Environment", _pairs(lab.environment)),
        ],
        arms=[(arm, _pairs(arm.record)) for arm in lab.arms],
    )


LEAD_LENGTH, LEAD_SENTENCES = 620, 4  # of a group on the first screen
MISSING = {
    "cost": "Cost was not measured in this run.",
    "stability": "No arm was trained in this run.",
    "presence": "No arm of this run has a nonlinearity whose presence was measured.",
}


def write_sweep_report(folder: Path) -> Path:
    """Write report.html into a folder that `curvelora sweep` has filled, and return its path.

    Raises:
        UserError: sweep.json is missing, damaged or of another schema, or the page cannot be written.
    """
    folder = Path(folder)
    sweep = read_record(folder, "sweep.json", "sweep")
    lab = Lab(folder, {"settings": sweep.get("settings"), "environment": sweep.get("environment")}, sweep, folder)
    said = verdict(lab.results, sweep)
    link = [("sweep.json", "sweep.json")]
    groups = [(name.capitalize(), said[name], [], link) for name in ("stability", "presence") if said[name]]
    settings = sweep.get("settings") or {}
    return _write(
        lab,
        title=str(settings.get("title") or "A sweep of " + " and ".join(sweep.get("axes") or ["settings"])),
        facts=facts(lab),
        groups=groups,
        limits=[],
        panels=[map_panel(lab)],
        sections=[{"heading": "Every cell", "tables": [_cells(lab)]}],
        settings=[("Settings", _pairs(settings)), ("Environment", _pairs(sweep.get("environment") or {}))],
        arms=[],
    )


def _write(lab: Lab, **content: Any) -> Path:
    import jinja2

    from curvelora_eval.files import write_text  # here, since importing curvelora loads torch and costs seconds

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("curvelora_eval", "lab"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = _code
    page = environment.get_template("page.html.j2").render(arm_class=arm_class, baseline=lab.baseline, **content)
    return write_text(lab.folder / "report.html", page)


def lead(sentences: list[str]) -> tuple[list[str], list[str]]:
    """The sentences that stand on the first screen, and those that are folded: it has room for plots only if few stand."""
    count = 2
    while count < min(len(sentences), LEAD_SENTENCES) and sum(map(len, sentences[: count + 1])) <= LEAD_LENGTH:
        count += 1
    # a fold for a single short sentence is more to look at than the sentence
    return (
        (sentences, [])
        if len(sentences) - count == 1 and len(sentences[-1]) < 80
        else (sentences[:count], sentences[count:])
    )


def facts(lab: Lab) -> list[str]:
    """The line under the title: model, base, hardware, seeds and steps, as far as they are known."""
    settings = lab.settings
    hardware = lab.environment.get("hardware") or {}
    device = hardware.get("gpu") or hardware.get("cpu")
    count = hardware.get("gpus") or 0
    weights = " with random weights" if settings.get("weights") == "random" else ""
    seeds, steps = settings.get("seeds") or [], settings.get("steps")
    rank = settings.get("rank")
    return [
        fact
        for fact in (
            f"{Path(str(settings['model'])).name}{weights}" if settings.get("model") else "",
            BASES.get(str(settings.get("base")), ""),
            f"{count} × {device}" if count > 1 else str(device or ""),
            f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}" if seeds else "",
            f"{steps:,} steps" if isinstance(steps, int) else "",
            f"rank {rank}" if rank else "",
        )
        if fact
    ]


def _code(text: str) -> Markup:
    """Set what stands between backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _files(lab: Lab, *names: str) -> list[tuple[str, str]]:
    return [(name, href) for name in dict.fromkeys(names) if (href := source(lab, name))]


CELL_COLUMNS = (
    ("held-out loss", "heldout_loss"),
    ("accuracy", "heldout_accuracy"),
    ("noise", "residual_std"),
    ("paired noise", "paired_residual_std"),
    ("spikes", "spikes"),
    ("forward resolvability", "resolvability_forward"),
    ("in the derivative", "resolvability_derivative"),
    ("f adds", "output_ratio"),
    ("std(BA)", "std_u"),
)


def _cells(lab: Lab) -> Table:
    """Every cell of the sweep, in the order of the file."""
    names = list(lab.sweep.get("axes") or {})
    cells = lab.sweep.get("cells", [])
    columns = [
        (heading, key) for heading, key in CELL_COLUMNS if any(number(cell.get(key)) is not None for cell in cells)
    ]
    rows = []
    for cell in cells:
        values = cell.get("values") or {}
        where = ", ".join(f"{name} {setting_text(values.get(name))}" for name in names)
        folder = lab.folder / str(cell.get("folder"))
        href = relative(folder, lab.folder) + "/" if cell.get("folder") and folder.is_dir() else "sweep.json"
        texts = [str(cell.get("seed", "–")), str(cell.get("status", "–"))]
        texts += [short(number(cell.get(key)), 4) for _, key in columns]
        rows.append((None, where, [(text, href if text != "–" else None) for text in texts]))
    return Table("Every cell", ["", "seed", "status", *(heading for heading, _ in columns)], rows)


def _without(mapping: dict, *names: str) -> dict:
    return {key: value for key, value in mapping.items() if key not in names}


def _pairs(mapping: dict) -> list[tuple[str, str]]:
    return [(str(key).replace("_", " "), _as_text(value)) for key, value in mapping.items()]


def _as_text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_as_text(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return ", ".join(_as_text(item) for item in value) or "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
