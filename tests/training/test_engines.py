"""`curvelora bench engines`: what it writes, what it keeps, and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from curvelora.cli import main
from curvelora_training.bench.engines_table import engines_table
from curvelora_training.zero3 import BUCKETS, for_what_trains, idle_keys

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def engine_record(stage: int, processes: int, seconds: float, **other: Any) -> dict[str, Any]:
    """What the table reads of one."""
    return {
        "model": "m",
        "base": "nf4",
        "arm": "qlora",
        "rows": 2,
        "length": 1000,
        "stage": stage,
        "processes": processes,
        "step_seconds": {"median": seconds},
        "tokens_per_second_per_process": 2000 / seconds,
        "base_peak_bytes": 1_500_000_000,
        "peak_bytes": {"allocated": 2_000_000_000},
    } | other


def test_the_table_compares_what_can_be_compared() -> None:
    records = [
        engine_record(2, 1, 1.0),
        engine_record(2, 2, 1.25),
        engine_record(3, 2, 1.5),
        engine_record(3, 2, 3.0, arm="aurora", base_peak_bytes=None, peak_bytes=None),
    ]
    rows = [[cell.strip() for cell in line.split("|")[4:-1]] for line in engines_table(records).splitlines()[2:]]
    assert rows[0] == ["1 x 2 x 1,000", "ZeRO-2", "1.000", "–", "2,000", "–", "1.5", "2.0"]
    assert rows[1] == ["2 x 2 x 1,000", "ZeRO-2", "1.250", "–", "1,600", "0.800", "1.5", "2.0"]
    assert rows[2] == ["2 x 2 x 1,000", "ZeRO-3", "1.500", "1.200", "1,333", "0.667", "1.5", "2.0"]
    assert rows[3] == ["2 x 2 x 1,000", "ZeRO-3", "3.000", "–", "667", "–", "–", "–"]


def test_keys_of_parameters_in_shares_are_left_out_and_named() -> None:
    section = {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": True, "reduce_bucket_size": 7}
    settings = {"zero_optimization": section, "gradient_clipping": "auto"}
    assert idle_keys(settings) == []
    assert for_what_trains(settings) == {
        "zero_optimization": BUCKETS | {"overlap_comm": True, "reduce_bucket_size": 7, "stage": 2},
        "gradient_clipping": "auto",
    }
    section |= {"stage3_param_persistence_threshold": 10, "sub_group_size": 5}
    assert idle_keys(settings) == ["stage3_param_persistence_threshold", "sub_group_size"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "4"], "--stages are ZeRO's 0, 1, 2 and 3"),
        (["--rows", "0"], "--rows, --length, --steps and --rank must be at least 1"),
        (["--model", "llama9"], "there is no such shape or folder"),
        (["--arms", "qlora@liger"], "arm qlora@liger: Liger's kernels take weights without calling their layers"),
        ([], "the engines need a launcher"),
    ],
)
def test_bad_input_is_said(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["bench", "engines", "--out", str(tmp_path / "x.json"), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_stages_train_alike_and_what_is_there_is_kept(tmp_path: Path) -> None:
    """Two processes, ZeRO-2 and 3 on the same drawn weights: losses bit for bit; a second run makes the arm that is missing."""
    shape, out = tmp_path / "shape.json", tmp_path / "engines.json"
    shape.write_text(json.dumps(SHAPE), encoding="utf-8")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "curvelora_training.bench", "engines", "--model", str(shape), "--base", "nf4"]
    command += ["--rows", "2", "--length", "16", "--steps", "2", "--rank", "4", "--out", str(out)]

    def records(arms: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [*command, "--arms", arms],
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text(encoding="utf-8"))["records"]

    first = records("qlora")
    assert [(r["arm"], r["stage"], len(r["losses"])) for r in first] == [("qlora", 2, 5), ("qlora", 3, 5)]
    assert first[0]["losses"] == first[1]["losses"]
    assert [round(r["share_of_base"], 2) for r in first] == [1, 0.5]
    for record in first:  # PEFT's 4-bit layer, which could be fused on a GPU
        assert record["fused_layers"] == 0 and record["unfused_layers"] == {"on a CPU": 21}
    second = records("qlora,loran:sinter@eager")
    assert second[:2] == first and [r["arm"] for r in second[2:]] == ["loran:sinter@eager"] * 2
    assert [r["unfused_layers"] for r in second[2:]] == [{"kernels: off": 21}] * 2
