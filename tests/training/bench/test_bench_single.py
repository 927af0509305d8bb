"""One run: what it writes down, and how it ends when nothing is finite any more."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from curvelora_training.bench.arms import named_arm, parse_arms
from curvelora_training.bench.devices import Device
from curvelora_training.bench.ground import Ground
from curvelora_training.bench.settings import LabSettings
from curvelora_training.bench.single import DIVERGED_AFTER, FLUSH, look_steps, make_run, spread, step_line
from curvelora_training.bench.sources import RandomTokens

CPU = torch.device("cpu")


@pytest.fixture
def ground(base):
    """`ground(steps=..., ...)` -> the tiny Llama on random tokens."""

    def build(**changes):
        values = {
            "model": "llama-1b", "base": "fp32", "batch_size": 2, "length": 12, "rank": 4, "alpha": 8, "steps": 12,
            "target_modules": ["q_proj", "down_proj"], "looks": 3, "warmup": 0.25, "learning_rate": 1e-2,
        }  # fmt: skip
        settings = LabSettings(**values | changes, arms=parse_arms("qlora"))
        return Ground(settings, base("fp32"), RandomTokens(128, 2, 12), [], Device(CPU), 0.0)

    return build


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("steps", "looks", "expected"),
    [(100, 4, {0, 25, 50, 75, 100}), (3, 20, {0, 1, 2, 3}), (7, 0, set()), (0, 5, {0}), (10, 1, {0, 10})],
)
def test_looks_are_spread_over_the_run(steps, looks, expected):
    assert look_steps(steps, looks) == expected


def test_layers_are_spread_over_the_model():
    names = [f"model.layers.{i}.{kind}" for i in range(8) for kind in ("q", "k")]
    chosen = spread(names, 4)
    assert chosen == [f"model.layers.{i}.{kind}" for i in (2, 6) for kind in ("q", "k")]  # the middles of both halves
    assert spread(names, 99) == names and spread([], 3) == []


def record(loss=1.0, norm=0.5):
    return {
        "loss": torch.tensor(loss),
        "grad_norm": torch.tensor(norm),
        "grad_norms": {"q_proj": torch.tensor(norm)},
        "update_ratio": {"q_proj": torch.tensor(math.nan)},
    }


def test_a_line_of_steps():
    line = step_line(3, 1e-4, record(), 1.0)
    assert line == {
        "step": 3, "loss": 1.0, "learning_rate": 1e-4, "grad_norm": 0.5, "clipped": False, "grad_norms": {"q_proj": 0.5},
        "update_ratio": {"q_proj": None},
    }  # fmt: skip
    assert step_line(3, 1e-4, record(norm=1.5), 1.0)["clipped"] is True
    assert step_line(3, 1e-4, record(norm=1.5), 0.0)["clipped"] is False
    broken = step_line(3, 1e-4, record(math.nan, math.inf), 1.0)
    assert broken["loss"] is broken["grad_norm"] is broken["grad_norms"]["q_proj"] is None
    json.dumps(broken, allow_nan=False)


def test_a_run_equals_its_trial_and_writes_every_step(ground, tmp_path):
    here, told = ground(), []
    made = make_run(here, named_arm("loran:tanh"), 5, tmp_path / "run", lambda *a: told.append(a))
    trial = here.trial(named_arm("loran:tanh"), 5)
    steps = lines(tmp_path / "run" / "steps.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 13))
    for i, line in enumerate(steps):
        assert line["learning_rate"] == pytest.approx(1e-2 * ((i + 1) / 4 if i < 3 else (12 - i) / 9))
        assert line["loss"] == trial.step(here.source.batch(5, i))["loss"].item()
    assert [step for step, _ in told] == [4, 8, 12] and told[-1][1] == steps[-1]["loss"]
    assert [line["step"] for line in lines(tmp_path / "run" / "presence.jsonl")] == [0, 4, 8, 12]
    path = load_file(tmp_path / "run" / "path.safetensors")
    assert path["steps"].tolist() == [0, 4, 8, 12] and path["sketches"][0].abs().max() == 0
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (written["status"], written["steps"], written["seed"]) == ("completed", 12, 5)
    assert written["heldout"] == {"loss": None, "accuracy": None} and written["presence"] and written["spectra"]
    assert written["sharpness"] is None  # the weights are random
    assert written["trainable_parameters"] == trial.trainable_parameters == made["trainable_parameters"]
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 8 and written["seconds"] > 0


@pytest.mark.parametrize("arm", ["qlora", "loran:sinter", "full"])
def test_a_run_that_is_lost_ends_early_and_says_so(ground, tmp_path, arm):
    here = ground(steps=60, looks=2, learning_rate=3e37, warmup=0)
    made = make_run(here, named_arm(arm), 0, tmp_path / "run", lambda *a: None)
    steps = lines(tmp_path / "run" / "steps.jsonl")
    lost = sum(line["loss"] is None for line in steps)
    assert steps[0]["loss"] is not None and steps[-1]["loss"] is None
    assert DIVERGED_AFTER <= lost < DIVERGED_AFTER + FLUSH
    assert made["status"] == "diverged" and made["steps"] == len(steps) < 60
    written = json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)
    assert written["status"] == "diverged" and written["spectra"] is None


LOSES = [(arm, steps) for arm in ("qlora", "loran:sinter", "ranlora", "full") for steps in (4, 60)]


@pytest.mark.parametrize(("arm", "steps"), [*LOSES, ("aurora", 60)])  # AuroRA's tanh holds out longer
def test_a_lost_run_is_a_diverged_one_for_every_arm_and_length(ground, tmp_path, arm, steps):
    # with some seeds such weights give losses that are finite, and gradients that are 0
    here = ground(steps=steps, looks=20, learning_rate=3e37, warmup=0)
    made = make_run(here, named_arm(arm), 1, tmp_path / "run", lambda *a: None)
    assert made["status"] == "diverged"
    json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("arm", ["qlora", "loran:sinter", "ranlora", "aurora", "full"])
def test_recomputed_activations_give_the_same_steps(ground, arm):
    plain, recomputing = (ground(checkpointing=flag) for flag in (False, True))
    trials = [here.trial(named_arm(arm), 3) for here in (plain, recomputing)]
    inner = trials[1].model if arm == "full" else trials[1].model.get_base_model()
    assert inner.is_gradient_checkpointing
    for step in range(4):
        one, two = (trial.step(plain.source.batch(3, step), observe=True) for trial in trials)
        assert one["loss"].item() == two["loss"].item() and one["grad_norm"].item() > 0
        for kind, norm in one["grad_norms"].items():
            assert norm.item() == pytest.approx(two["grad_norms"][kind].item(), rel=1e-6)


def test_what_an_earlier_run_left_is_removed(ground, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "steps.jsonl").write_text('{"step": 99}\n')
    make_run(ground(steps=2, looks=0, spectra=False), named_arm("qlora"), 0, tmp_path / "run", lambda *a: None)
    assert [line["step"] for line in lines(tmp_path / "run" / "steps.jsonl")] == [1, 2]
    assert not (tmp_path / "run" / "presence.jsonl").exists()
