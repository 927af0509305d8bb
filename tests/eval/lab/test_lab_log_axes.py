"""A log axis has no place for zero: gradients of exactly zero are left out and do not stop the page."""

from __future__ import annotations

import json
import re

import pytest
from lab_files import TYPES, write_lab

from curvelora_eval.lab.charts import Curve, curves
from curvelora_eval.lab.folder import Arm
from curvelora_eval.lab.report import write_lab_report


@pytest.mark.parametrize("value", [0.0, -1.0, None])
def test_gradients_of_zero_are_left_out_of_log_axes(tmp_path, value):
    results = write_lab(tmp_path, seeds=(42,), steps=8, arms=("qlora", "aurora"))
    path = tmp_path / results["runs"]["qlora"]["42"]["folder"] / "steps.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2] |= {"grad_norm": value, "grad_norms": dict.fromkeys(TYPES, value)}
    path.write_text("\n".join(map(json.dumps, lines)))
    write_lab_report(tmp_path)
    shown = re.search(
        r'aria-label="Gradient norm by step".*?</figure>', (tmp_path / "report.html").read_text(encoding="utf-8"), re.S
    ).group()
    assert "QLoRA, step 2:" in shown and "QLoRA, step 3:" not in shown and "AuroRA, step 3:" in shown
    for line in lines:
        line["grad_norm"] = value
    path.write_text("\n".join(map(json.dumps, lines)))
    write_lab_report(tmp_path)


def test_curves_on_a_log_axis_take_zero():
    arm = Arm("a", "A", 0, 0, False, True, {})
    text = curves([Curve(arm, {"1": [(1, 0.1), (2, 0.0), (3, 0.2)]}, ends={"1": (2, 0.0)})], "t", log=True)
    assert "A, step 1: 0.100" in text and "step 2" not in text
