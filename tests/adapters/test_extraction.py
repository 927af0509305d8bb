"""The nearest LoRA of an update: against a full SVD, cases that can be worked out by hand, and every kind of adapter."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from curvelora import (
    AuroraConfig,
    LoranConfig,
    MosloraConfig,
    NeatConfig,
    OloraConfig,
    PissaConfig,
    RanloraConfig,
    SineloraConfig,
)
from curvelora.errors import UserError
from curvelora.extraction import nearest_factors, rank_for, squared_singular_values, weight_change

SHAPES = [(40, 40), (53, 37), (37, 53), (5, 3), (1, 7), (7, 1), (1, 1)]


def matrix(d_out: int, d_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_as_a_truncated_svd(shape):
    """Product, error and energies; the error is the best possible one (Eckart and Young)."""
    W = matrix(*shape)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(squared_singular_values(W), S.square(), rtol=0, atol=1e-13 * S[0].item() ** 2)
    for k in {1, max(1, len(S) // 3), len(S)}:
        found = nearest_factors(W, k, "w", torch.float64)
        assert found.A.shape == (k, shape[1]) and found.B.shape == (shape[0], k)
        assert found.A.dtype == found.B.dtype == torch.float64
        torch.testing.assert_close(found.B @ found.A, (U[:, :k] * S[:k]) @ Vt[:k], rtol=0, atol=1e-11)
        assert found.norm == pytest.approx(S.norm().item(), rel=1e-12)
        assert found.error == pytest.approx(S[k:].norm().item(), rel=1e-9, abs=1e-13 * found.norm)
        # each factor has half of every singular value
        torch.testing.assert_close(found.A.norm(dim=1), S[:k].sqrt(), rtol=1e-9, atol=0)
        torch.testing.assert_close(found.B.norm(dim=0), S[:k].sqrt(), rtol=1e-9, atol=0)


def test_a_case_by_hand():
    """diag(3, 2, 1): norm sqrt(14); rank 1 keeps 9/14 and misses sqrt(5), rank 2 keeps 13/14 and misses 1."""
    W = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    assert squared_singular_values(W).tolist() == pytest.approx([9, 4, 1])
    first, second = nearest_factors(W, 1, "w"), nearest_factors(W, 2, "w")
    assert (first.norm, first.error, second.error) == pytest.approx((math.sqrt(14), math.sqrt(5), 1))
    assert second.relative_error == pytest.approx(1 / math.sqrt(14))
    torch.testing.assert_close(second.B @ second.A, torch.diag(torch.tensor([0.0, 3.0, 2.0])))


def test_the_rank_that_keeps_an_energy():
    squares = torch.tensor([9.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    cases = {0.5: 1, 9 / 14 - 1e-9: 1, 9 / 14 + 1e-9: 2, 0.92: 2, 0.93: 3, 1 - 1e-10: 3}
    assert {energy: rank_for(squares, energy) for energy in cases} == cases
    assert rank_for(torch.zeros(3, dtype=torch.float64), 0.999) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_rounded_factors(dtype):
    """At full rank nothing but the rounding is left: at most twice the spacing of the dtype, once for each factor."""
    W = matrix(24, 17)
    found = nearest_factors(W, 17, "w", dtype)
    assert found.A.dtype == found.B.dtype == dtype
    direct = (W - found.B.double() @ found.A.double()).norm() / W.norm()
    assert found.relative_error == pytest.approx(direct.item(), rel=1e-9)
    assert 0 < found.relative_error < 2 * torch.finfo(dtype).eps


def test_small_and_large_updates_in_float16():
    """Halves of the singular values: 1e-6 and 1e6 are out of float16's normal range, their roots are not."""
    for scale in (1e-6, 1e6):
        W = scale * matrix(12, 9)
        assert nearest_factors(W, 9, "w", torch.float16).relative_error < 5e-3
    with pytest.raises(UserError, match="overflow in float16: take bfloat16"):
        nearest_factors(1e12 * matrix(12, 9), 9, "w", torch.float16)


