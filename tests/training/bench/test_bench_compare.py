"""A whole comparison: what its folder holds, and what is kept, refused or made again when it is started once more."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from curvelora_training.bench.adapted import shared_copy
from curvelora_training.bench.ground import build_ground
from curvelora_training.bench.settings import LabSettings

ARMS = "qlora,loran:sinter@fp32,full"
SEEDS = ("1", "2")


@pytest.fixture(scope="module")
def options(tiny_models) -> list[str]:
    """A causal language model on the packaged text, three arms, two seeds, four steps."""
    sizes = ["--base", "nf4", "--rank", "4", "--length", "32", "--batch-size", "2", "--targets", "q_proj,down_proj"]
    training = ["--steps", "4", "--seeds", "1-2", "--learning-rate", "1e-2", "--rounds", "2", "--timed", "1"]
    return ["--model", str(tiny_models["llama"]), *sizes, *training, "--arms", ARMS]


@pytest.fixture(scope="module")
def made(tmp_path_factory, options) -> Path:
    """The folder of that comparison; copy it before anything is changed."""
    from curvelora.cli import main

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("compare") / "lab"
    assert main(["bench", "compare", *options, "--out", str(out)]) == 0
    return out


@pytest.fixture
def lab(made, tmp_path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "lab"))


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def steps(folder):
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "steps.jsonl").read_text().splitlines()]


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_record(made):
    results = read(made / "results.json")
    assert (results["schema"], results["kind"]) == (1, "lab")
    assert {
        "title",
        "settings",
        "environment",
        "arms",
        "cost",
        "runs",
        "pooled",
        "paths",
        "approximation",
        "sweep",
        "verdict",
    } <= set(results)
    settings = results["settings"]
    assert (settings["weights"], settings["dtype"], settings["baseline"]) == ("pretrained", "bfloat16", "qlora")
    assert (settings["sequence_length"], settings["seeds"], settings["steps"]) == (32, [1, 2], 4)
    assert "Shakespeare" in settings["data"]
    assert list(results["arms"]) == ARMS.split(",")
    assert [arm["dtype"] for arm in results["arms"].values()] == ["bfloat16", "float32", "bfloat16"]
    assert results["arms"]["loran:sinter@fp32"]["options"] == {"activation": "sinter"}
    trained = [arm["trainable_parameters"] for arm in results["arms"].values()]
    assert trained == [2 * 4 * (128 + 192)] * 2 + [2 * (64 * 64 + 64 * 128)]
    assert results["cost"] == read(made / "cost.json") and list(results["cost"]["arms"]) == ARMS.split(",")
    assert set(results["verdict"]) == {"cost", "stability", "presence", "limits"}
    assert results["sweep"] is None and (made / "report.html").stat().st_size > 10_000


def test_every_run(made):
    results = read(made / "results.json")
    for arm, runs in results["runs"].items():
        assert tuple(runs) == SEEDS
        for seed, run in runs.items():
            folder = made / run["folder"]
            assert folder.name == f"seed-{seed}" and (run["status"], run["steps"]) == ("completed", 4)
            lines = steps(folder)
            assert [line["step"] for line in lines] == [1, 2, 3, 4]
            for line in lines:
                assert line["loss"] > 0 and line["grad_norm"] > 0 and line["clipped"] == (line["grad_norm"] > 1)
                assert set(line["grad_norms"]) == set(line["update_ratio"]) == {"q_proj", "down_proj"}
            assert run["heldout"]["loss"] > 0 and run["heldout"]["accuracy"] is None
            assert (run["sharpness"] is None) == (arm == "full") and set(run["spectra"]["types"]) == {
                "q_proj",
                "down_proj",
            }
            assert (run["presence"] is not None) == arm.startswith("loran")
            assert (run["approximation"] is not None) == (arm == "full")
            assert (folder / "adapter").is_dir() == (arm != "full")
        first, second = (steps(made / run["folder"])[0]["loss"] for run in runs.values())
        assert first != second
        pooled = results["pooled"][arm]["heldout_loss"]
        assert (
            pooled["mean"] == pytest.approx(sum(r["heldout"]["loss"] for r in runs.values()) / 2) and pooled["n"] == 2
        )
    assert results["approximation"] == results["runs"]["full"]["1"]["approximation"]
    assert set(results["paths"]["runs"]) == set(ARMS.split(","))
    assert [point[0] for point in results["paths"]["runs"]["qlora"]["1"]] == [0, 4]


def test_all_arms_begin_with_the_same_loss(made):
    for seed in SEEDS:
        qlora, fp32, full = (
            steps(made / "runs" / arm / f"seed-{seed}")[0]["loss"] for arm in ("qlora", "loran_sinter_fp32", "full")
        )
        assert qlora == pytest.approx(full, rel=1e-5) and qlora == pytest.approx(fp32, rel=1e-3)


def test_the_saved_adapter_has_the_held_out_loss_that_is_reported(made):
    settings = LabSettings.read(made / "lab.json")
    ground = build_ground(settings, torch.device("cpu"))
    model = PeftModel.from_pretrained(shared_copy(ground.base), made / "runs" / "qlora" / "seed-2" / "adapter").eval()
    held = ground.source.held_out(settings.held_out_batches)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = [model(**batch).loss.item() for batch in held]
    assert len(losses) == 16
    expected = read(made / "runs" / "qlora" / "seed-2" / "run.json")["heldout"]["loss"]
    assert sum(losses) / 16 == pytest.approx(expected, rel=1e-6)


def test_a_folder_in_use_is_left_alone_unasked(cli, lab, options):
    before = times(lab)
    code, _, err = cli("bench", "compare", *options, "--out", lab)
    assert code == 2 and "--resume" in err and "--overwrite" in err and "holds a comparison" in err
    assert times(lab) == before


def test_resuming_makes_only_what_is_missing_and_makes_it_alike(cli, lab, options):
    lost = lab / "runs" / "loran_sinter_fp32" / "seed-2"
    before, run = steps(lost), read(lost / "run.json")
    (lost / "run.json").unlink()
    kept = {p: t for p, t in times(lab / "runs").items() if not p.is_relative_to(lost) and p.suffix != ".claimed"}
    cost = (lab / "cost.json").stat().st_mtime_ns
    earlier = read(lab / "results.json")
    code, printed, _ = cli("bench", "compare", *options, "--out", lab, "--resume")
    assert code == 0 and "5 of 6 runs are there already" in printed
    assert steps(lost) == before and read(lost / "run.json")["heldout"] == run["heldout"]
    now = times(lab / "runs")
    assert {p: now[p] for p in kept} == kept and (lab / "cost.json").stat().st_mtime_ns == cost
    assert read(lab / "results.json")["pooled"] == earlier["pooled"]


def test_resuming_what_is_complete_makes_nothing(cli, lab, options):
    before = times(lab / "runs" / "qlora" / "seed-1")
    code, printed, _ = cli("bench", "compare", *options, "--out", lab, "--resume")
    assert code == 0 and "6 of 6 runs are there already" in printed
    assert times(lab / "runs" / "qlora" / "seed-1") == before


def test_the_same_model_by_another_path_is_the_same(cli, lab, options):
    model = os.path.relpath(options[options.index("--model") + 1])
    code, printed, _ = cli("bench", "compare", *options, "--model", model, "--out", lab, "--resume")
    assert code == 0 and "6 of 6 runs are there already" in printed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--steps", "5", "--learning-rate", "0.5"], ["steps", "learning_rate"]),
        (["--base", "fp32"], ["base"]),
        (["--arms", "lora,qlora"], ["the baseline"]),
        (["--arms", "qlora", "--arm", "full=lora,r=2"], ["arm full"]),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(cli, lab, options, changes, named):
    before = times(lab)
    code, _, err = cli("bench", "compare", *options, *changes, "--out", lab, "--resume")
    assert code == 2 and f"({', '.join(named)})" in err and "other settings" in err
    assert times(lab) == before


def test_seeds_may_change_when_resuming(cli, lab, options):
    code, printed, _ = cli("bench", "compare", *options, "--seeds", "2", "--out", lab, "--resume")
    assert code == 0 and "3 of 3 runs are there already" in printed
    assert all(list(runs) == ["2"] for runs in read(lab / "results.json")["runs"].values())
    assert (lab / "runs" / "qlora" / "seed-1" / "run.json").is_file()


def test_overwriting_begins_afresh(cli, lab, options):
    changes = ["--steps", "1", "--seeds", "7", "--arms", "qlora", "--no-cost", "--no-sharpness", "--no-spectra"]
    code, _, _ = cli("bench", "compare", *options, *changes, "--out", lab, "--overwrite")
    assert code == 0 and not (lab / "cost.json").exists()
    assert sorted(p.relative_to(lab).as_posix() for p in lab.rglob("run.json")) == ["runs/qlora/seed-7/run.json"]
    results = read(lab / "results.json")
    assert results["cost"] is None and list(results["runs"]) == ["qlora"]
    run = results["runs"]["qlora"]["7"]
    assert run["sharpness"] is run["spectra"] is None and run["steps"] == 1


def test_a_run_that_fails_is_noted_and_the_others_go_on(cli, tiny_run, tmp_path):
    arms = ["--arms", "qlora,lora", "--arm", "bad=loran,target_modules=[nothing]", "--no-cost", "--no-sharpness"]
    options = [*tiny_run, *arms, "--steps", 2, "--seeds", "1-2", "--out", tmp_path / "lab"]
    code, printed, err = cli("bench", "compare", *options)
    assert code == 1 and "2 of 6 runs failed" in printed and "runs/bad/seed-1" in printed and "--resume" in printed
    for seed in SEEDS:
        assert "nothing" in (tmp_path / "lab/runs/bad" / f"seed-{seed}.failed.txt").read_text()
        assert f"run runs/bad/seed-{seed} failed" in err
    results = read(tmp_path / "lab" / "results.json")
    assert set(results["runs"]) == {"qlora", "lora"} and (tmp_path / "lab" / "report.html").is_file()
    # lora and qlora are one method on an fp32 base
    for seed in SEEDS:
        assert results["runs"]["lora"][seed]["heldout"] == results["runs"]["qlora"][seed]["heldout"]
    code, printed, _ = cli("bench", "compare", *options, "--resume")
    assert code == 1 and "4 of 6 runs are there already" in printed


def test_trainable_parameters_are_reported_without_the_cost(cli, tiny_run, tmp_path):
    options = ["--arms", "qlora", "--no-cost", "--no-sharpness", "--no-spectra", "--steps", 1]
    assert cli("bench", "compare", *tiny_run, *options, "--out", tmp_path / "lab")[0] == 0
    assert read(tmp_path / "lab" / "results.json")["arms"]["qlora"]["trainable_parameters"] == 2 * 4 * (128 + 192)


def test_the_cost_alone(cli, tiny_run, tmp_path):
    options = ["--arms", "qlora,lora", "--steps", 0, "--rounds", 1, "--timed", 1]
    code, printed, _ = cli("bench", "compare", *tiny_run, *options, "--out", tmp_path / "lab")
    results = read(tmp_path / "lab" / "results.json")
    assert code == 0 and results["runs"] == {} and results["paths"] is None
    assert list(results["cost"]["arms"]) == ["qlora", "lora"] and "tokens/s" in printed


def test_the_report_is_written_again(cli, lab, swept):
    before = read(lab / "results.json")
    (lab / "report.html").unlink()
    code, printed, _ = cli("bench", "report", lab)
    assert code == 0 and str(lab / "report.html") in printed and (lab / "report.html").is_file()
    after = read(lab / "results.json")
    for part in ("runs", "pooled", "paths", "cost", "arms", "settings", "sweep"):
        assert after[part] == before[part], part
    # a sweep's map, once given, stays
    assert cli("bench", "report", lab, "--sweep", swept)[0] == 0
    kept = read(lab / "results.json")["sweep"]
    assert not os.path.isabs(kept) and (lab / kept).resolve() == swept.resolve()
    with_map = (lab / "report.html").stat().st_size
    assert cli("bench", "report", lab)[0] == 0
    assert read(lab / "results.json")["sweep"] == kept and (lab / "report.html").stat().st_size == pytest.approx(
        with_map, rel=0.01
    )


def test_reports_of_nothing_are_refused(cli, tmp_path, lab):
    code, _, err = cli("bench", "report", tmp_path)
    assert code == 2 and "holds no comparison" in err
    before = (lab / "results.json").read_bytes()
    code, _, err = cli("bench", "report", lab, "--sweep", tmp_path)
    assert code == 2 and "sweep.json" in err and (lab / "results.json").read_bytes() == before


def test_a_sweep_that_is_none_is_refused_before_training(cli, tiny_run, tmp_path):
    code, _, err = cli("bench", "compare", *tiny_run, "--out", tmp_path / "lab", "--sweep", tmp_path)
    assert code == 2 and "sweep.json" in err and not (tmp_path / "lab").exists()


def test_a_recipe_is_compared_on_its_own_task(cli, recipe, write, tmp_path):
    path = write(recipe, **{"training.max_steps": 3, "adapter.dropout": 0.0})
    arms = ["--arms", "lora,loran:sinter-large,full", "--no-cost", "--seeds", "7"]
    code, _, err = cli("bench", "compare", "--config", path, *arms, "--out", tmp_path / "lab")
    assert code == 0, err
    results = read(tmp_path / "lab" / "results.json")
    assert results["settings"]["base"] == "fp32" and results["settings"]["data"] == str(path)
    begins = [steps(tmp_path / "lab" / runs["7"]["folder"])[0]["loss"] for runs in results["runs"].values()]
    assert len(begins) == 3 and begins == pytest.approx([begins[0]] * 3, rel=1e-5)  # one head, one batch, no update yet
    for runs in results["runs"].values():
        assert (runs["7"]["heldout"]["accuracy"] * 40) % 1 == pytest.approx(0, abs=1e-9)
        line = steps(tmp_path / "lab" / runs["7"]["folder"])[-1]
        assert set(line["grad_norms"]) == {"query", "value", "classifier"}


def test_bad_options_are_refused_before_anything_is_made(cli, tmp_path, tiny_models):
    code, _, err = cli(
        "bench", "compare", "--model", tiny_models["llama"], "--jobs", 0, "--steps", -1, "--rank", 40,
        "--arms", "full,qlora", "--out", tmp_path / "lab",
    )  # fmt: skip
    assert code == 2 and not (tmp_path / "lab").exists()
    for part in ("--jobs must be at least 1", "--steps must not be", "rank 40 is above 32", "the first arm"):
        assert part in err


def test_a_folder_that_is_not_of_a_lab_is_left_alone(cli, options, tmp_path):
    (tmp_path / "runs/precious").mkdir(parents=True)
    for how in ("--overwrite", "--resume"):
        code, _, err = cli("bench", "compare", *options, "--out", tmp_path, how)
        assert code == 2 and "no lab.json" in err and (tmp_path / "runs/precious").is_dir()
    code, _, err = cli("bench", "compare", *options, "--out", tmp_path / "new", "--resume", "--overwrite")
    assert code == 2 and "write one of them" in err


def test_a_page_that_is_written_elsewhere_keeps_the_environment_of_the_measurement(cli, lab):
    cost = read(lab / "cost.json")
    cost["environment"]["hardware"]["gpu"] = "NVIDIA H100"
    (lab / "cost.json").write_text(json.dumps(cost))
    assert cli("bench", "report", lab)[0] == 0
    assert read(lab / "results.json")["environment"]["hardware"]["gpu"] == "NVIDIA H100"


def test_runs_without_a_result_are_named(cli, lab):
    (lab / "runs/full/seed-2/run.json").unlink()
    (lab / "runs/full/seed-2.failed.txt").write_text("RuntimeError: no luck\nTraceback ...")
    assert cli("bench", "report", lab)[0] == 0
    results = read(lab / "results.json")
    assert results["failed"] == [{"arm": "full", "seed": 2, "why": "RuntimeError: no luck"}]
    assert any("no luck" in sentence for sentence in results["verdict"]["stability"])


def test_everything_that_is_wrong_is_said_at_once(cli, tmp_path):
    wrong = ["--arms", "qlora,loran:sinus", "--model", "llama2-8b", "--seeds", "x", "--rounds", "0"]
    code, _, err = cli("bench", "compare", *wrong, "--out", tmp_path / "lab")
    assert code == 2 and all(part in err for part in ("loran:sinus", "llama2-8b", "--seeds", "--rounds"))


def test_a_cost_of_fewer_rounds_is_measured_again(cli, lab, options):
    cost = read(lab / "cost.json")
    (lab / "cost.json").write_text(json.dumps(cost | {"rounds": 1, "stopped": True}))
    runs = {p: t for p, t in times(lab / "runs").items() if p.suffix != ".claimed"}
    assert cli("bench", "compare", *options, "--out", lab, "--resume")[0] == 0
    assert read(lab / "cost.json")["rounds"] == 2 and "stopped" not in read(lab / "cost.json")
    now = times(lab / "runs")
    assert {p: now[p] for p in runs} == runs
