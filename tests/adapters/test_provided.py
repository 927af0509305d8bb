"""Methods that PEFT provides: what the registry builds is what PEFT's own config builds, and the explained name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, get_peft_model

from curvelora import METHODS, cli, get_method
from curvelora.registry import EXPLAINED

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
# method -> (recipe options, PEFT's config written by hand)
BY_HAND: dict[str, tuple[dict[str, Any], PeftConfig]] = {
    "rslora": ({"r": 4, "alpha": 8}, peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, **TARGETS)),
    "dora": (
        {"r": 4, "alpha": 8, "dropout": 0.1},
        peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, use_dora=True, **TARGETS),
    ),
    "adalora": (
        {"init_r": 6, "target_r": 3, "alpha": 32, "total_step": 50, "tinit": 5},
        peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=32, total_step=50, tinit=5, orth_reg_weight=0.1, **TARGETS),
    ),
    "fourierft": (
        {"n_frequency": 60, "scaling": 100.0},
        peft.FourierFTConfig(n_frequency=60, scaling=100.0, random_loc_seed=777, **TARGETS),
    ),
    "delora": (
        {"r": 4, "dropout": 0.1},
        peft.DeloraConfig(r=4, delora_lambda=15, module_dropout=0.1, **TARGETS),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_registry_builds_what_pefts_config_builds(llama, token_ids, name):
    options, by_hand = BY_HAND[name]
    built = []
    for config in (METHODS[name].build_config(**options, **TARGETS), by_hand):
        torch.manual_seed(0)
        built.append((get_peft_model(llama(), config).train(), config))
    (ours, config), (peft_s, _) = built
    assert config.to_dict() == by_hand.to_dict()
    assert str(ours) == str(peft_s)
    assert all(type(a) is type(b) for a, b in zip(ours.modules(), peft_s.modules(), strict=True))
    found, wanted = ours.state_dict(), peft_s.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    torch.manual_seed(1)
    logits = ours(token_ids).logits
    torch.manual_seed(1)
    assert torch.equal(logits, peft_s(token_ids).logits)


def test_adalora_waits_for_its_steps(llama):
    """The config can be built before the run is known, and never runs without its steps."""
    config = METHODS["adalora"].build_config(**TARGETS)
    assert config.total_step is None
    model = get_peft_model(llama(), config)
    with pytest.raises(TypeError):
        model.base_model.update_and_allocate(1)
    with pytest.raises(ValueError, match=r"tinit \+ tfinal = 0 leaves none of the 0 steps"):
        METHODS["adalora"].build_config(total_step=0)


@pytest.mark.parametrize("name", EXPLAINED)
def test_a_name_that_is_explained_is_no_method(capsys, name):
    with pytest.raises(ValueError, match=r"2405\.17357") as caught:
        get_method(name)
    said = str(caught.value)
    assert name not in METHODS and "\n" not in said
    assert all(part in said for part in ("not implemented here", "2402.09353", "take dora", "AuroRA"))
    assert cli.main(["methods", name]) == 0
    assert " ".join(capsys.readouterr().out.split()) == f"{said}."
    assert cli.main(["methods", name, "--json"]) == 2


def test_dora_points_to_the_other_one(capsys):
    assert cli.main(["methods", "dora"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Two methods are called DoRA" in shown and "curvelora methods dora_dynamic" in shown