def test_a_zero_update():
    found = nearest_factors(torch.zeros(4, 6), 2, "w")
    assert found.relative_error == found.error == found.norm == 0
    assert not found.A.any() and not found.B.any() and found.A.shape == (2, 6)


def test_a_rank_that_a_layer_has_not():
    with pytest.raises(UserError, match=r"rank 4 is not between 1 and min\(d_in, d_out\)=3 of module 'q' \(5 x 3\)"):
        nearest_factors(matrix(5, 3), 4, "q")
    with pytest.raises(UserError, match="rank 0 is not between 1"):
        nearest_factors(matrix(5, 3), 0, "q")


class Net(nn.Module):
    """A linear layer with odd sizes, a transposed one, and what is not linear."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(15, 9, bias=bias)
        self.square = nn.Linear(12, 12)
        self.transposed = Conv1D(9, 15)  # d_out, d_in
        self.embedding = nn.Embedding(6, 15)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.transposed(x)


def adapted(config: peft.PeftConfig, std: float = 0.3, **net) -> nn.Module:
    """A `Net` whose every trained tensor does something, in evaluation mode."""
    torch.manual_seed(1)
    model = get_peft_model(Net(**net), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn_like(parameter)
    return model.base_model.model


LINEAR = {
    "loran": LoranConfig(r=3, alpha=6, target_modules=["linear", "transposed"]),
    "aurora static": AuroraConfig(r=3, mode="static", target_modules=["linear", "transposed"]),
    "ranlora identity": RanloraConfig(r=3, activation="identity", target_modules=["linear", "transposed"]),
    "neat": NeatConfig(r=3, depth=1, target_modules=["linear", "transposed"]),
    "moslora": MosloraConfig(r=3, target_modules=["linear", "transposed"]),
    "pissa": PissaConfig(r=3, target_modules=["linear", "transposed"]),
    "olora": OloraConfig(r=3, target_modules=["linear", "transposed"]),
    "sinelora": SineloraConfig(r=3, target_modules=["linear", "transposed"]),
    "lora": peft.LoraConfig(r=3, target_modules=["linear", "transposed"]),
    "rslora": peft.LoraConfig(r=3, use_rslora=True, target_modules=["linear", "transposed"]),
    "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=["linear", "transposed"]),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["linear"]),
    "fourierft": peft.FourierFTConfig(n_frequency=20, target_modules=["linear", "transposed"]),
    "delora": peft.DeloraConfig(r=3, target_modules=["linear"]),
    "peanut": peft.PeanutConfig(r=3, target_modules=["linear"]),
    "loha": peft.LoHaConfig(r=3, target_modules=["linear"]),
    "lokr": peft.LoKrConfig(r=3, target_modules=["linear"]),
    "vera": peft.VeraConfig(r=3, target_modules=["linear"]),
    "oft": peft.OFTConfig(oft_block_size=5, target_modules=["linear"]),
    "hra": peft.HRAConfig(r=2, target_modules=["linear"]),
    "hira": peft.HiraConfig(r=3, target_modules=["linear"]),
    "ia3": peft.IA3Config(target_modules=["linear"], feedforward_modules=["linear"]),
}
# the rank by construction; what an init takes out, B0 A0, counts as well
RANK = dict.fromkeys(["aurora static", "neat", "moslora", "lora", "rslora", "adalora", "delora", "vera"], 3)
RANK |= dict.fromkeys(["ranlora identity", "pissa", "olora"], 6)


@pytest.mark.parametrize("name", LINEAR)
def test_the_weight_change_of_every_kind_acts_as_the_adapter(name):
    model = adapted(copy.deepcopy(LINEAR[name]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = matrix(6, 15, seed=3).float()
    for target in ("linear", "transposed"):
        layer = getattr(model, target)
        if not isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            continue
        delta = weight_change(layer, target)
        assert delta.shape == (9, 15) and delta.dtype == torch.float64
        change = layer(x) - layer.get_base_layer()(x)
        assert change.norm() > 1e-2
        torch.testing.assert_close(x @ delta.float().T, change, rtol=1e-4, atol=1e-4 * change.abs().max().item())
        if rank := RANK.get(name):
            assert nearest_factors(delta, rank, target, torch.float64).relative_error < 1e-7
            assert nearest_factors(delta, rank, target).relative_error < 3e-7
            assert rank_for(squared_singular_values(delta), 1 - 1e-10) <= rank
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())  # and nothing was merged


def test_the_update_of_a_small_adapter_on_a_bfloat16_base_keeps_its_digits():
    """The base's own dtype would swallow it: an update of 1e-4 of the weight, formed in fp64."""
    model = adapted(LoranConfig(r=2, target_modules=["linear"], activation="identity"))
    model.linear.base_layer.bfloat16()
    model.linear.loran_B["default"].data *= 1e-4
    wanted = model.linear.delta_weight("default").double()
    assert wanted.norm() < 1e-3 * model.linear.base_layer.weight.norm()
    found = weight_change(model.linear, "linear")
    assert (found - wanted).norm() / wanted.norm() < 1e-6


