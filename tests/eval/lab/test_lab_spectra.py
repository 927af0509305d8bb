"""Updates against what the layers really add, and spectra against hand-made matrices and torch's SVD in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import curvelora
from curvelora.errors import UserError
from curvelora_eval.lab.presence import capture_inputs
from curvelora_eval.lab.spectra import base_subspaces, by_module_type, spectra, spectrum, spectrum_of_factors
from curvelora_eval.lab.updates import (
    adapted_layers,
    base_weight,
    best_linear_map,
    factors,
    update_factors,
    update_weight,
)

torch.set_num_threads(1)
COMMON = {"r": 3, "target_modules": ["q_proj", "up_proj"]}
OWN = {**COMMON, "alpha": 6, "dropout": 0.0}
LINEAR = {
    "lora": lambda: LoraConfig(**COMMON, lora_alpha=6),
    "loran tanh": lambda: curvelora.LoranConfig(activation="tanh", **OWN),
    "loran sinter": lambda: curvelora.LoranConfig(amplitude=0.3, frequency=40.0, **OWN),
    "ranlora identity": lambda: curvelora.RanloraConfig(activation="identity", **OWN),
    "aurora static": lambda: curvelora.AuroraConfig(mode="static", **OWN),
}
NONLINEAR = {
    "ranlora": lambda: curvelora.RanloraConfig(**OWN),
    "ranlora K": lambda: curvelora.RanloraConfig(init="K", **OWN),
    "aurora": lambda: curvelora.AuroraConfig(**OWN),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(d, k, seed=seed)).Q


class Net(nn.Module):
    """Odd, non-square layers, one of them stored the other way round, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.up_proj, self.head = nn.Linear(13, 7), Conv1D(11, 7), nn.Linear(11, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.up_proj(torch.tanh(self.q_proj(x)))))


class FullLinear(nn.Linear):
    """As full fine-tuning has it."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.register_buffer("initial_weight", self.weight.detach().clone())


def adapted(make: object, moved: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    nn.init.normal_(net.up_proj.weight, std=0.4)
    model = get_peft_model(net, make())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if moved and parameter.requires_grad and "modules_to_save" not in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def added(layer: nn.Module, x: Tensor) -> Tensor:
    """What the adapter adds to the layer's output."""
    with torch.no_grad():
        return layer(x) - layer.get_base_layer()(x)


# --- updates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LINEAR)
def test_the_update_is_what_a_linear_method_adds(method):
    for name, layer in adapted_layers(adapted(LINEAR[method])).items():
        d_in, d_out = {"q_proj": (13, 7), "up_proj": (7, 11)}[name]
        x, update = draw(20, d_in).float(), update_weight(layer)
        assert update.shape == (d_out, d_in) and update.dtype == torch.float32
        expected = added(layer, x)
        assert (x @ update.T - expected).norm() < 1e-5 * expected.norm()
        pair = update_factors(layer)
        assert (pair is None) == method.startswith("loran")
        if pair is not None:
            assert torch.allclose(pair[1] @ pair[0], update)


def test_lora_is_as_peft_has_it():
    for name, layer in adapted_layers(adapted(LINEAR["lora"])).items():
        peft = layer.get_delta_weight("default")
        assert torch.allclose(update_weight(layer), peft.T if name == "up_proj" else peft, rtol=1e-6)
        A, B = factors(layer)
        assert (A.shape, B.shape) == ((3, layer.in_features), (layer.out_features, 3)) and not A.requires_grad


