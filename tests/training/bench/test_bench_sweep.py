"""Sweeps: the grid is the product of its axes, every cell is a run, and an interrupted sweep continues."""

from __future__ import annotations

import argparse
import json
import shutil

import pytest

from curvelora.errors import UserError
from curvelora_training.bench import sweep_command
from curvelora_training.bench.pool import jobs_of
from curvelora_training.bench.settings import LabSettings
from curvelora_training.bench.sweep import REFERENCES, gather_sweep, sweep_arms

CELLS = [(1e-3, 10), (1e-3, 1000), (0.1, 10), (0.1, 1000)]


def axes(*argv):
    parser = argparse.ArgumentParser()
    sweep_command.add_arguments(parser)
    return sweep_command.axes_from(parser.parse_args(["--out", "x", *argv]))


def test_ready_made_grids():
    assert axes("--grid", "paper") == {"amplitude": [1e-5, 5e-5, 1e-4], "frequency": [5e3, 1e4, 5e4]}
    wide = axes("--grid", "wide")
    assert [len(values) for values in wide.values()] == [6, 6]
    for name, values in axes("--grid", "paper").items():
        assert set(values) <= set(wide[name])


def test_axes_of_ones_own():
    found = axes(
        "--amplitude", "1e-5, 1e-3,1e-5", "--ranks", "8,64", "--learning-rates", "1e-4", "--activation", "tanh, cos"
    )
    assert found == {"amplitude": [1e-5, 1e-3], "rank": [8, 64], "learning_rate": [1e-4], "activation": ["tanh", "cos"]}
    assert isinstance(found["rank"][0], int)
    assert axes("--grid", "paper", "--amplitude", "3")["amplitude"] == [3.0]  # replaces the grid's


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "a sweep needs values"),
        (["--amplitude", ","], "a sweep needs values"),
        (["--amplitude", "1e-5,x"], "--amplitude '1e-5,x' is no list of numbers"),
        (["--ranks", "8,1.5"], "--ranks '8,1.5' is no list of numbers: write for example 8,64"),
        (["--learning-rates", "1e-4,0"], "--learning-rates must be positive"),
        (["--learning-rates", "nan"], "--learning-rates must be positive"),
    ],
)
def test_values_that_are_refused(argv, said):
    with pytest.raises(UserError) as caught:
        axes(*argv)
    assert said in str(caught.value)


def test_the_arms_are_the_references_and_the_product_of_the_axes():
    arms = sweep_arms("loran:tanh", {"amplitude": [1e-5, 0.1], "rank": [2, 8], "learning_rate": [1e-3]})
    # a baseline of the same rank and rate for every cell
    assert [(a.key.split(",")[0], a.options["r"], a.learning_rate) for a in arms[:4]] == [
        (name, r, 1e-3) for r in (2, 8) for name in REFERENCES
    ]
    assert [(a.options, a.learning_rate) for a in arms[4:]] == [
        ({"activation": "tanh", "amplitude": a, "r": r}, 1e-3) for a in (1e-5, 0.1) for r in (2, 8)
    ]
    assert (
        len({arm.slug for arm in arms}) == 8 and arms[4].key == "loran:tanh,amplitude=1e-05,rank=2,learning_rate=0.001"
    )
    full = sweep_arms("full", {"learning_rate": [1e-3, 1e-4]})
    assert [(a.method, a.options, a.learning_rate) for a in full[4:]] == [("full", {}, 1e-3), ("full", {}, 1e-4)]
    plain = sweep_arms("loran", {"amplitude": [1e-5]})
    assert [arm.key for arm in plain[:2]] == list(REFERENCES) and len(plain) == 3


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("loran", {"amplitude": [-1.0, 1.0]}, ["amplitude must be"]),
        ("loran", {"rank": [0, 4, -3]}, ["not 0", "not -3"]),
        ("loran", {"amplitude": [float("nan")]}, ["amplitude"]),
        ("loran", {"activation": ["tahn", "coz"]}, ["'tahn'", "'coz'"]),
        ("qlora", {"amplitude": [1.0]}, ["'amplitude'"]),
        ("full", {"rank": [4]}, ["full fine-tuning has no r to vary"]),
        ("loarn", {"rank": [4]}, ["did you mean 'loran'"]),
    ],
)
def test_arms_that_are_refused(method, values, said):
    with pytest.raises(UserError) as caught:
        sweep_arms(method, values)
    for part in said:
        assert str(caught.value).count(part) >= 1


