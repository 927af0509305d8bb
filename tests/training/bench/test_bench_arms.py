"""Arms: what the command line's names mean, and that every name that is wrong is said at once."""

from __future__ import annotations

import dataclasses
import json

import pytest

from curvelora.activations import NAMES
from curvelora.errors import UserError
from curvelora_training.bench.arms import DEFAULT_ARMS, Arm, named_arm, parse_arms


def test_the_default_arms_in_their_order():
    arms = parse_arms(DEFAULT_ARMS)
    assert [(a.key, a.method, a.options, a.fp32) for a in arms] == [
        ("qlora", "qlora", {}, False),
        ("loran:identity", "loran", {"activation": "identity"}, False),
        ("loran:sinter", "loran", {"activation": "sinter"}, False),
        ("loran:sinter-large", "loran", {"activation": "sinter", "amplitude": 2e-2}, False),
        ("ranlora", "ranlora", {}, False),
        ("aurora", "aurora", {}, False),
    ]
    assert len({a.label for a in arms}) == 6


@pytest.mark.parametrize("activation", NAMES)
def test_every_activation_is_a_variant_of_loran(activation):
    assert named_arm(f"loran:{activation}").options["activation"] == activation


def test_fp32_is_a_suffix_of_any_arm():
    arm = named_arm("loran:sinter@fp32")
    assert (arm.method, arm.options, arm.fp32, arm.key) == (
        "loran",
        {"activation": "sinter"},
        True,
        "loran:sinter@fp32",
    )
    assert named_arm("full@fp32").fp32 and not named_arm("full").fp32
    assert named_arm("loran:sinter").label != arm.label


def test_switches_stand_behind_any_arm_in_any_order():
    one, two = named_arm("loran:sinter@eager@keep=8@liger"), named_arm("loran:sinter@liger@keep=8@eager")
    assert (one.fp32, one.eager, one.liger, one.keep) == (False, True, True, 8)
    assert dataclasses.replace(two, key=one.key) == one and one.options == {"activation": "sinter"}
    assert one.label == "LoRAN Sinter (a = 5e-5), eager, Liger, products of 8 layers kept"
    assert [named_arm(n).label for n in ("qlora", "qlora@eager@fp32", "full@liger")] == [
        "QLoRA",
        "QLoRA in fp32, eager",
        "full fine-tuning of these layers, Liger",
    ]
    assert named_arm("loran:sinter@fp8@liger").fp8 and not one.fp8
    assert named_arm("loran:sinter@fp8@liger").label == "LoRAN Sinter (a = 5e-5), FP8, Liger"
    own = parse_arms("", ["mine=loran@keep=3@eager,r=8"])[0]
    assert (own.key, own.options, own.keep, own.eager) == ("mine", {"r": 8}, 3, True)
    assert own.label == "mine (LoRAN Sinter (a = 5e-5), r=8), eager, products of 3 layers kept"


def test_own_arms_follow_the_named_ones_and_read_yaml_numbers():
    arms = parse_arms("qlora, lora", ["mine=loran:tanh@fp32,amplitude=1e-3,r=16", "wide=ranlora,r=8"])
    assert [a.key for a in arms] == ["qlora", "lora", "mine", "wide"]
    assert arms[2].options == {"activation": "tanh", "amplitude": 1e-3, "r": 16}
    assert isinstance(arms[2].options["amplitude"], float) and arms[2].fp32 and arms[2].method == "loran"


@pytest.mark.parametrize(
    ("names", "own", "said"),
    [
        ("qlroa", [], ["unknown arm 'qlroa'", "did you mean 'qlora'"]),
        ("loran:sintr", [], ["'loran:sintr'", "did you mean 'sinter'"]),
        ("ranlora:sinter", [], ["'ranlora:sinter'", "no such variant"]),
        ("loran:", [], ["'loran:'", "no such variant"]),
        ("full:x", [], ["'full:x'"]),
        ("qlora@egaer", [], ["arm 'qlora@egaer': there is no switch '@egaer'", "did you mean 'eager'", "@keep=N"]),
        ("qlora@", [], ["there is no switch '@'"]),
        ("qlora@keep", [], ["there is no switch '@keep'", "@keep=N"]),
        ("qlora@keep=0", [], ["there is no switch '@keep=0'"]),
        ("qlora@keep=two", [], ["there is no switch '@keep=two'"]),
        ("qlora@liger=1", [], ["there is no switch '@liger=1'"]),
        ("qlora@eager@eager", [], ["has @eager twice"]),
        ("loran@fp8@eager", [], ["FP8 is in the kernels, which @eager leaves out"]),
        ("linear_probing", [], ["unknown arm 'linear_probing'"]),
        ("", [], ["--arms names no arm"]),
        ("qlora,lora,qlora", [], ["arm 'qlora' is named twice"]),
        ("qlora", ["qlora=lora,r=3"], ["arm 'qlora' is named twice"]),
        ("loran:sinter", ["loran_sinter=lora"], ["'loran:sinter', 'loran_sinter'", "share one folder"]),
        ("qlora", ["mine=loran,ampltude=3"], ["'ampltude'", "did you mean 'amplitude'"]),
        ("qlora", ["mine=loran,r=0"], ["rank must be", "not 0"]),
        ("qlora", ["mine=loran,amplitude=[1"], ["'[1'", "YAML"]),
        ("qlora", ["mine=loran,amplitude"], ["'amplitude' is no option=value"]),
        ("qlora", ["mine=full,r=3"], ["full fine-tuning has no options"]),
        ("qlora", ["mine"], ["NAME=method,option=value"]),
        ("qlora", ["mine="], ["NAME=method,option=value"]),
        ("qlora", ["=lora"], ["NAME=method,option=value"]),
        ("qlora", ["..=lora"], ["NAME=method,option=value"]),
    ],
)
def test_what_is_no_arm_is_refused(names, own, said):
    with pytest.raises(UserError) as caught:
        parse_arms(names, own)
    for part in said:
        assert part in str(caught.value)


def test_all_errors_at_once():
    with pytest.raises(UserError) as caught:
        parse_arms("qlroa,loran:sintr,lora,lora", ["mine=loran,ampltude=3", "x=nothing"])
    for part in ("'qlroa'", "'loran:sintr'", "arm 'lora' is named twice", "'ampltude'", "'nothing'"):
        assert part in str(caught.value)


def test_slugs_are_folder_names_and_arms_are_plain_data():
    arm = parse_arms("loran:sinter@fp32@keep=2")[0]
    assert arm.slug == "loran_sinter_fp32_keep_2"
    assert Arm(**json.loads(json.dumps(arm.as_dict()))) == arm
