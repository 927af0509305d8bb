"""Schedules of amplitude and frequency: factors, what a saved adapter keeps, LoRA at amplitude 0, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from curvelora import LoranConfig, UserError, model_resolvability
from curvelora.reference_path import reference_path
from curvelora.schedules import read_schedule, set_schedule_position

ANNEAL = {"kind": "anneal", "share": 0.8}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"kind": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"kind": "warmup", "share": 0.5}, [0.0, 0.5, 1.0, 1.0]),
        ({"kind": "warmup", "steps": 25, "start": 0.2, "end": 2.0}, [0.2, 2.0, 2.0, 2.0]),
        ({"kind": "anneal", "share": 1}, [1.0, 0.75, 0.5, 0.0]),
        ({"kind": "anneal", "steps": 50, "end": 0.1}, [1.0, 0.55, 0.1, 0.1]),
        ({"kind": "cosine", "share": 0.5}, [1.0, 0.5, 0.0, 0.0]),
    ],
    ids=str,
)
def test_factors_over_a_run_of_100_steps(option, expected):
    schedule = read_schedule("amplitude_schedule", option)
    found = [schedule.factor(fraction, 100) for fraction in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx(expected, abs=1e-15) and found[-1] == expected[-1]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("warmup", r"must be a mapping such as \{kind: warmup, share: 0.1\}, not 'warmup'"),
        ({"share": 0.1}, "must be a mapping such as"),
        ({"kind": "warm"}, "amplitude_schedule.kind must be one of constant, warmup, anneal, cosine"),
        ({"kind": "anneal", "shar": 1}, "has no key 'shar'; did you mean 'share'"),
        ({"kind": "anneal"}, "needs its length, as either steps or share"),
        ({"kind": "anneal", "steps": 5, "share": 0.5}, "as either steps or share"),
        ({"kind": "anneal", "steps": 2.5}, "steps must be a whole number of at least 1, not 2.5"),
        ({"kind": "anneal", "share": 1.5}, "not 1.5: a longer schedule would never end"),
        ({"kind": "anneal", "share": 0.5, "end": -1}, "amplitude_schedule.end must be a factor of at least 0, not -1"),
        ({"kind": "constant", "share": 0.5}, "constant has no other key, and share was given"),
    ],
    ids=str,
)
def test_what_is_no_schedule_is_refused(option, said):
    with pytest.raises(UserError, match=said) as caught:
        LoranConfig(amplitude_schedule=option)
    assert "\n" not in str(caught.value)


def test_other_activations_have_nothing_to_schedule():
    with pytest.raises(UserError, match=r"frequency_schedule needs one of sinter, .*not activation cos"):
        LoranConfig(activation="cos", frequency_schedule=ANNEAL)


def test_constant_is_no_schedule(loran_layer):
    """The fixed path, with no tensor more."""
    layer = loran_layer(37, 53, r=3, amplitude_schedule={"kind": "constant"})
    assert not layer.configs["default"].has_tensors and len(list(layer.tensors("default"))) == 2
    assert not set_schedule_position(layer, 0.5)


@pytest.mark.parametrize("position", ["outside", "inside"])
@pytest.mark.parametrize("learn", ["none", "both"])
def test_the_layer_follows(loran_layer, plain_delta_weight, learn, position):
    """dW is that of an adapter with the scheduled amplitude and frequency; at amplitude 0 it is LoRA's, bit for bit."""
    options = {"r": 3, "alpha": 6, "amplitude": 0.1, "frequency": 500.0, "scale_position": position}
    schedules = {"amplitude_schedule": ANNEAL, "frequency_schedule": {"kind": "warmup", "steps": 10, "start": 0.5}}
    layer = loran_layer(37, 53, learn=learn, **options, **schedules)
    A, B = (factor.detach() for factor in layer.factors("default"))
    for fraction, a, w in [(None, 0.1, 250.0), (0.2, 0.075, 500.0), (0.8, 0.0, 500.0)]:
        if fraction is not None:
            assert set_schedule_position(layer, fraction, 50) == 1
        config = LoranConfig(**(options | {"amplitude": a, "frequency": w}))
        expected = plain_delta_weight(A.double(), B.double(), config).float()
        torch.testing.assert_close(layer.delta_weight("default").detach(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(layer.delta_weight("default"), 2 * (B @ A))
    assert model_resolvability(torch.nn.Sequential(layer), torch.float32)["0"].forward == 0
    x = torch.randn(3, 37)
    with reference_path(torch.nn.Sequential(layer)):
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ (2 * (B @ A)).T)


def test_compiled_it_follows_without_compiling_again(loran_layer):
    layer = loran_layer(37, 53, r=3, amplitude=0.1, amplitude_schedule=ANNEAL)
    x = torch.randn(3, 37)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for fraction in (0.0, 0.3, 1.0):
        set_schedule_position(layer, fraction)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_saved_adapter_is_what_it_was(llama, token_ids, tmp_path, low_memory):
    options = {"r": 3, "dropout": 0.0, "amplitude": 0.2, "init_B_std": 0.05, "target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoranConfig(**options, amplitude_schedule=ANNEAL)).eval()
    start = model(token_ids).logits
    assert set_schedule_position(model, 0.6) == 4
    expected = model(token_ids).logits
    assert not torch.equal(start, expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["amplitude_schedule"] == ANNEAL
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(loaded(token_ids).logits, expected)


def test_merging_an_annealed_adapter_is_merging_lora(llama, tmp_path):
    options = {"r": 3, "dropout": 0.0, "init_B_std": 0.05, "target_modules": ["q_proj", "v_proj"]}
    merged = []
    for own in ({"amplitude": 0.2, "amplitude_schedule": ANNEAL}, {"activation": "identity"}):
        torch.manual_seed(0)
        model = get_peft_model(llama(), LoranConfig(**options, **own))
        set_schedule_position(model, 1.0)
        merged.append(model.merge_and_unload().state_dict())
    assert all(torch.equal(merged[0][name], value) for name, value in merged[1].items())


def test_only_active_adapters_move(llama):
    options = {"r": 2, "target_modules": ["q_proj"], "amplitude_schedule": ANNEAL}
    model = get_peft_model(llama(), LoranConfig(**options))
    model.add_adapter("second", LoranConfig(**options))
    set_schedule_position(model, 1.0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.loran_schedule["default"].tolist() == [0.0, 1.0]
    assert layer.loran_schedule["second"].tolist() == [1.0, 1.0]


def test_a_position_that_is_none_is_refused(loran_layer):
    layer = loran_layer(37, 53, r=3, amplitude_schedule={"kind": "warmup", "steps": 5})
    with pytest.raises(UserError, match=r"a fraction of the run, 0 to 1, not 1.5"):
        set_schedule_position(layer, 1.5)
    with pytest.raises(UserError, match="counts 5 steps: say how many the run has"):
        set_schedule_position(layer, 0.5)


@pytest.mark.parametrize("steps", [0, -5, 2.5, True])
def test_a_number_of_steps_that_is_none_is_refused(loran_layer, steps):
    layer = loran_layer(37, 53, r=3, amplitude_schedule={"kind": "warmup", "steps": 5})
    with pytest.raises(UserError, match="total_steps must be a whole number of at least 1"):
        set_schedule_position(layer, 0.5, steps)
