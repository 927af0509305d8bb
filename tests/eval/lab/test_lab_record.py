"""What documents quote of the lab comes from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab_files import write_lab

from curvelora.errors import UserError
from curvelora_eval.lab.record import keep, main, rendered

COST = {
    "settings": {"model": "llama2-7b"},
    "tokens_per_step": 8192,
    "arms": {
        "qlora": {
            "step_seconds": {"median": 1.127},
            "overhead": None,
            "tokens_per_second": 7267.4,
            "mfu": 0.2134,
            "peak_allocated_bytes": 11_630_000_000,
            "joules_per_step": 785.4,
        },
        "loran:sinter": {
            "step_seconds": {"median": 2.264},
            "overhead": {"ratio": 2.0101, "low": 1.996, "high": 2.106},
            "tokens_per_second": 3618.0,
            "mfu": None,
            "peak_allocated_bytes": None,
            "joules_per_step": None,
        },
    },
}
LAYERS = {
    "layers": [
        {
            "d_out": 11008,
            "d_in": 4096,
            "arms": {
                "qlora": {"step_seconds": {"median": 3.55e-3}, "overhead": None},
                "loran:sinter": {"step_seconds": {"median": 10.28e-3}, "overhead": {"ratio": 2.903}},
            },
        }
    ]
}


def block(kind: str, *names: str) -> str:
    return f"before\n<!-- lab: {kind} {' '.join(names)} -->\nold\n<!-- end of lab -->\nafter\n"


def test_a_cost_table(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    text = rendered(block("cost", "cost.json"), tmp_path)
    assert text.splitlines() == [
        "before",
        "<!-- lab: cost cost.json -->",
        "| model | arm | step, s | × baseline [95 %] | tokens/s | MFU | peak GB | J a step |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| llama2-7b, 8,192 tokens | qlora | 1.127 | 1 | 7,267 | 21.3 % | 11.63 | 785 |",
        "|  | loran:sinter | 2.264 | 2.010 [1.996, 2.106] | 3,618 | – | – | – |",
        "<!-- end of lab -->",
        "after",
    ]
    assert rendered(text, tmp_path) == text


def test_a_table_of_layers(tmp_path: Path) -> None:
    (tmp_path / "layer.json").write_text(json.dumps(LAYERS))
    text = rendered(block("layers", "layer.json"), tmp_path)
    assert "| layer, ms | qlora | loran:sinter |" in text and "| 11008 x 4096 | 3.55 | 10.28 (2.90 ×) |" in text


def test_runs_and_verdict_of_a_lab(tmp_path: Path) -> None:
    write_lab(tmp_path / "lab")
    results = json.loads((tmp_path / "lab/results.json").read_text())
    results["verdict"] = {"cost": ["It costs."], "stability": [], "presence": ["It is there."], "limits": []}
    (tmp_path / "lab/results.json").write_text(json.dumps(results))
    lines = rendered(block("runs", "lab/results.json"), tmp_path).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[4:-2]] == [
        arm["label"] for arm in results["arms"].values()
    ]
    assert rendered(block("verdict", "lab/results.json"), tmp_path).splitlines()[2:4] == [
        "* **Cost**: It costs.",
        "* **Presence**: It is there.",
    ]


def test_what_is_kept_is_small_and_has_no_dead_links(tmp_path: Path) -> None:
    write_lab(tmp_path / "lab")
    (tmp_path / "lab/report.html").write_text(
        '<a href="runs/qlora/seed-1/steps.jsonl">steps</a> <a href="#top">top</a>'
    )
    keep(tmp_path / "lab", tmp_path / "kept")
    kept = {p.name for p in (tmp_path / "kept").iterdir()}
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("lab", "kept")]
    assert results[0] == results[1] and (tmp_path / "kept/results.json").read_text().count("\n") == 1
    assert {"report.html", "results.json"} <= kept and "runs" not in kept
    assert (tmp_path / "kept/report.html").read_text() == '<a href="results.json">steps</a> <a href="#top">top</a>'


@pytest.mark.parametrize(
    ("text", "message"),
    [(block("price", "cost.json"), "no block of kind 'price'"), (block("cost", "missing.json"), "missing.json")],
)
def test_a_block_that_cannot_be_written_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rendered(text, tmp_path)


def test_a_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--keep", str(tmp_path), str(tmp_path / "kept")]) == 2
    assert "holds no results.json or sweep.json" in capsys.readouterr().err


def test_a_table_of_spectra_is_a_mean_over_seeds_and_types(tmp_path: Path) -> None:
    def run(rank: float) -> dict:
        update = {"stable_rank": rank, "effective_rank": 2 * rank, "energy_beyond_rank": 0.25, "chance_right": 0.125}
        update |= {"overlap_top_right": 0.5, "overlap_tail_right": 0.75}
        return {"spectra": {"types": {"query": {"update": update, "BA": {"effective_rank": 3.0}}}}}

    record = {
        "arms": {"loran": {"label": "LoRAN"}, "qlora": {"label": "QLoRA"}},
        "pooled": {"loran": {"sharpness": {"mean": 2.0, "low": None, "high": None}}},
        "runs": {"loran": {"1": run(1.0), "2": run(2.0)}},
    }
    (tmp_path / "results.json").write_text(json.dumps(record))
    lines = rendered(block("spectra", "results.json"), tmp_path).splitlines()
    assert lines[4] == "| LoRAN | 2 | 1.5 | 3.0 → 3.0 | 0.2 | 0.50 / 0.75 (0.12) |"
    assert lines[5] == "| QLoRA | – | – | – → – | – | – / – (–) |"
