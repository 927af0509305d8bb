"""LoRAN's layers: fused where they can be, eager elsewhere, the same function both ways.

Bound: eager and fused passes differ in where bf16 rounds (W or two products, G and M); measured: 6e-3 at most.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from kernel_world import FusedProducts, Small, agree, base_layer, normal, step
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from curvelora import LoranConfig, UserError
from curvelora.kernels import use_kernels
from curvelora.kernels.choice import why_not
from curvelora.kernels.dropout import mask_reference, new_seed
from curvelora.methods.loran import LoranLayer

BOUND = 1.2e-2
Mode = Callable[[str], None]


def layer_of(device: torch.device, base: str = "nf4", *, bias: bool = False, **options: object) -> LoranLayer:
    """(96, 128), with an update as large as the base's weights."""
    layer = LoranLayer(base_layer(device, base, 96, 128, bias=bias), "layer")
    settings = {"r": 8, "alpha": 16, "amplitude": 2e-2, "dropout": 0.0, "init_B_std": 0.02} | options
    torch.manual_seed(4)
    layer.add_adapter("default", LoranConfig(**settings))
    return layer


def model_of(device: torch.device, base: str = "nf4", **options: object) -> nn.Module:
    """`Small` with an adapter on both layers."""
    settings = {"r": 8, "alpha": 16, "amplitude": 2e-2, "dropout": 0.0, "init_B_std": 0.02} | options
    torch.manual_seed(4)
    return get_peft_model(Small(device, base), LoranConfig(target_modules=["up", "down"], **settings))