@pytest.mark.parametrize("method", NONLINEAR)
def test_a_nonlinear_bottleneck_is_replaced_by_its_least_squares_map(method):
    for layer in adapted_layers(adapted(NONLINEAR[method])).values():
        x = (0.7 * draw(60, layer.in_features) + 0.4).float()
        with pytest.raises(ValueError, match="give inputs"):
            update_weight(layer)
        A, B = (t.double().numpy() for t in factors(layer))
        removed = layer.removed("default")
        C = 0 if removed is None else (removed[1].double() @ removed[0].double()).numpy()
        # from the layer's outputs alone: B m(z) = added + C x, and B has full column rank
        z = x.double().numpy() @ A.T
        outputs = added(layer, x).double().numpy() + (x.double().numpy() @ C.T if removed is not None else 0)
        m = outputs @ np.linalg.pinv(B).T
        solution, *_ = np.linalg.lstsq(np.concatenate([z, np.ones((60, 1))], 1), m, rcond=None)
        L, c = solution[:-1].T, solution[-1]

        found = best_linear_map(layer, x)
        assert np.allclose(found.matrix.numpy(), L, atol=2e-4 * np.abs(L).max())
        assert np.allclose(found.intercept.numpy(), c, atol=2e-4 * np.abs(m).max())
        left = (60 / 56) ** 0.5 * np.linalg.norm(m - z @ L.T - c) / np.linalg.norm(m)
        assert found.residual == pytest.approx(left, rel=1e-2) and left > 0.01
        assert found.intercept_share == pytest.approx(np.linalg.norm(c) * 60**0.5 / np.linalg.norm(m), rel=1e-3)
        expected = B @ L @ A - C
        difference = np.linalg.norm(update_weight(layer, x).double().numpy() - expected)
        assert difference < 1e-3 * np.linalg.norm(expected)


def test_a_linear_bottleneck_is_its_own_best_linear_map():
    layer = adapted_layers(adapted(LINEAR["ranlora identity"]))["q_proj"]
    found = best_linear_map(layer, draw(40, 13).float() + 1)
    expected = torch.diag(2 * layer.ranlora_v["default"].detach().double())
    assert torch.allclose(found.matrix, expected, atol=1e-5)
    assert found.residual < 1e-5 and found.intercept_share < 1e-5


def test_inputs_may_have_any_leading_shape_but_must_be_enough():
    layer = adapted_layers(adapted(NONLINEAR["aurora"]))["q_proj"]
    x = draw(4, 5, 13).float()
    assert torch.equal(update_weight(layer, x), update_weight(layer, x.reshape(20, 13)))
    with pytest.raises(UserError, match="needs at least 5 tokens, found 4"):
        update_weight(layer, x[0, :4])


def test_measuring_does_not_count_as_training():
    from curvelora.grid_monitor import GridMonitor

    model = adapted(NONLINEAR["aurora"]).train()
    monitor, layer = GridMonitor(model), adapted_layers(model)["q_proj"]
    update_weight(layer, draw(20, 13).float())
    assert monitor.take() is None and layer.training


def test_layers_have_the_names_of_the_base_and_heads_are_left_out():
    model = adapted(lambda: LoraConfig(**COMMON, modules_to_save=["head"]))
    assert list(adapted_layers(model)) == ["q_proj", "up_proj"]
    assert adapted_layers(model, "another") == {}
    assert adapted_layers(Net()) == {}
    net = Net()
    net.head = FullLinear(11, 3)  # which would count as an update of its own
    assert list(adapted_layers(net)) == ["head"]
    wrapped = get_peft_model(net, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["head"]))
    assert list(adapted_layers(wrapped)) == ["q_proj"]


def test_full_fine_tuning():
    model = nn.ModuleDict({"a": FullLinear(5, 3), "b": nn.Linear(3, 3)})
    before = model["a"].weight.detach().clone()
    model["a"].weight.data += 0.5
    (layer,) = adapted_layers(model).values()
    assert torch.allclose(update_weight(layer), torch.full((3, 5), 0.5)) and torch.equal(base_weight(layer), before)
    assert factors(layer) is None and update_factors(layer) is None
    with pytest.raises(ValueError, match="no adapter"):
        update_weight(model["b"])


def test_the_update_of_dora_is_not_s_b_a():
    layer = adapted_layers(adapted(lambda: LoraConfig(r=3, target_modules=["q_proj"], use_dora=True)))["q_proj"]
    with pytest.raises(UserError, match="use_dora: false"):
        update_weight(layer)