@pytest.mark.parametrize(
    ("config", "target", "said"),
    [
        (RanloraConfig(r=3, target_modules=["linear"]), "linear", "cannot be merged: phi acts on A x"),
        (AuroraConfig(r=3, target_modules=["linear"]), "linear", "merges only approximately"),
        (peft.LoraConfig(r=3, target_modules=["embedding"]), "embedding", "module 'embedding' is of type Embedding"),
        (peft.LoraConfig(r=3, target_modules=["linear"], lora_bias=True), "linear", "changes the bias of module"),
        (peft.IA3Config(target_modules=["linear"], feedforward_modules=[]), "linear", "changes the bias of module"),
        (
            peft.LilyConfig(r=3, target_modules=["linear"]),
            "linear",
            "module 'linear' cannot be formed .*not supported for Lily",
        ),
        (peft.PolyConfig(r=3, target_modules=["linear"]), "linear", "module 'linear' cannot be formed .*task_ids"),
    ],
    ids=["ranlora", "aurora dynamic", "embedding", "lora with bias", "ia3 on outputs", "lily", "poly"],
)
def test_what_no_lora_equals_is_refused(config, target, said):
    with pytest.raises(UserError, match=said):
        weight_change(getattr(adapted(config), target), target)


def test_an_adapter_that_does_not_act_as_its_merged_weight_is_refused(monkeypatch):
    """Whatever its method says: outputs are compared, here with those of a layer that squares them."""
    model = adapted(peft.LoraConfig(r=3, target_modules=["linear"]))
    forward = type(model.linear).forward
    monkeypatch.setattr(type(model.linear), "forward", lambda self, x: forward(self, x).square())
    with pytest.raises(UserError, match="'linear' does not act as its merged weight does"):
        weight_change(model.linear, "linear")


def test_a_quantised_or_merged_layer_is_refused():
    linear = adapted(LoranConfig(r=2, target_modules=["linear"])).linear
    linear.merge()
    with pytest.raises(UserError, match="module 'linear' holds a merged adapter"):
        weight_change(linear, "linear")
    linear.unmerge()
    linear.base_layer.weight = nn.Parameter(torch.zeros(9, 15, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="module 'linear' holds a quantised weight"):
        weight_change(linear, "linear")


def test_an_update_that_is_not_finite_is_refused():
    model = adapted(LoranConfig(r=2, target_modules=["linear"]))
    model.linear.loran_B["default"].data[0, 0] = torch.nan
    with pytest.raises(UserError, match="module 'linear' has NaN or infinite"):
        weight_change(model.linear, "linear")
