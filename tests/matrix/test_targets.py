"""Which modules get an adapter, and of which rank, on which backbone; and bad input, in one sentence."""

from __future__ import annotations

import models
import pytest
import torch
from cases import MAIN, OURS, those_with
from models import IDS, PIXELS, adapted_layers, llama, logits, relative, tensors_of, train_a_little, trainable
from peft import PeftModel, get_peft_model
from refusals import (
    LAYERS_OF_A_PATTERN,
    NOT_LINEAR,
    NOTHING_LEFT,
    QUANTISED_WITHOUT_WEIGHT,
    RANK_ABOVE_LAYER,
)

every_method = pytest.mark.parametrize("case", MAIN, ids=str)
our_methods = pytest.mark.parametrize("case", OURS, ids=str)
Q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
V = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
ATTENTION = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"]
MLP = [f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up", "down")]
WAYS = {
    "PEFT's default": ({"target_modules": None}, Q + V),
    "a list": ({}, Q + V),
    "a list with a path": ({"target_modules": ["layers.1.self_attn.q_proj"]}, Q[1:]),
    "a regular expression": ({"target_modules": r".*\.1\.self_attn\.(q|v)_proj"}, [Q[1], V[1]]),
    "all-linear": ({"target_modules": "all-linear"}, ATTENTION + MLP),
    "all-linear but": (
        {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "up_proj", "down_proj"]},
        ATTENTION,
    ),
    "a list but a pattern": ({"exclude_modules": r".*\.0\..*"}, [Q[1], V[1]]),
    "layers_to_transform": ({"layers_to_transform": [1]}, [Q[1], V[1]]),
    "layers_pattern": ({"layers_to_transform": [0], "layers_pattern": "layers"}, [Q[0], V[0]]),
}


@pytest.mark.cell("targets", "`target_modules`, `exclude_modules`, `layers_to_transform`: the modules that were named")
@every_method
@pytest.mark.parametrize("way", WAYS)
def test_targets(case, way):
    """On the plain Llama: which modules are chosen does not depend on how the base is stored."""
    options, expected = WAYS[way]
    model = get_peft_model(llama(), case.config(**options))
    assert sorted(adapted_layers(model)) == sorted(expected)


@pytest.mark.cell("targets", "`rank_pattern` and `alpha_pattern`, also after loading")
@pytest.mark.parametrize("case", those_with("rank"), ids=str)
def test_patterns(case, ids, tmp_path, device):
    options = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}}
    if case.has("alpha"):
        options |= {"alpha_pattern": {"v_proj": 32}}
    model = train_a_little(get_peft_model(llama(), case.config(**options))).to(device)
    layers = adapted_layers(model)
    ranks = {name: tensors_of(layer)["A"].shape[0] for name, layer in layers.items()}
    assert ranks == {Q[0]: 2, Q[1]: 4, V[0]: 4, V[1]: 4}
    # alpha is not a tensor: v's update is 32 / 8 times that of a model without the pattern and with the same tensors
    plain = get_peft_model(llama(), case.config(rank_pattern=options["rank_pattern"])).to(device)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 128, device=device)
    for name, factor in ((V[0], 4.0), (Q[1], 1.0)) if case.has("alpha") else ():
        with torch.no_grad():
            with_pattern, without = (
                layer(x) - layer.base_layer(x) + removed(layer, x)
                for layer in (layers[name].eval(), adapted_layers(plain)[name].eval())
            )
        torch.testing.assert_close(with_pattern, factor * without, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).to(device)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def removed(layer, x: torch.Tensor) -> torch.Tensor | float:
    """C x, which has no scale."""
    t = tensors_of(layer)
    return x @ t["A0"].T @ t["B0"].T if "A0" in t else 0.0


@pytest.mark.cell("targets", "`modules_to_save`: a head trains in full and is saved with the adapter")
@every_method
def test_modules_to_save(case, tmp_path, device):
    options = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    model = train_a_little(get_peft_model(models.bert(), case.config(**options))).to(device)
    assert sum("classifier" in name for name in trainable(model)) == 2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.bert(), tmp_path).to(device)
    ids = IDS.to(device)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert relative(logits(loaded, ids), logits(models.bert().to(device), ids)) > 1e-3


BACKBONES = {
    "decoder": (models.llama, ["q_proj", "v_proj"], {"input_ids": IDS, "labels": IDS}),
    "encoder": (models.bert, ["query", "value"], {"input_ids": IDS, "labels": torch.tensor([0, 2])}),
    "encoder-decoder": (models.t5, ["q", "v"], {"input_ids": IDS, "labels": IDS}),
    "ViT": (
        models.vit,
        r".*attention.*\.(q_proj|v_proj|query|value)",
        {"pixel_values": PIXELS, "labels": torch.tensor([0, 2])},
    ),
}


@pytest.mark.cell("targets", "backbone {backbone}: a step lowers the loss, saving and loading give the same outputs")
@every_method
@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone(case, backbone, tmp_path, device):
    build, targets, batch = BACKBONES[backbone]
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    model = train_a_little(get_peft_model(build(), case.config(target_modules=targets))).to(device).eval()
    optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad.abs().max() > 0 for p in trainable(model).values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path).to(device).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.cell("bad input", "a layer for which the method is not defined")
@our_methods
@pytest.mark.parametrize("target", ["embed_tokens", "input_layernorm"])
def test_not_linear(case, target, refused):
    with refused(NOT_LINEAR) as caught:
        get_peft_model(llama(), case.config(target_modules=[target]))
    assert target in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.cell("bad input", "a rank above what a layer has")
