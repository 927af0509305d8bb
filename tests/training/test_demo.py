"""The demo, shortened, through its own entry point on the real model and real sentences; whole behind the marker slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from curvelora_training.demo import ARMS, MARKS, record
from run_files import result


def run_demo(root: Path, out: Path, *overrides: str) -> str:
    """Run the demo from the repository's root; returns what it printed."""
    command = [sys.executable, "-m", "curvelora_training.demo", "--out", str(out), *overrides]
    done = subprocess.run(
        command, cwd=root, env=os.environ.copy(), capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(1260)  # five minutes beside another process on two cores
def test_the_demo_shortened(root: Path, tmp_path: Path) -> None:
    """Every arm runs, the table has them all, and the two LoRAN arms differ as the README says."""
    printed = run_demo(root, tmp_path, "data.train.limit=192", "training.epochs=1", "data.test.limit=64")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for folder, (title, _) in ARMS.items():
        assert title in printed
        assert title in page
        assert result(tmp_path / folder, "evaluation.json")["counts"]["rows"] == 64
    assert result(tmp_path / "untrained")["status"] == "untrained"
    qlora, published, large = (result(tmp_path / name) for name in ("qlora", "loran_sinter", "loran_sinter_large"))
    assert qlora["trainable_parameters"] == published["trainable_parameters"]
    # same seed and data order: B = 0, so all arms make the same first step
    assert qlora["first_loss"] == pytest.approx(published["first_loss"], rel=1e-3)
    assert published["resolvability"]["forward"] < 0.02
    assert large["resolvability"]["forward"] > 0.5
    assert published["resolvability"]["dtype"] == "bfloat16"
    small, ranlora, aurora = (result(tmp_path / name) for name in ("qlora_small", "ranlora", "aurora"))
    assert qlora["start_shift"]["relative"] == small["start_shift"]["relative"] == 0
    assert aurora["start_shift"]["relative"] == 0 and aurora["merge_gap"]["relative"] > 0
    # the factors come from the unquantised checkpoint, and their last singular vectors move little
    assert 0 < ranlora["start_shift"]["relative"] < 0.1
    assert 1 <= ranlora["adapter_parameters"] / small["adapter_parameters"] < 1.01
    assert "accuracy" in result(tmp_path / "aurora", "evaluation.json")["merged_form"]["metrics"]

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n", encoding="utf-8")
    record(tmp_path, tmp_path / "kept", readme)
    written = readme.read_text(encoding="utf-8")
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert all(title in written for title, _ in ARMS.values())
    assert result(tmp_path / "kept/qlora") == qlora


@pytest.mark.slow
@pytest.mark.timeout(1260)  # ten minutes of training on a slow pair of cores, beside the limit of run_demo
def test_adapters_beat_the_head_by_more_than_its_interval(root: Path, tmp_path: Path) -> None:
    run_demo(root, tmp_path)
    scores = {folder: result(tmp_path / folder, "evaluation.json")["metrics"]["accuracy"] for folder in ARMS}
    head = scores["head_only"]
    assert head["value"] > scores["untrained"]["value"]
    for arm in ("qlora", "loran_sinter", "loran_sinter_large"):
        assert scores[arm]["value"] - head["value"] > head["high"] - head["low"]
    assert result(tmp_path / "loran_sinter_large")["resolvability"]["forward"] >= 0.5
