"""Sharpness: against the eigenvalues of the whole Hessian, which PyTorch writes out."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from curvelora import AuroraConfig, LoranConfig, RanloraConfig, UserError
from curvelora.reference_path import reference_path
from curvelora_eval.lab.sharpness import adapter_sharpness, top_eigenvalue

torch.set_num_threads(1)

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "lora": LoraConfig(r=1, lora_alpha=2, lora_dropout=0.1, **TARGETS),
    "loran": LoranConfig(r=1, alpha=2, amplitude=2e-2, frequency=100.0, **TARGETS),
    "ranlora": RanloraConfig(r=1, **TARGETS),
    "aurora": AuroraConfig(r=1, alpha=2, **TARGETS),
}


def tiny_llama() -> nn.Module:
    """16 wide, one layer: the Hessian of its adapter can be written out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(10)
    return model


def adapted(method: str) -> nn.Module:
    model = get_peft_model(tiny_llama(), copy.deepcopy(METHODS[method]))
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(seed: int, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(1, 24, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def full_hessian(losses: list, parameters: list[Tensor]) -> Tensor:
    """(n, n), fp64, one row at a time; of the mean of the losses."""
    loss = torch.stack([loss() for loss in losses]).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [
        torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for g in gradient
    ]
    H = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
    return (H + H.T) / 2


def quadratic(spectrum: list[float]):
    """-> loss, parameter: 1/2 x^T H x + b^T x with H of that spectrum in a random basis."""
    n = len(spectrum)
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    H = Q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ Q.T
    x = torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True)
    return lambda: 0.5 * x @ H @ x + x.sum(), x


@pytest.mark.parametrize(
    "spectrum",
    [
        [1.0, 2.0, 3.0, 10.0, 0.0, 0.5],
        [-100.0, -3.0, 0.1, 2.0, 5.0],  # the largest is far smaller in magnitude than the most negative one
        [-5.0, -4.0, -1.0],
        [3.0, 3.0, 3.0, 1.0],  # a repeated one: three steps span all that q_1 reaches
        [7.0],
    ],
)
def test_a_known_spectrum(spectrum):
    loss, x = quadratic(spectrum)
    found = top_eigenvalue(loss, [x], iterations=len(spectrum), tolerance=1e-12)
    assert found["value"] == pytest.approx(max(spectrum), rel=1e-9)
    assert found["smallest"] == pytest.approx(min(spectrum), rel=1e-7, abs=1e-9)
    assert found["converged"] and found["residual"] <= 1e-12 * abs(max(spectrum))


def test_the_residual_is_a_bound_at_every_step_and_shrinks():
    spectrum = [*torch.linspace(-20, 8, 60).tolist(), 9.0, 12.0]
    loss, x = quadratic(spectrum)
    runs = [top_eigenvalue(loss, [x], iterations=m, tolerance=0.0) for m in range(1, 31)]
    values = torch.tensor(spectrum, dtype=torch.float64)
    for m, found in enumerate(runs, 1):
        assert found["iterations"] == m and not found["converged"]
        assert (values - found["value"]).abs().min() <= found["residual"] * (1 + 1e-9)
        assert -20 - 1e-9 <= found["smallest"] <= found["value"] <= 12 + 1e-9
    assert all(a["value"] <= b["value"] + 1e-9 for a, b in itertools.pairwise(runs))
    assert runs[-1]["residual"] < 1e-3 * runs[2]["residual"]
    stopped = top_eigenvalue(loss, [x], iterations=60, tolerance=1e-2)
    assert stopped["converged"] and stopped["iterations"] < 25 and stopped["residual"] <= 0.01 * stopped["value"]
    assert stopped["value"] == pytest.approx(12, rel=1e-3)


def test_long_runs_stay_exact():
    """The recursion alone would find 100 again and again; a negative tolerance never stops early."""
    spectrum = [100.0, *torch.linspace(-1, 1, 39).tolist()]
    loss, x = quadratic(spectrum)
    found = top_eigenvalue(loss, [x], iterations=40, tolerance=-1.0)
    assert found["iterations"] == 40
    assert found["value"] == pytest.approx(100, rel=1e-12) and found["smallest"] == pytest.approx(-1, rel=1e-10)


def toy(seed: int):
    """A two-layer network in fp64 with a loss that is not convex in its weights."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(7, 3, dtype=torch.float64), 3 * torch.randn(7, 2, dtype=torch.float64)) for _ in range(3)]
    return [lambda x=x, y=y: (net(x) - y).square().mean() for x, y in data], list(net.parameters())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_network_against_its_whole_hessian(seed):
    losses, parameters = toy(seed)
    wanted = torch.linalg.eigvalsh(full_hessian(losses, parameters))
    size = sum(p.numel() for p in parameters)
    found = top_eigenvalue(losses, parameters, iterations=size, tolerance=1e-9)
    assert wanted[0] < -1e-3  # not convex, so both ends mean something
    assert found["value"] == pytest.approx(wanted[-1].item(), rel=1e-9)
    exact = top_eigenvalue(losses, parameters, iterations=size, tolerance=0.0)
    assert exact["smallest"] == pytest.approx(wanted[0].item(), rel=1e-6)
    one = top_eigenvalue(losses[0], parameters, iterations=size, tolerance=1e-9)
    assert one["value"] == pytest.approx(
        torch.linalg.eigvalsh(full_hessian(losses[:1], parameters))[-1].item(), rel=1e-9
    )


def test_the_seed_decides_digits_within_the_tolerance_only():
    losses, parameters = toy(0)
    found = [top_eigenvalue(losses, parameters, tolerance=1e-4, seed=seed) for seed in range(4)]
    assert all(f["converged"] for f in found) and len({f["value"] for f in found}) == 4
    assert max(f["value"] for f in found) == pytest.approx(min(f["value"] for f in found), rel=1e-4)
    assert top_eigenvalue(losses, parameters, tolerance=1e-4, seed=2) == found[2]
    narrow = top_eigenvalue(losses, parameters, tolerance=1e-4, dtype=torch.float32)
    assert narrow["value"] == pytest.approx(found[0]["value"], rel=1e-5)


def test_unused_and_linear_parameters_are_flat():
    x, unused, linear = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    found = top_eigenvalue(lambda: 3 * x.square().sum() + linear.sum(), [unused, x, linear], tolerance=1e-12)
    assert found["value"] == pytest.approx(6) and found["smallest"] == pytest.approx(0, abs=1e-12)
    flat = top_eigenvalue(lambda: linear.sum(), [unused, linear])
    assert flat == {"value": 0.0, "smallest": 0.0, "residual": 0.0, "iterations": 1, "converged": True}


def test_a_diverged_loss_has_no_sharpness():
    x = torch.tensor([1.0, math.nan], requires_grad=True)
    found = top_eigenvalue(lambda: x.square().square().sum(), [x])
    assert (found["value"], found["smallest"], found["residual"], found["converged"]) == (None, None, None, False)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_llama(method):
    model = adapted(method).train()
    parameters, batches = trainable(model), [batch(0), batch(1, rows=3)]
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    found = adapter_sharpness(model, batches, iterations=40, tolerance=1e-4)
    assert model.training and all((p.grad == 2).all() and p.requires_grad for p in parameters)
    with reference_path(model):
        wanted = torch.linalg.eigvalsh(full_hessian([lambda b=b: model(**b).loss for b in batches], parameters))
    assert found["converged"] and found["parameters"] == sum(p.numel() for p in parameters) == len(wanted)
    assert found["value"] == pytest.approx(wanted[-1].item(), rel=2e-4) and found["value"] > 1e-2
    assert found["smallest"] >= wanted[0].item() - 1e-3 * wanted[-1].item()
    with torch.no_grad():
        assert adapter_sharpness(model, batches, iterations=40, tolerance=1e-4) == found


def test_a_trained_head_is_left_out():
    config = LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS)
    model = get_peft_model(tiny_llama(), config)
    found = adapter_sharpness(model, [batch(0)], iterations=3)
    assert found["parameters"] == 2 * (16 + 16) + 2 * (16 + 8)  # q_proj and v_proj
    assert any("modules_to_save" in name and p.requires_grad for name, p in model.named_parameters())


def test_refusals():
    model = adapted("lora")
    with pytest.raises(UserError, match="at least one batch"):
        adapter_sharpness(model, [])
    with pytest.raises(UserError, match="no labels"):
        adapter_sharpness(model, [{"input_ids": batch(0)["input_ids"]}])
    with pytest.raises(UserError, match="parameters that train"):
        adapter_sharpness(tiny_llama().requires_grad_(False), [batch(0)])
    with pytest.raises(UserError, match="at least 1, not 0"):
        adapter_sharpness(model, [batch(0)], iterations=0)