@pytest.mark.parametrize("method", ["lora", "loran tanh"])
def test_the_base_weight(method):
    model = adapted(LINEAR[method])
    layers = adapted_layers(model)
    x = torch.eye(7)
    base = layers["up_proj"].get_base_layer()
    assert torch.allclose(base_weight(layers["up_proj"]), (base(x) - base.bias).T, atol=1e-6)
    model.merge_adapter()
    with pytest.raises(UserError, match="merged"):
        base_weight(layers["q_proj"])


@pytest.mark.parametrize("method", ["lora", "loran tanh"])
def test_a_quantised_base_weight_is_dequantised(method):
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(64, 128)
    four_bit = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32)
    four_bit.load_state_dict(linear.state_dict())
    model = get_peft_model(nn.ModuleDict({"q_proj": four_bit.to("cpu")}), LINEAR[method]())
    (layer,) = adapted_layers(model).values()
    found = base_weight(layer)
    outputs = four_bit(torch.eye(64)) - four_bit.bias
    assert found.shape == (128, 64) and found.dtype == torch.float32 and torch.allclose(found.T, outputs, atol=1e-6)
    assert 0.02 < (found - linear.weight).norm() / linear.weight.norm() < 0.2


def test_inputs_are_collected_without_padding():
    model = adapted(NONLINEAR["aurora"]).train()
    x, mask = draw(2, 6, 13).float(), torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    found = capture_inputs(model, {"x": x, "attention_mask": mask})
    assert torch.equal(found["q_proj"], torch.cat([x[0], x[1, 4:]])) and model.training
    with torch.no_grad():
        expected = torch.tanh(model.eval().base_model.model.q_proj(x[1, 4:]))
    assert torch.allclose(found["up_proj"][6:], expected, atol=1e-6)
    assert torch.equal(capture_inputs(model, {"x": x}, tokens=3)["q_proj"], x.reshape(12, 13)[[0, 6, 11]])
    assert capture_inputs(model, {"x": x}).keys() == {"q_proj", "up_proj"}


# --- spectra -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 9), (23, 9), (9, 23)])
def test_a_known_spectrum(shape):
    values = torch.tensor([4.0, 2.0, 2.0, 1.0, 1e-3], dtype=torch.float64)
    update = orthogonal(shape[0], 5) @ torch.diag(values) @ orthogonal(shape[1], 5, seed=1).T
    found = spectrum(update, rank=2)
    assert found["frobenius"] == pytest.approx(math.sqrt(25 + 1e-6), rel=1e-12)
    assert found["spectral"] == pytest.approx(4, rel=1e-12)
    assert found["stable_rank"] == pytest.approx((25 + 1e-6) / 16, rel=1e-12)
    p = (values / values.sum()).numpy()
    assert found["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-10)
    assert found["energy_beyond_rank"] == pytest.approx((5 + 1e-6) / (25 + 1e-6), rel=1e-12)
    assert found["next_after_rank"] == pytest.approx(0.5, rel=1e-12)
    assert found["singular_values"] == pytest.approx([1, 0.5, 0.5, 0.25, 2.5e-4, 0, 0, 0, 0], abs=1e-14)
    assert "overlap_top_left" not in found


def test_ranks_of_equal_singular_values_are_their_number():
    found = spectrum(orthogonal(30, 6) @ orthogonal(20, 6, seed=1).T, rank=6)
    assert found["stable_rank"] == pytest.approx(6, rel=1e-12)
    assert found["effective_rank"] == pytest.approx(6, rel=1e-10)
    assert found["energy_beyond_rank"] < 1e-28 and found["next_after_rank"] < 1e-14


def test_a_dense_matrix_has_the_singular_values_of_torch():
    update = draw(40, 31)
    found, exact = spectrum(update, rank=4), torch.linalg.svdvals(update)
    assert len(found["singular_values"]) == 24
    assert found["singular_values"] == pytest.approx((exact / exact[0])[:24].tolist(), rel=1e-12)
    assert found["energy_beyond_rank"] == pytest.approx((exact[4:].square().sum() / exact.square().sum()).item())
    assert spectrum(update, rank=31)["next_after_rank"] is None


@pytest.mark.parametrize(("d_out", "q", "d_in"), [(31, 3, 18), (5, 8, 19), (19, 8, 5), (7, 7, 7)])
def test_factors_have_the_spectrum_of_their_product(d_out, q, d_in):
    A, B, base = draw(q, d_in), draw(d_out, q, seed=1), draw(d_out, d_in, seed=2)
    one = spectrum_of_factors(A, B, scale=0.25, rank=3, base=base)
    other = spectrum(0.25 * B @ A, rank=3, base=base)
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert one[key] == pytest.approx(value, rel=1e-9, abs=1e-13), key


def test_a_small_tail_survives_fp32_factors():
    """Singular values of BA six decades apart; a Gram matrix in fp32 would lose them."""
    values = torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)
    A, B = (orthogonal(50, 3).T * values[:, None]).float(), orthogonal(40, 3, seed=1).float()
    assert spectrum_of_factors(A, B)["singular_values"][:3] == pytest.approx(values.tolist(), rel=1e-4)
    assert spectrum_of_factors(A, B)["energy_beyond_rank"] == 0
    assert spectrum_of_factors(A, B)["next_after_rank"] == 0