@our_methods
def test_rank_above_the_layer(case, refused):
    with refused(RANK_ABOVE_LAYER) as caught:
        get_peft_model(llama(), case.config(r=65))
    assert "r=65" in str(caught.value) and "=64 of module 'model.layers.0.self_attn.v_proj'" in str(caught.value)


@pytest.mark.cell("bad input", "a refused adapter leaves nothing behind, and the next one trains alone")
@our_methods
def test_after_a_refusal(case, base, ids, refused):
    """q_proj takes rank 65 and v_proj does not; PEFT would find q_proj adapted already and keep the whole base training."""
    base, before = base(case), logits(base(case), ids)
    with refused(RANK_ABOVE_LAYER):
        get_peft_model(base, case.config(r=65))
    assert not adapted_layers(base) and torch.equal(logits(base, ids), before)
    model = get_peft_model(base, case.config())
    assert all(".default" in name for name in trainable(model))
    state, names = {n: t.clone() for n, t in model.state_dict().items()}, set(trainable(model))
    with refused(RANK_ABOVE_LAYER):
        model.add_adapter("second", case.config(r=65, target_modules=["k_proj", "q_proj", "v_proj"]))
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[n], t) for n, t in state.items())
    assert set(trainable(model)) == names and list(model.peft_config) == ["default"]
    # a frozen adapter stays frozen, and one of the same name stays as it is
    model.base_model.set_requires_grad("default", False)
    with refused(RANK_ABOVE_LAYER):
        model.add_adapter("second", case.config(r=65, target_modules=["q_proj", "v_proj"]))
    assert not trainable(model)
    own = model.peft_config["default"]
    for name in ("default", "second"):
        with pytest.raises(ValueError, match="typo"):
            get_peft_model(base, case.config(target_modules=["typo"]), adapter_name=name)
    assert list(model.peft_config) == ["default"] and model.peft_config["default"] is own
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())


@pytest.mark.cell("bad input", "layers counted in a pattern, or counted nowhere")
@every_method
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        {"target_modules": r".*q_proj", "layers_to_transform": [0]},
        {"layers_pattern": "layers"},
    ],
    ids=str,
)
def test_layers_of_a_pattern(case, options, refused):
    with refused(LAYERS_OF_A_PATTERN):
        case.config(**options)


@pytest.mark.cell("bad input", "settings that leave nothing to train, or nothing nonlinear")
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (next(c for c in MAIN if c.method == "ranlora"), {"init": "K", "v_init": "zeros"}),
        (next(c for c in MAIN if c.method == "aurora"), {"fixed": False, "learnable": False}),
    ],
    ids=str,
)
def test_nothing_left(case, options, refused):
    with refused(NOTHING_LEFT):
        case.config(**options)


VALUES = {
    "rank 0": ({"r": 0}, "at least 1, not 0|positive integer; got 0"),
    "rank of a half": ({"r": 2.5}, "whole number of at least 1, not 2.5"),
    "alpha 0": ({"alpha": 0}, "positive number, not 0"),
    "alpha NaN": ({"alpha": float("nan")}, "not nan"),
    "alpha a word": ({"alpha": "16"}, "not '16'"),
    "dropout 1": ({"dropout": 1.0}, "below 1, not 1.0"),
    "dropout negative": ({"dropout": -0.1}, "not -0.1"),
    "rank pattern": ({"rank_pattern": {"q": -1}}, "not -1"),
    "rank pattern of a list": ({"rank_pattern": [4]}, "rank_pattern must map"),
    "alpha beyond floats": ({"alpha": 10**400}, "positive number"),
    "activation": ({"activation": "tahn"}, "unknown activation 'tahn'; did you mean 'tanh'"),
    "initial rank 0": ({"init_r": 0}, "at least 1, not 0"),
    "target above": ({"target_r": 12}, "target_r=12 must be below init_r=4"),
    "schedule": ({"total_step": 9, "tinit": 5, "tfinal": 4}, "tinit \\+ tfinal = 9 leaves none of the 9 steps"),
    "schedule backwards": ({"tinit": -1}, "tinit must be a whole number of at least 0, not -1"),
    "interval 0": ({"deltaT": 0}, "deltaT must be a whole number of at least 1, not 0"),
    "average of 1": ({"beta1": 1.0}, "beta1 must be above 0 and below 1, not 1.0"),
    "no frequency": ({"n_frequency": 0}, "at least 1, not 0"),
    "no seed": ({"random_loc_seed": None}, "random_loc_seed must be a whole number, not None"),
    "scaling 0": ({"scaling": 0}, "positive number, not 0"),
    "bound 0": ({"delora_lambda": 0}, "delora_lambda must be a positive number, not 0"),
    "bounds of a list": ({"lambda_pattern": [4]}, "lambda_pattern must map"),
    "unknown option": ({"rnak": 4}, "has no option 'rnak'; did you mean 'rank_pattern'|has no option 'rnak'"),
}


@pytest.mark.cell(
    "bad input", "a value out of its range, a wrong name: one sentence with the value, before any model is touched"
)
@pytest.mark.parametrize(
    ("case", "value"),
    [
        (c, v)
        for v, (o, _) in VALUES.items()
        for c in MAIN
        if v == "unknown option" or o.keys() <= c.entry.option_types().keys()
    ],
    ids=str,
)
def test_values(case, value):
    options, said = VALUES[value]
    with pytest.raises(ValueError, match=said) as caught:
        case.config(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.cell("bad input", "a quantised base without the weight that the factors come from")
@pytest.mark.parametrize("case", [case for case in MAIN if case.method == "ranlora"], ids=str)
def test_quantised_without_weight(case, load_llama, refused):
    base = load_llama("nf4")
    base.config._name_or_path = ""
    with refused(QUANTISED_WITHOUT_WEIGHT):
        get_peft_model(base, case.config())
