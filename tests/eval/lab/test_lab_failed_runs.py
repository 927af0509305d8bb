"""Runs that failed are named: in the verdict, and in the table of all runs."""

from __future__ import annotations

import json

from lab_files import lab_results, write_lab

from curvelora_eval.lab.report import write_lab_report
from curvelora_eval.lab.verdict import verdict


def failure(arm: str, seed: int, why: str = "out of memory.\nmore of it") -> dict:
    return {"arm": arm, "seed": seed, "why": why}


def test_failed_runs_are_named_and_nothing_is_said_of_them():
    results = lab_results(steps=2000, arms=("qlora", "ranlora"))
    del results["runs"]["ranlora"]["43"]
    results["failed"] = [failure("ranlora", 43)]
    said = verdict(results)["stability"]
    assert said[:3] == [
        "RanLoRA has no result in 1 of 3 seeds (out of memory).",
        "None of the runs that finished diverged (up to 3 seeds × 2,000 steps an arm).",
        "The loss of none of the runs that finished spiked (up to 3 seeds × 2,000 steps an arm).",
    ]
    assert not any("No arm" in sentence for sentence in said)


def test_an_arm_without_a_finished_run_is_named():
    results = lab_results(arms=("qlora", "ranlora", "aurora"))
    results["runs"]["ranlora"], results["runs"]["aurora"] = {}, {}
    results["failed"] = [failure("ranlora", seed) for seed in (42, 43)] + [failure("ranlora", 44, "killed")]
    results["failed"] += [failure("gone", 42)]
    said = verdict(results)["stability"]
    assert "RanLoRA has no result in 3 of 3 seeds (out of memory; killed)." in said
    assert "AuroRA has no run that finished." in said
    assert "gone has no result in 1 of 1 seed (out of memory)." in said
    results["runs"] = {}
    assert verdict(results)["stability"][0] == "QLoRA has no run that finished."
    # a measurement of cost alone trains nothing
    assert verdict(results | {"failed": []})["stability"] == []


def test_a_run_that_was_made_again_did_not_fail():
    results = lab_results(arms=("qlora", "ranlora")) | {"failed": [failure("ranlora", 43)]}
    assert not any("no result" in sentence for sentence in verdict(results)["stability"])


def test_a_failed_run_has_a_row_and_the_environment_is_that_of_the_cost(tmp_path):
    failed = [{"arm": "aurora", "seed": 44, "why": "out of <memory>"}, {"arm": "gone", "seed": 42, "why": "lost"}]
    results = write_lab(tmp_path, seeds=(42, 43), steps=8, arms=("qlora", "aurora"), failed=failed)
    del results["environment"]
    results["cost"]["environment"] = {"hardware": {"gpu": "NVIDIA H200", "gpus": 1}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_lab_report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "failed: out of &lt;memory&gt;" in text and "AuroRA, seed 44" in text and "gone, seed 42" in text
    assert "NVIDIA H200" in text
