"""Arms: what the command line's names mean, and that every name that is wrong is said at once."""

from __future__ import annotations

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
    arm = parse_arms("loran:sinter@fp32")[0]
    assert arm.slug == "loran_sinter_fp32"
    assert Arm(**json.loads(json.dumps(arm.as_dict()))) == arm