def along(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return sum((3 - i) * torch.outer(u, v) for i, (u, v) in enumerate(zip(left, right, strict=True)))


def test_overlaps_of_hand_made_subspaces():
    base = torch.zeros(6, 5, dtype=torch.float64)
    base.fill_diagonal_(1)
    base *= torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    e, f = torch.eye(6, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    keys = ["overlap_top_left", "overlap_top_right", "overlap_tail_left", "overlap_tail_right"]

    def overlaps(update: Tensor, rank: int = 2) -> list[float]:
        found = spectrum(update, rank, base=base)
        assert found["chance_left"] == pytest.approx(found["overlap_rank"] / 6)
        assert found["chance_right"] == pytest.approx(found["overlap_rank"] / 5)
        return [found[key] for key in keys]

    assert overlaps(along([e[1], e[0]], [f[0], f[1]])) == pytest.approx([1, 1, 0, 0], abs=1e-12)
    assert overlaps(along([e[3], e[4]], [f[3], f[4]])) == pytest.approx([0, 0, 1, 1], abs=1e-12)
    # outputs and inputs are told apart; e_5 is in no singular vector of the base
    assert overlaps(along([e[0], e[5]], [f[3], f[2]])) == pytest.approx([0.5, 0, 0, 0.5], abs=1e-12)
    tilted = (f[0] + 2 * f[3]) / 5**0.5
    assert overlaps(along([e[0], e[1]], [tilted, f[2]])) == pytest.approx([1, 0.1, 0, 0.4], abs=1e-12)
    # an update of rank one has one direction, which is compared with one
    one = torch.outer(e[0], f[0])
    assert spectrum(one, 2, base=base)["overlap_rank"] == 1 and overlaps(one) == pytest.approx([1, 1, 0, 0], abs=1e-12)
    assert overlaps(torch.outer(e[4], f[1])) == pytest.approx([0, 0, 1, 0], abs=1e-12)
    # also where the subspaces have more directions than it
    found = spectrum(torch.outer(e[4], f[0]), 3, subspace=base_subspaces(base, 3))
    assert [found[key] for key in keys] == pytest.approx([0, 1, 1, 0], abs=1e-12)


def test_random_updates_overlap_by_chance():
    own = base_subspaces(draw(20, 30, seed=999), 4)
    found = [spectrum_of_factors(draw(4, 30, seed=i), draw(20, 4, seed=1000 + i), subspace=own) for i in range(200)]
    for side, d in (("left", 20), ("right", 30)):
        assert {f[f"chance_{side}"] for f in found} == {4 / d}
        for end in ("top", "tail"):
            values = np.array([f[f"overlap_{end}_{side}"] for f in found])
            assert abs(values.mean() - 4 / d) < 4 * values.std() / math.sqrt(200) < 0.1 * 4 / d


def test_nothing_to_describe():
    base = draw(4, 3)
    zero = spectrum(torch.zeros(4, 3), 2, base=base)
    assert (zero.pop("frobenius"), zero.pop("spectral")) == (0.0, 0.0)
    assert zero.keys() == spectrum(base, 2, base=base).keys() - {"frobenius", "spectral"}
    assert set(zero.values()) == {None}
    assert spectrum_of_factors(draw(2, 3), torch.zeros(4, 2))["frobenius"] == 0.0
    broken = draw(4, 3)
    broken[1, 1] = math.nan
    assert set(spectrum(broken, 2).values()) == {None}
    assert set(spectrum_of_factors(broken[:, :3], draw(5, 4)).values()) == {None}
    with pytest.raises(ValueError, match="at least 1"):
        spectrum(base, 0)


def test_spectra_of_a_model():
    lora = spectra(adapted(LINEAR["lora"]), 3)
    assert {name: list(record) for name, record in lora.items()} == {"q_proj": ["update"], "up_proj": ["update"]}
    model = adapted(LINEAR["loran sinter"])
    found = spectra(model, 3)
    for name, layer in adapted_layers(model).items():
        A, B = (t.double() for t in factors(layer))
        u = B @ A
        base = layer.get_base_layer().weight.detach()
        base = base.T if name == "up_proj" else base
        for key, update in (("BA", 2 * u), ("update", 2 * (u + 0.3 * u * torch.sin(40 * u)))):
            expected = spectrum(update, 3, base=base)
            for field, value in expected.items():
                assert found[name][key][field] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, key, field)
        assert found[name]["BA"]["next_after_rank"] == 0 and found[name]["update"]["next_after_rank"] > 1e-3


def test_spectra_of_a_nonlinear_model():
    model = adapted(NONLINEAR["ranlora"])
    with pytest.raises(ValueError, match="give inputs"):
        spectra(model, 3)
    inputs = capture_inputs(model, {"x": draw(40, 13).float()})
    found = spectra(model, 3, inputs)["q_proj"]
    layer = adapted_layers(model)["q_proj"]
    exact = torch.linalg.svdvals(update_weight(layer, inputs["q_proj"]).double())
    assert found["update"]["spectral"] == pytest.approx(exact[0].item(), rel=1e-5)
    # the removed part doubles the rank
    assert found["update"]["next_after_rank"] == pytest.approx((exact[3] / exact[0]).item(), rel=1e-4)
    assert found["BA"]["energy_beyond_rank"] == 0 and 0 < found["linear_map"]["residual"] < 1


def test_chosen_layers_and_given_subspaces():
    model = adapted(LINEAR["loran tanh"])
    layer = adapted_layers(model)["up_proj"]
    whole = spectra(model, 3, layers=["up_proj"])
    assert list(whole) == ["up_proj"]
    assert spectra(model, 3, layers=["up_proj"], subspaces={"up_proj": base_subspaces(base_weight(layer), 3)}) == whole
    without = spectra(model, 3, layers=["up_proj"], base_overlap=False)["up_proj"]["update"]
    assert without == {key: whole["up_proj"]["update"][key] for key in without} and "overlap_rank" not in without
    with pytest.raises(ValueError, match="no adapted layer is called k_proj"):
        spectra(model, 3, layers=["k_proj"])


def test_means_by_module_type():
    def record(value: float | None, next_one: float | None = 0.5) -> dict:
        values = None if value is None else [1.0]
        return {"update": {"stable_rank": value, "next_after_rank": next_one, "singular_values": values}}

    layers = {
        "layers.0.q_proj": record(1.0),
        "layers.1.q_proj": {**record(4.0, None), "BA": {"stable_rank": 3.0}},
        "layers.0.v_proj": record(None, None),
    }
    assert by_module_type(layers) == {
        "q_proj": {"update": {"stable_rank": 2.5, "next_after_rank": 0.5}, "BA": {"stable_rank": 3.0}, "layers": 2},
        "v_proj": {"update": {"stable_rank": None, "next_after_rank": None}, "layers": 1},
    }
