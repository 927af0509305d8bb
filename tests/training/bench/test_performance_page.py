"""docs/performance.md is what its records say, and its commands are accepted."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from curvelora_training.bench import kernels_command, profile_command, step_command
from curvelora_training.bench.arms import parse_arms
from curvelora_training.bench.performance_table import KEPT, LARGE, PROFILE, STEP, performance_table, profile_table
from curvelora_training.bench.profile import KINDS, idle_of, kind_of

COMMANDS = {"step": step_command, "profile": profile_command, "kernels": kernels_command}


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs/performance.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "docs/results/performance"


def seconds(folder: Path, file: str) -> dict[str, float]:
    arms = json.loads((folder / file).read_text(encoding="utf-8"))["arms"]
    return {name: arm["step_seconds"]["median"] for name, arm in arms.items()}


@pytest.mark.parametrize(("block", "table"), [("performance", performance_table), ("profile", profile_table)])
def test_the_tables_are_those_of_the_files(page: str, folder: Path, block: str, table: Any) -> None:
    assert page.split(f"<!-- {block} -->\n")[1].split(f"\n<!-- end of {block} -->")[0] == table(folder)


def test_what_the_text_makes_of_them_is_so(page: str, folder: Path) -> None:
    step, large = seconds(folder, STEP), seconds(folder, LARGE)
    assert "takes 0.90 of PEFT's QLoRA step with Liger in both, and 0.72 of one without" in page
    ours = step["loran:sinter@liger"]
    assert (round(ours / step["qlora@eager@liger"], 2), round(ours / step["qlora@eager"], 2)) == (0.90, 0.72)
    assert "**Missed**: QLoRA by 8 %, LoRAN by 4 %, exact dropout by 1 %" in page
    missed = [
        step[arm] / goal - 1 for arm, goal in (("qlora@liger", 0.62), ("loran:sinter@liger", 0.78), ("exact", 1.30))
    ]
    assert [round(100 * share) for share in missed] == [8, 4, 1]
    assert step["features"] < 0.85 and seconds(folder, KEPT)["qlora@liger"] < 0.50
    assert large["loran:sinter@liger"] / large["qlora@liger"] < 1.30
    assert all(step[arm] < step["qlora@eager@liger"] for arm in ("qlora", "qlora@liger", "loran:sinter@liger"))
    profile = json.loads((folder / PROFILE).read_text(encoding="utf-8"))["arms"]
    idle = [arm["step_seconds"] * 1e3 - arm["busy_milliseconds"] for arm in profile.values()]
    assert [round(ms, -1) for ms in idle] == [80, 80] and "the GPU is idle for 80 ms of each step" in page


def test_its_commands_are_accepted(page: str) -> None:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        _, _, name, *rest = shlex.split(line)
        parser = argparse.ArgumentParser()
        COMMANDS[name].add_arguments(parser)
        args = parser.parse_args(rest)
        if name != "kernels":
            assert parse_arms(args.arms, args.arm)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_merged_weight", "kernels: merged weight"),
        ("_gradients", "kernels: gradients of A and B"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("_triton_rope", "Liger: norms, SwiGLU, RoPE, loss"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*)", "NF4 dequantisation (bitsandbytes)"),
        ("something else", "other"),
    ],
)
def test_kernels_are_sorted_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind
    assert kind in {*KINDS, "other"}


def test_gaps_between_kernels() -> None:
    """Two steps; kernels that overlap on two streams, one inside of another, and in any order."""
    ran = [
        (0, 10, "a"),
        (12, 40, "b"),
        (14, 20, "inside of b"),
        (39, 60, "overlaps b"),
        (160, 170, "c"),
        (170, 180, "d"),
    ]
    found = idle_of([*reversed(ran), (5180, 5200, "e")], steps=2)
    assert found["milliseconds"] == pytest.approx((2 + 100 + 5000) / 1e3 / 2)
    assert {word: (gap["count"], round(gap["milliseconds"], 6)) for word, gap in found["gaps"].items()} == {
        "below 5 us": (0.5, 0.001),
        "5 to 50 us": (0, 0),
        "50 us to 1 ms": (0.5, 0.05),
        "1 ms and more": (0.5, 2.5),
    }
    assert found["longest"] == [
        {"milliseconds": 5.0, "after": "d", "before": "e"},
        {"milliseconds": 0.1, "after": "overlaps b", "before": "c"},
        {"milliseconds": 0.002, "after": "a", "before": "b"},
    ]
    assert idle_of([], 1)["milliseconds"] == 0