def fused(model: nn.Module, x: Tensor, **call: object) -> int:
    """How many fused products a pass under bf16 autocast makes."""
    with torch.autocast(x.device.type, torch.bfloat16), FusedProducts() as products, torch.no_grad():
        model(x.clone().requires_grad_(), **call)
    return products.count


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"scale_position": "inside"},
        {"activation": "identity"},
        {"activation": "silu"},
        {"dropout": 0.3, "dropout_form": "exact"},
        {"dropout": 0.3, "dropout_form": "features"},
        {"dropout": 0.3, "dropout_form": "exact", "activation": "identity"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_fused_and_eager_are_one_function(
    device: torch.device, kernels_mode: Mode, base: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same seed, same dropout; output and gradients, for inputs in fp32 (dtype of the output included)."""
    layer, x = layer_of(device, base, **options).train(), normal(device, 3, 16, 128).float()
    assert fused(layer, x) == 1
    found = step(layer, x, seed=5)
    kernels_mode("off")
    assert fused(layer, x) == 0
    if options.get("dropout_form") == "exact":  # whose mask is the kernels' own
        draw = lambda x, p: (x * mask_reference(x.shape, new_seed(x.device), p)).to(x.dtype)  # noqa: E731
        monkeypatch.setattr("torch.nn.functional.dropout", draw)
    agree(found, step(layer, x, seed=5), BOUND)


def test_inputs_in_bf16_need_no_autocast(device: torch.device, kernels_mode: Mode) -> None:
    layer, x = layer_of(device), normal(device, 16, 128).requires_grad_()
    found = layer(x)
    kernels_mode("off")
    agree({"y": found}, {"y": layer(x)}, BOUND)


@pytest.mark.parametrize("form", ["exact", "features"])
def test_dropout_is_off_in_evaluation(device: torch.device, form: str) -> None:
    x, layer = normal(device, 16, 128), layer_of(device, dropout=0.5, dropout_form=form)
    wanted = step(layer_of(device), x)
    agree(step(layer.eval(), x), wanted, 1e-6)
    training = step(layer.train(), x)
    assert (training["y"] - wanted["y"]).norm() > 0.1 * wanted["y"].norm()
    agree(step(layer, x), training, 1e-6)  # and the same seed drops the same


def test_the_fused_pass_does_what_the_config_of_the_active_adapter_says(device: torch.device) -> None:
    """Two adapters of one layer, one after the other, each as in a layer of its own."""
    layer, x = layer_of(device), normal(device, 16, 128)
    other = LoranConfig(r=4, alpha=4, activation="tanh", dropout=0.0, init_B_std=0.02)
    layer.add_adapter("other", other)
    layer.set_adapter("other")
    A, B = layer.factors("other")
    alone = layer_of(device, r=4, alpha=4, activation="tanh")
    for own, value in zip(alone.factors("default"), (A, B), strict=True):
        own.data.copy_(value)
    assert fused(layer, x) == 1
    assert torch.equal(layer(x), alone(x))
    layer.set_adapter("default")
    assert fused(layer, x) == 1
    assert not torch.equal(layer(x), alone(x))


def test_compiled_layers_are_one_graph(device: torch.device) -> None:
    layer, x = layer_of(device), normal(device, 16, 128)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, wanted = step(compiled, x), step(layer, x)
    agree({name.removeprefix("_orig_mod."): value for name, value in found.items()}, wanted, 1e-6)


# --- where they cannot be ---------------------------------------------------------------------------------------------


def eager_too(model: nn.Module, x: Tensor, kernels_mode: Mode, **call: object) -> None:
    """No fused product is made, and the numbers are the eager ones, bit for bit."""
    assert fused(model, x, **call) == 0
    with torch.autocast(x.device.type, torch.bfloat16):
        found = model(x.requires_grad_(), **call)
        kernels_mode("off")
        assert torch.equal(found, model(x, **call))


@pytest.mark.parametrize(
    "options",
    [
        {"learn": "both"},
        {"amplitude_schedule": {"kind": "anneal", "share": 0.5}},
        {"activation": "fourier", "learn": "amplitude"},
    ],
)
def test_an_f_that_has_no_kernel(device: torch.device, kernels_mode: Mode, options: dict[str, object]) -> None:
    layer = layer_of(device, **options)
    assert layer.why_no_kernels() == "f is learned or has a schedule"
    eager_too(layer, normal(device, 16, 128), kernels_mode)


def test_two_active_adapters(device: torch.device, kernels_mode: Mode) -> None:
    layer = layer_of(device)
    layer.add_adapter("other", LoranConfig(r=4, dropout=0.0, init_B_std=0.02))
    layer.set_adapter(["default", "other"])
    assert layer.why_no_kernels() == "not one active adapter"
    eager_too(layer, normal(device, 16, 128), kernels_mode)


def test_disabled_and_merged_adapters(device: torch.device, kernels_mode: Mode) -> None:
    """Disabled the layer is its base; merged the weight has the update; and unmerged it is fused as before."""
    model, x = model_of(device, "bf16"), normal(device, 16, 64)
    before = step(model, x)
    with model.disable_adapter():
        assert fused(model, x) == 0
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(model(x), Small(device, "bf16")(x))
    model.merge_adapter()
    assert fused(model, x) == 0
    with torch.autocast(device.type, torch.bfloat16):
        assert 0 < (model(x) - before["y"]).norm() / before["y"].norm() < BOUND
    model.unmerge_adapter()
    assert fused(model, x) == 2
    agree(step(model, x), before, 1e-6)


def test_a_batch_of_several_adapters(device: torch.device, kernels_mode: Mode) -> None:
    model = model_of(device).eval()
    model.add_adapter("other", LoranConfig(r=4, dropout=0.0, init_B_std=0.02, target_modules=["up"]))
    eager_too(model, normal(device, 3, 5, 64), kernels_mode, adapter_names=["default", "other", "__base__"])


def test_inputs_and_factors_of_other_types(device: torch.device, kernels_mode: Mode) -> None:
    """fp32 without autocast, factors in bf16, and no rows are eager passes."""
    layer, x = layer_of(device), normal(device, 16, 128)
    with FusedProducts() as products:
        layer(x.float().requires_grad_())
        layer(x[:0].requires_grad_())
        layer.to(torch.bfloat16)(x.requires_grad_())
    assert products.count == 0


def test_what_a_base_must_be(device: torch.device) -> None:
    """Each reason is one sentence part, with the number that is wrong."""
    cases = {
        "a base in float32": nn.Linear(64, 64, device=device),
        "a Identity has no weight that kernels read": nn.Identity(),
        "the base is neither in 4 bits nor a linear layer in bf16": nn.Bilinear(64, 1, 64, device=device, dtype=torch.bfloat16),
    }
    cases["the base is neither in 4 bits nor a linear layer in bf16"].out_features = 64
    cases["the base is neither in 4 bits nor a linear layer in bf16"].in_features = 64
    for reason, base in cases.items():
        assert why_not(base.requires_grad_(False), 8) == reason
    assert why_not(base_layer(device, "nf4", 96, 128), 129) == "rank 129 is above 128"
    narrow = base_layer(device, "nf4", 64, 96)
    assert why_not(narrow, 8) == "rows of 96 weights in blocks of 64: whole blocks of 64 are read"
    huge = base_layer(device, "bf16", 64, 64)
    huge.out_features, huge.in_features = 1 << 20, 1 << 11
    offloaded = base_layer(device, "bf16", 64, 64)
    offloaded._hf_hook = object()
    assert why_not(offloaded, 8) == "the base layer has hooks, perhaps one that brings its weight"
    assert why_not(huge, 8) == "1048576 x 2048 entries, and 2^31 is the limit"
    assert why_not(nn.Linear(64, 64, device="meta", dtype=torch.bfloat16).requires_grad_(False), 8) == "on meta"


def test_a_model_that_is_cast_or_moved_is_asked_again(device: torch.device) -> None:
    """`nn.Module.to` keeps the parameter and changes what it is."""
    layer = nn.Linear(64, 64, device=device, dtype=torch.bfloat16).requires_grad_(False)
    weight = layer.weight
    assert why_not(layer, 8) is None
    assert why_not(layer.float(), 8) == "a base in float32" and layer.weight is weight
    assert why_not(layer.bfloat16(), 8) is None
    assert why_not(layer.to("meta"), 8) == "on meta"


def test_switched_off_and_on(device: torch.device, kernels_mode: Mode) -> None:
    model, x = model_of(device), normal(device, 16, 64)
    assert use_kernels(model, "off") == (0, {"kernels: off": 2}) and fused(model, x) == 0
    assert use_kernels(model) == (2, {}) and fused(model, x) == 2
    kernels_mode("off")
    assert use_kernels(model) == (0, {"CURVELORA_KERNELS=off": 2}) and fused(model, x) == 0
    with pytest.raises(UserError, match=r"kernels 'of' is not known.*off.*write auto, off, fp8"):
        use_kernels(model, "of")


def test_an_unknown_word_in_the_environment(device: torch.device, kernels_mode: Mode) -> None:
    model, x = model_of(device), normal(device, 16, 64)
    kernels_mode("of")
    with pytest.raises(UserError, match=r"CURVELORA_KERNELS='of' is not known.*write auto, off, interpret"):
        model(x)


def test_a_cpu_takes_kernels_only_when_told(kernels_mode: Mode) -> None:
    kernels_mode("auto")
    model = model_of(torch.device("cpu"))
    assert use_kernels(model) == (0, {"on a CPU": 2})
    assert fused(model, normal(torch.device("cpu"), 16, 64)) == 0


# --- models -----------------------------------------------------------------------------------------------------------


def test_copies_saving_and_loading(device: torch.device, tmp_path) -> None:
    model, x = model_of(device), normal(device, 16, 64)
    names = set(model.state_dict())
    use_kernels(model)
    assert set(model.state_dict()) == names
    wanted = step(model, x)
    agree(step(copy.deepcopy(model), x), wanted, 1e-6)
    model.save_pretrained(tmp_path)
    agree(step(PeftModel.from_pretrained(Small(device), tmp_path, is_trainable=True), x), wanted, 1e-6)


def test_training_goes_down_the_same_way(device: torch.device, kernels_mode: Mode) -> None:
    """Four steps of Adam from the published start, B = 0: losses of both paths stay together."""
    x, losses = normal(device, 24, 128), {}
    for mode in ("auto", "off"):
        layer = layer_of(device, init_B_std=0.0)
        use_kernels(layer, mode)
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 1e-2)
        losses[mode] = []
        for _ in range(4):
            with torch.autocast(device.type, torch.bfloat16):
                loss = (layer(x).float() - 0.3).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[mode].append(loss.item())
    assert losses["auto"][-1] < 0.8 * losses["auto"][0], losses
    torch.testing.assert_close(losses["auto"], losses["off"], rtol=2e-2, atol=0)
