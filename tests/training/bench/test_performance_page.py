"""docs/performance.md is what its records say, and its commands are accepted."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from curvelora.kernels import factor_gradients
from curvelora.kernels.fp8_readings import FIRST_TILE, SECOND_TILE
from curvelora.kernels.merged_weight import TILE as MERGED_TILE
from curvelora_training.bench import kernels_command, profile_command, step_command, unsloth_ground
from curvelora_training.bench.arms import parse_arms
from curvelora_training.bench.performance_table import (
    IN_BF16,
    KEPT,
    LARGE,
    PROFILE,
    STEP,
    UNSLOTH,
    UNSLOTH_OWN,
    performance_table,
    profile_table,
)
from curvelora_training.bench.profile import KINDS, idle_of, kind_of

# products with a factor of rank 64, by cuBLAS's names for their kernels
THIN = re.compile(r"nvjet_sm90_[a-z]+_(64x|96x64_)|splitKreduce")
# earlier runs: a card with less power for the same work, on which the profile was taken too, and a machine with a slower host
FAST, SLOW_HOST = "step_7b_h200_fast_card.json", "step_7b_h200_slow_host.json"
BF16_BEFORE = "step_7b_h200_bf16_before.json"  # LoRAN's dW with a product of its own
OTHER_CARD = "step_7b_h200_other_card.json"  # the same kernels, and the card of KEPT and LARGE
COMMANDS = {"step": step_command, "profile": profile_command, "kernels": kernels_command}


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs/performance.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "docs/results/performance"


def arms(folder: Path, file: str) -> dict[str, Any]:
    return json.loads((folder / file).read_text(encoding="utf-8"))["arms"]


def seconds(folder: Path, file: str) -> dict[str, float]:
    return {name: arm["step_seconds"]["median"] for name, arm in arms(folder, file).items()}


@pytest.mark.parametrize(("block", "table"), [("performance", performance_table), ("profile", profile_table)])
def test_the_tables_are_those_of_the_files(page: str, folder: Path, block: str, table: Any) -> None:
    assert page.split(f"<!-- {block} -->\n")[1].split(f"\n<!-- end of {block} -->")[0] == table(folder)


def test_which_goals_are_met(page: str, folder: Path) -> None:
    step, other, large = seconds(folder, STEP), seconds(folder, OTHER_CARD), seconds(folder, LARGE)
    goals = {"qlora@liger": 0.62, "loran:sinter@liger": 0.78, "features": 0.85, "exact": 1.30}
    assert all(step[arm] < goal for arm, goal in goals.items()) and seconds(folder, KEPT)["qlora@liger"] < 0.50
    ratio = {arm: large[arm] / large["qlora@liger"] for arm in ("loran:sinter@liger", "loran:sinter@liger@fp8")}
    assert ratio["loran:sinter@liger@fp8"] < 1.30
    assert (
        "**Met**: QLoRA, LoRAN with Sinter, both forms of dropout, QLoRA with all activations kept, LoRAN over" in page
    )
    over = [card["loran:sinter@liger@fp8"] / 0.72 for card in (step, other)]
    over += [step["loran:tanh@liger"] / 0.78, ratio["loran:sinter@liger"] / 1.30]
    assert [round(100 * (one - 1), 1) for one in over] == [2.8, 2.1, 0.5, 3.8]
    assert "**Missed**: at 7B FP8 by 3 % and tanh by 0.5 %" in page
    assert (
        f"FP8 by 2 %, and tanh with {other['loran:tanh@liger']:.3f} s not" in page and other["loran:tanh@liger"] < 0.78
    )
    assert "LoRAN over QLoRA at the 70B shape in bf16 alone by 4 %" in page


def test_rivals(page: str, folder: Path) -> None:
    step, in_bf16 = seconds(folder, STEP), seconds(folder, IN_BF16)
    eager, unsloth = step["qlora@eager@liger"], seconds(folder, UNSLOTH)["unsloth"]
    ours, loran, fp8 = (step[arm] for arm in ("qlora@liger", "loran:sinter@liger", "loran:sinter@liger@fp8"))
    assert f"takes {ours / eager:.2f} of PEFT's with Liger in both, and {ours / unsloth:.2f} of Unsloth's" in page
    (first,), (own,) = (arms(folder, file).values() for file in (UNSLOTH, UNSLOTH_OWN))
    peaks = [one["peak_allocated_bytes"] / 1e9 for one in (first, own)]
    assert f"takes {peaks[0]:.1f} GB" in page and f"to the host: {peaks[1]:.1f} GB, and no faster" in page
    assert own["step_seconds"]["median"] > unsloth and (own["unsloth_checkpointing"], first["unsloth"]) == (
        True,
        "2026.10.9",
    )
    assert set(first["unsloth_patches"].values()) == {32}
    assert (
        f"takes {loran / eager:.2f} of PEFT's QLoRA step with Liger in both, and {loran / unsloth:.2f} of Unsl" in page
    )
    assert f"with FP8 {fp8 / unsloth:.2f}." in page
    ahead = [arm for arm in step if arm.endswith(("@liger", "@fp8")) and "eager" not in arm] + ["features", "dropped"]
    assert len(ahead) == 6 and all(step[arm] < eager for arm in ahead)
    assert f"behind PEFT with Liger, by a factor of {step['exact'] / eager:.2f}" in page
    assert f"and takes {step['dropped'] / step['peft_dropped']:.2f} of PEFT's step with dropout" in page
    before = seconds(folder, BF16_BEFORE)
    over, dropped = in_bf16["lora@eager@liger"], in_bf16["dropped"] / in_bf16["peft_dropped"]
    words = f"takes {in_bf16['lora@liger'] / over:.2f} of PEFT's with Liger in both, with dropout {dropped:.2f}, and "
    assert words + f"LoRAN's {in_bf16['loran:sinter@liger'] / over:.2f} of PEFT's LoRA" in page
    was = [before[arm] / before["lora@eager@liger"] for arm in ("loran:sinter@liger", "loran:sinter@eager@liger")]
    assert f"It took {was[0]:.2f} of it" in page and f"the eager pass too: {was[1]:.2f}" in page


def test_peaks(page: str, folder: Path) -> None:
    peaks = {arm: one["peak_allocated_bytes"] for arm, one in arms(folder, STEP).items()}
    others = ("qlora", "loran:sinter", "qlora@eager", "qlora@eager@liger", "peft_dropped")
    shown = {arm: f"{peak / 1e9:.2f}" for arm, peak in peaks.items() if arm not in others}
    assert all(peaks[arm] < 9.5e9 for arm in shown)
    assert peaks["loran:sinter@liger"] == peaks["qlora@liger"] and shown["loran:tanh@liger"] == shown["qlora@liger"]
    assert (
        "{qlora@liger} (QLoRA, LoRAN with Sinter or tanh), {features} (`features`), {dropped} (QLoRA with dropout), "
        "{loran:sinter@liger@fp8} (FP8) and {exact} (exact dropout)".replace("{", "{0[")
        .replace("}", "]}")
        .format(shown)
        in page
    )
    assert (
        f"PEFT's with Liger is {peaks['qlora@eager@liger'] / 1e9:.1f}, with dropout {peaks['peft_dropped'] / 1e9:.1f}"
        in page
    )


def test_what_the_text_makes_of_other_runs(page: str, folder: Path) -> None:
    large, short = seconds(folder, LARGE), seconds(folder, "step_70b_h200_4096.json")
    assert f"makes {1 + 1.60 / large['qlora@liger']:.2f} by itself" in page
    assert f"the ratio was {short['loran:sinter@liger'] / short['qlora@liger']:.2f}" in page
    peft = seconds(folder, "step_70b_h200_peft.json")["qlora@liger"]
    assert f"took {peft:.2f} s for those 4,096 tokens" in page
    assert f"LoRAN's step {short['loran:sinter@liger'] / peft:.2f} times that" in page


def test_where_the_time_goes(page: str, folder: Path) -> None:
    profiled, profile = zip(*arms(folder, PROFILE).items(), strict=True)
    idle = [arm["idle"] for arm in profile]
    assert (
        "nothing to run for {:.0f}, {:.0f} and {:.0f} ms a step".format(*(one["milliseconds"] for one in idle)) in page
    )
    longest = [one["longest"][0]["milliseconds"] for one in idle]
    assert "the longest {:.1f}, {:.1f} and {:.1f} ms".format(*longest) in page
    assert "takes {:.3f}, {:.3f} and {:.3f} s".format(*(seconds(folder, FAST)[arm] for arm in profiled)) in page
    joules = [arms(folder, FAST)[arm]["joules_per_step"] for arm in profiled]
    assert "QLoRA's takes {:.0f} J, LoRAN's {:.0f}, with FP8 {:.0f}".format(*joules) in page
    alone = json.loads((folder / FAST).read_text(encoding="utf-8"))["gemm_tflops"]
    assert f"ran at {alone:.0f} TFLOP/s alone" in page
    kinds = [arm["kinds"] for arm in profile]
    thin = sum(k["milliseconds"] for k in profile[0]["kernels"] if THIN.search(k["name"]))
    large = [kinds[0]["matrix products"] - thin, kinds[1]["matrix products"]]
    work = [passes * 106 + 4.3 for passes in (2.78, 3.78)]  # TFLOP
    at_best = [1e3 * tera / alone for tera in work]
    adapters = ["kernels: merged weight", "kernels: gradients of A and B"]
    rest = ("elementwise and reductions", "optimiser and clipping", "copies and fills")
    parts = {
        "reached {:.0f} TFLOP/s\n(QLoRA, ": [1e3 * work[0] / large[0]],
        " {:.0f} ms) and {:.0f} (LoRAN, {:.0f} ms)": [large[0], 1e3 * work[1] / large[1], large[1]],
        "would take {:.0f} and {:.0f} ms": at_best,
        "the profiled {:.0f} and {:.0f} (busy and idle)": [
            arm["busy_milliseconds"] + arm["idle"]["milliseconds"] for arm in profile[:2]
        ],
        "clock under load {:.0f} and {:.0f} ms": [found - best for found, best in zip(large, at_best, strict=True)],
        "attention {:.0f} and {:.0f}": [kind["attention"] + kind["other"] for kind in kinds[:2]],
        "Liger's kernels {:.0f} and {:.0f}, the": [kind["Liger: norms, SwiGLU, RoPE, loss"] for kind in kinds[:2]],
        "the adapters {:.0f} and {:.0f}": [kinds[0][adapters[0]] + thin, sum(kinds[1][kind] for kind in adapters)],
        "waits {:.0f} and {:.0f}": [one["milliseconds"] for one in idle[:2]],
        "the rest {:.0f} and {:.0f}.": [sum(kind[name] for name in rest) for kind in kinds[:2]],
        "G from FP8 takes {:.0f} ms instead of {:.0f}": [
            product := next(k["milliseconds"] for k in profile[2]["kernels"] if "ovscale" in k["name"]),
            in_bf16 := sum(k["milliseconds"] for k in profile[1]["kernels"] if k["name"].endswith("_NTN")),  # g^T x
        ],
        "({:,.0f} TFLOP/s). Two readings": [1e3 * 106 / product],
        "take {:.0f} ms of those {:.0f} back": [
            kinds[2]["kernels: FP8 codes, thin products, bounds"],
            in_bf16 - product,
        ],
        "the GPU is busy for {:.0f} ms less": [profile[1]["busy_milliseconds"] - profile[2]["busy_milliseconds"]],
    }
    for words, values in parts.items():
        assert words.format(*values) in page, words.format(*values)


def test_how_cards_and_hosts_differ(page: str, folder: Path) -> None:
    step, other = seconds(folder, STEP), seconds(folder, OTHER_CARD)
    less = {arm: 100 * (1 - other[arm] / step[arm]) for arm in step}
    assert round(less.pop("dropped")) == 3
    assert f"took {min(less.values()):.1f} to {max(less.values()):.1f} % less time in each arm but QLoRA with" in page
    fast, slow = arms(folder, FAST), arms(folder, SLOW_HOST)
    same = [arm for arm in fast if arm not in ("features", "dropped")]  # which waited for the slower host
    for key, low, high in (("joules_per_step", 2, 4), ("step_seconds", 2, 3)):
        value = (lambda one: one["median"]) if key == "step_seconds" else float
        less = [100 * (1 - value(fast[arm][key]) / value(slow[arm][key])) for arm in same]
        assert low <= round(min(less)) and round(max(less)) <= high, less
    before, now = (seconds(folder, file)["lora@eager@liger"] for file in (BF16_BEFORE, IN_BF16))
    assert round(100 * (1 - now / before)) == 2 and "PEFT's LoRA took 2 % less time than on" in page
    commits = [
        json.loads((folder / file).read_text(encoding="utf-8"))["environment"]["commit"] for file in (STEP, IN_BF16)
    ]
    assert "The first rows are of commit {:.7}, those on bf16 of {:.7}".format(*commits) in page
    assert "2 to 4 % less energy and 2 to 3 % less time" in page
    over = [
        arms_of[arm]["step_seconds"]["median"] / arms_of["qlora@liger"]["step_seconds"]["median"]
        for arm in ("features", "dropped")
        for arms_of in (slow, fast)
    ]
    words = "{:.2f} QLoRA steps instead of {:.2f} (`features`) and {:.2f} instead of {:.2f} (QLoRA with dropout)"
    assert words.format(*over) in page


def test_the_readme_says_the_same(root: Path, folder: Path) -> None:
    step, large = seconds(folder, STEP), seconds(folder, LARGE)
    text = (root / "README.md").read_text(encoding="utf-8")
    ours, peft = (f"{step[arm]:.2f} s" for arm in ("qlora@liger", "qlora@eager"))
    assert f"takes {ours} for a QLoRA step at 7B and {step['loran:sinter@liger']:.2f} s for LoRAN's" in text
    assert f"PEFT's QLoRA takes {peft} there, and {step['qlora@eager@liger']:.2f} s with Liger" in text
    in_bf16, unsloth = seconds(folder, IN_BF16), seconds(folder, UNSLOTH)["unsloth"]
    lora, loran, eager = (f"{in_bf16[arm]:.2f} s" for arm in ("lora@liger", "loran:sinter@liger", "lora@eager@liger"))
    assert f"with Liger, Unsloth's {unsloth:.2f} s" in text
    assert f"On a bf16 base (another H200) LoRA takes {lora} and LoRAN {loran}, PEFT's LoRA with Liger {eager}" in text
    assert f"At 70B it is {large['qlora@liger']:.2f} and {large['loran:sinter@liger']:.2f} s" in text


def test_tiles_are_nearly_the_fastest_that_were_measured(page: str, folder: Path) -> None:
    chosen = {"merged_weight": MERGED_TILE, "gradients": factor_gradients.tile_for(64)}
    of_fp8 = {"first_readings": FIRST_TILE, "second_readings": SECOND_TILE}
    for file, tiles in (("kernels_h200_tiles.json", chosen), ("kernels_h200_tiles_fp8.json", of_fp8)):
        for layer in json.loads((folder / file).read_text(encoding="utf-8"))["layers"]:
            for name, tile in tiles.items():
                times = {tuple(one["tile"]): one.get("milliseconds") for one in layer["tiles"][name]}
                assert times[tile] <= 1.05 * min(time for time in times.values() if time), (layer["d_out"], name)
    assert "within 5 % of the fastest" in page


def test_its_commands_are_accepted(page: str) -> None:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 8
    for line in lines:
        _, _, name, *rest = shlex.split(line)
        if name == "curvelora_training.bench.unsloth_step":
            assert unsloth_ground.options().parse_args(rest).out
            continue
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
        ("_sums", "kernels: gradients of A and B"),
        ("_thin", "kernels: FP8 codes, thin products, bounds"),
        ("_rounded", "elementwise and reductions"),
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
