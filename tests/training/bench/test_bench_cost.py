"""Timing: who is measured when, and the arithmetic of what is reported, without asserting how fast anything is."""

from __future__ import annotations

import gc
import itertools
import statistics
from types import SimpleNamespace

import pytest
import torch

from curvelora_training.bench.arms import parse_arms
from curvelora_training.bench.cost import measure_steps, model_flops, positions, table
from curvelora_training.bench.devices import Device
from curvelora_training.bench.ground import Ground
from curvelora_training.bench.interleave import Rounds, interleave, overheads
from curvelora_training.bench.settings import LINEARS, LabSettings
from curvelora_training.bench.sources import RandomTokens
from curvelora_training.bench.trial import PHASES, PhaseClock

CPU = torch.device("cpu")


class FakeDevice(Device):
    """Ten joules between two readings, and a peak that falls."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.energy, self.peaks = itertools.count(0, 10), itertools.count(1000, -100)

    def joules(self) -> float:
        return next(self.energy)

    def peak(self) -> tuple[int, int]:
        allocated = next(self.peaks)
        return allocated, 2 * allocated


class FakeArm:
    """Takes `seconds`, `seconds` + 1, ... and writes down what is asked of it."""

    def __init__(self, name: str, diary: list[str], seconds: float) -> None:
        self.name, self.diary, self.seconds = name, diary, itertools.count(seconds)

    def enter(self) -> None:
        self.diary.append(f"{self.name} enters")

    def run(self) -> dict[str, float]:
        self.diary.append(self.name)
        seconds = next(self.seconds)
        return {"forward": seconds / 4, "backward": 3 * seconds / 4, "step": seconds}

    def leave(self) -> None:
        self.diary.append(f"{self.name} leaves")


def test_garbage_is_collected_before_a_turn_s_steps_and_not_between_them(monkeypatch):
    """Nor between the untimed and the timed ones, where a device would cool, and its energy be counted."""
    diary, arm = [], FakeArm("a", [], 1)
    arm.run, run = lambda: diary.append("on" if gc.isenabled() else "off") or run(), arm.run
    monkeypatch.setattr(gc, "collect", lambda: diary.append("collected"))
    list(interleave({"a": arm}, Rounds(rounds=1, steps=2, warmup=1), FakeDevice()))
    assert diary == ["collected", *["off"] * 4] and gc.isenabled()


def test_arms_take_turns_in_an_order_that_rotates():
    diary, lines = [], []
    arms = {name: FakeArm(name, diary, 1) for name in "abc"}
    rounds = interleave(arms, Rounds(rounds=4, steps=2, warmup=1), FakeDevice(), lines.append)
    seen = []
    for _ in rounds:
        seen.append([entry[0] for entry in diary if entry.endswith("enters")])
        diary_of_round, diary[:] = list(diary), []
        first = len(seen) == 1
        for name in "abc":
            turn = [e for e in diary_of_round if e.startswith(name)]
            assert turn == [f"{name} enters", *[name] * (2 + (2 if first else 1)), f"{name} leaves"]
        # nobody runs before the last one has left
        assert [e[0] for e in diary_of_round] == [n for n in seen[-1] for _ in range(len(diary_of_round) // 3)]
        assert len(lines) == len(seen)
    assert seen == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_each_round_is_yielded_with_what_was_timed_so_far_and_warm_up_is_not():
    arms = {"a": FakeArm("a", [], 1), "b": FakeArm("b", [], 10)}
    rounds = interleave(arms, Rounds(rounds=2, steps=2, warmup=1), FakeDevice())
    timings = next(rounds)
    assert timings["a"].phases["step"] == [3, 4] and timings["b"].phases["step"] == [12, 13]  # two warm-up steps first
    timings = next(rounds)
    assert timings["a"].phases["step"] == [3, 4, 6, 7] and timings["a"].turns == [3.5, 6.5]
    assert timings["a"].phases["forward"] == [0.75, 1, 1.5, 1.75]
    assert timings["a"].joules == [5, 5]  # ten joules for two steps
    assert (timings["a"].allocated, timings["a"].reserved) == (1000, 2000)  # the first turn's, which was higher
    record = timings["a"].as_dict()
    assert record["step_seconds"]["median"] == 5 and record["step_seconds"]["n"] == 4
    assert set(record["phases"]) == {"forward", "backward"} and record["joules_per_step"] == 5
    assert record["raw_step_seconds"] == [3, 4, 6, 7]
    with pytest.raises(StopIteration):
        next(rounds)


def test_turns_that_are_too_short_for_the_counter_have_no_energy():
    arm = FakeArm("a", [], 1)
    arm.seconds = itertools.repeat(0.1)
    *_, timings = interleave({"a": arm}, Rounds(rounds=2, steps=4, warmup=1), FakeDevice())
    assert timings["a"].joules == [] and timings["a"].as_dict()["joules_per_step"] is None


def test_overheads_are_ratios_within_a_round():
    arms = {"a": FakeArm("a", [], 1), "b": FakeArm("b", [], 10)}
    *_, timings = interleave(arms, Rounds(rounds=3, steps=2, warmup=1), FakeDevice())
    assert timings["a"].turns == [3.5, 6.5, 9.5] and timings["b"].turns == [12.5, 15.5, 18.5]
    found = overheads(timings, "a")
    assert found["a"] is None and found["b"]["pairs"] == 3
    assert found["b"]["ratio"] == pytest.approx(15.5 / 6.5)


def test_without_a_driver_nothing_is_claimed():
    device = Device(CPU)
    assert (device.joules(), device.clocks(), device.peak(), device.peak_tflops, device.name) == (*[None] * 4, "cpu")


@pytest.fixture
def ground(base) -> Ground:
    """The tiny Llama on random tokens, 2 x 12, with three arms."""
    settings = LabSettings(
        model="llama-1b", base="nf4", batch_size=2, length=12, rank=4, alpha=8, target_modules=list(LINEARS), steps=10,
        arms=parse_arms("qlora,loran:sinter,full"), warmup=0.5, learning_rate=3e-3,
    )  # fmt: skip
    return Ground(settings, base("nf4"), RandomTokens(128, 2, 12), [], Device(CPU), 0.5)


def test_model_flops_by_hand(ground, base):
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64  # q; k and v of two heads; o
    mlp, head = 3 * 64 * 128, 64 * 128
    pairs = 128 + 2 * 96 + 128 + 3 * 192  # d_in + d_out of the seven layers
    expected = 24 * (4 * (2 * (attention + mlp) + head) + 6 * 4 * 2 * pairs) + 6 * 2 * 24 * 12 * 64
    assert model_flops(ground, 24) == expected
    ground.base = base("fp32")  # how weights are stored makes no difference
    assert model_flops(ground, 24) == expected
    ground.settings.target_modules = ["q_proj"]
    assert model_flops(ground, 24) == expected - 24 * 6 * 4 * 2 * (pairs - 128)


def test_the_record_s_arithmetic(ground):
    records = list(measure_steps(ground, Rounds(rounds=2, steps=2, warmup=1), 0.01, say=lambda text: None))
    assert [r["rounds"] for r in records] == [1, 2]
    assert [len(r["arms"]["qlora"]["raw_step_seconds"]) for r in records] == [2, 4]
    record = records[-1]
    assert (record["schema"], record["kind"], record["device"], record["processes"]) == (1, "bench_step", "cpu", 1)
    assert (record["tokens_per_step"], record["steps_per_round"], record["warmup_steps"]) == (24, 2, 1)
    assert record["std_BA_target"] == 0.01 and record["peak_tflops"] is None and record["clocks"] is None
    assert record["model_flops_per_step"] == model_flops(ground, 24) and record["gemm_tflops"] > 0
    assert list(record["arms"]) == ["qlora", "loran:sinter", "full"]
    raw = {key: arm["raw_step_seconds"] for key, arm in record["arms"].items()}
    for key, arm in record["arms"].items():
        median = statistics.median(raw[key])
        assert arm["step_seconds"]["median"] == pytest.approx(median, rel=1e-3)
        assert arm["tokens_per_second"] == arm["tokens_per_second_per_device"] == pytest.approx(24 / median, rel=1e-3)
        rate = record["model_flops_per_step"] / median / 1e12
        assert arm["model_tflops_per_second_per_device"] == pytest.approx(rate, rel=1e-3)
        assert arm["mfu"] is None and arm["mfu_of_gemm"] == pytest.approx(rate / record["gemm_tflops"], rel=1e-3)
        assert set(arm["phases"]) == set(PHASES)
        assert arm["peak_allocated_bytes"] is arm["joules_per_step"] is None
        if key == "qlora":
            assert arm["overhead"] is None
            continue
        ratios = [statistics.median(raw[key][i : i + 2]) / statistics.median(raw["qlora"][i : i + 2]) for i in (0, 2)]
        assert arm["overhead"]["ratio"] == pytest.approx(statistics.median(ratios), rel=1e-3)
    adapters = 4 * 2 * (128 + 2 * 96 + 128 + 3 * 192)
    assert record["arms"]["qlora"]["trainable_parameters"] == adapters
    assert record["arms"]["qlora"]["std_BA"] == pytest.approx(0.01, rel=0.1)
    assert record["arms"]["full"]["std_BA"] is None
    lines = table(record).splitlines()
    assert len(lines) == 4 and lines[0].startswith("arm") and lines[2].startswith("loran:sinter")
    assert f"{record['arms']['full']['overhead']['ratio']:.3f}" in lines[3]


def test_the_rate_is_at_its_peak_while_timing(ground):
    timed, trained = (ground.trial(ground.settings.arms[0], 0, at_peak=peak) for peak in (True, False))
    for step in range(12):
        timed.step(ground.source.batch(0, step))
        assert {group["lr"] for group in timed.optimizer.param_groups} == {3e-3}
    trained.step(ground.source.batch(0, 0))
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3 / 6)  # the first of five warm-up steps


def test_a_clock_adds_up_what_has_one_name():
    clock = PhaseClock(Device(CPU))
    for name in ("start", "forward", "backward", "forward"):
        clock.mark(name)
    seconds = clock.seconds()
    assert list(seconds) == ["forward", "backward", "step"]
    assert seconds["step"] == seconds["forward"] + seconds["backward"]


def test_positions_of_images_are_their_patches() -> None:
    ground = SimpleNamespace(base=SimpleNamespace(config=SimpleNamespace(patch_size=8)))
    assert positions(ground, {"pixel_values": torch.zeros(3, 3, 16, 24)}) == 3 * (2 * 3 + 1)
    assert positions(ground, {"input_ids": torch.zeros(3, 5)}) == 15


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_of_this_card(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "name", property(lambda self: name))
    assert Device(torch.device("cpu")).peak_tflops == peak