def test_the_record_of_a_sweep(swept):
    record = json.loads((swept / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert (record["schema"], record["kind"]) == (1, "sweep")
    assert record["axes"] == {"amplitude": [1e-3, 0.1], "frequency": [10, 1000]} and "arms" not in record["settings"]
    found = [((c["values"]["amplitude"], c["values"]["frequency"]), c["seed"]) for c in record["cells"]]
    assert sorted(found) == sorted((cell, seed) for cell in CELLS for seed in (1, 2))
    assert set(record["references"]) == set(REFERENCES)
    for cell in (*record["cells"], *(c for runs in record["references"].values() for c in runs)):
        run = json.loads((swept / cell["folder"] / "run.json").read_text())
        lines = (swept / cell["folder"] / "steps.jsonl").read_text().splitlines()
        assert len(lines) == 3 and cell["last_loss"] == pytest.approx(json.loads(lines[-1])["loss"], rel=0.2)
        assert (cell["status"], cell["diverged"]) == ("completed", False) == (run["status"], False)
        assert cell["heldout_loss"] == run["heldout"]["loss"] > 0 and cell["seed"] == run["seed"]
        if cell in record["cells"]:
            assert {key: run["arm"]["options"][key] for key in cell["values"]} == cell["values"]
            assert 0 <= cell["resolvability_forward"] <= 1 and cell["std_u"] > 0
    losses = [c["heldout_loss"] for c in record["references"]["qlora"]]
    assert record["baseline"]["heldout_loss"] == pytest.approx(sum(losses) / 2) and len(set(losses)) == 2
    # a larger amplitude is resolved at least as well
    best = {
        c["values"]["amplitude"]: c["resolvability_forward"]
        for c in record["cells"]
        if c["values"]["frequency"] == 1000
    }
    assert best[0.1] >= best[1e-3]
    assert "svg" in (swept / "report.html").read_text()


def test_an_interrupted_sweep_continues(swept, sweep_options, cli, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(swept, out)
    before = json.loads((out / "sweep.json").read_text())
    lost = out / before["cells"][3]["folder"]
    (lost / "run.json").unlink()
    cell = gather_sweep(LabSettings.read(out / "lab.json"), before["axes"], out)["cells"][3]
    assert cell["status"] == "missing" and cell.keys() == before["cells"][3].keys()
    assert cell["heldout_loss"] is cell["resolvability_forward"] is cell["spikes"] is None
    times = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    code, _, err = cli("sweep", *sweep_options, "--out", out)
    assert code == 2 and "--resume" in err and "--overwrite" in err
    code, printed, _ = cli("sweep", *sweep_options, "--out", out, "--resume")
    assert code == 0 and "11 of 12 runs are there already" in printed
    assert {path: path.stat().st_mtime_ns for path in times} == times and (lost / "run.json").is_file()
    after = json.loads((out / "sweep.json").read_text())
    assert [c["heldout_loss"] for c in after["cells"]] == [c["heldout_loss"] for c in before["cells"]]


def test_shares_make_their_own_runs_and_the_last_one_reports(swept, sweep_options, cli, tmp_path):
    out = tmp_path / "shared"
    shutil.copytree(swept, out)
    before = json.loads((out / "sweep.json").read_text())
    lost = [out / job.folder for job in jobs_of(LabSettings.read(out / "lab.json"))[2:4]]  # one of each share
    for path in (out / "sweep.json", out / "report.html", *(folder / "run.json" for folder in lost)):
        path.unlink()
    claim = out / f"{lost[1].relative_to(out)}.claimed"
    claim.write_text("the other share makes this one now")
    code, printed, _ = cli("sweep", *sweep_options, "--out", out, "--resume", "--share", "0/2")
    assert code == 0 and "share 0 of 2 is through; 1 of 12 runs are not made yet" in printed
    assert [(folder / "run.json").is_file() for folder in lost] == [True, False] and claim.is_file()
    assert not (out / "sweep.json").exists()
    code, printed, _ = cli("sweep", *sweep_options, "--out", out, "--resume", "--share", "1/2")
    assert code == 0 and "report:" in printed and (out / "report.html").is_file()
    after = json.loads((out / "sweep.json").read_text())
    assert [c["heldout_loss"] for c in after["cells"]] == [c["heldout_loss"] for c in before["cells"]]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--amplitude", "1", "--share", "2/2", "--resume"], "--share '2/2' is no share: write 0/8"),
        (["--amplitude", "1", "--share", "1/2"], "--share goes with --resume"),
        (["--model", "llama-1b", "--amplitude", "1"], "a built-in shape has random weights"),
        (["--jobs", "0", "--amplitude", "1"], "--jobs must be at least 1"),
        (["--method", "loran:sintr", "--amplitude", "1"], "did you mean 'sinter'"),
        (["--ranks", "40"], "rank 40 is above 32"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(cli, tiny_models, tmp_path, argv, said):
    code, _, err = cli("sweep", "--model", tiny_models["llama"], "--rank", "4", "--out", tmp_path / "x", *argv)
    assert code == 2 and said in err and not (tmp_path / "x").exists()
