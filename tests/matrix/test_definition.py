"""What the registry says of a method is what it does: formula, start, count, gradients, seeds."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases import APART, CASES, MAIN, Case
from counts import MODELS, PUBLISHED, TARGETS
from formulas import FORMULAS
from models import adapted_layers, llama, logits, relative, tensors_of, train_a_little, trainable, with_weight
from peft import get_peft_model
from torch import nn

from curvelora import METHODS

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_method = pytest.mark.parametrize("case", MAIN, ids=str)


def test_every_method_is_in_the_matrix():
    assert {case.method for case in CASES} | APART == set(METHODS)
    assert {case.method for case in CASES} == set(FORMULAS)


def through_the_layer(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """The adapter's part of the output, and the gradients of its tensors and of x, from the layer itself."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y, base = layer(x), layer.base_layer(x)
    y.backward(grad.to(y.dtype))
    with torch.no_grad():
        x_of_base = torch.autograd.functional.vjp(layer.base_layer, x.detach(), grad.to(y.dtype))[1]
    found = {"output": (y - base).detach(), "x": x.grad - x_of_base}
    return found | {n: t.grad for n, t in tensors_of(layer).items() if t.requires_grad}


def through_the_formula(case: Case, layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same from the formula, by plain autograd in fp64."""
    own = with_weight(layer)
    tensors = {n: t.detach().double() for n, t in own.items()}
    learning = {n: t.requires_grad_() for n, t in tensors.items() if own[n].requires_grad}
    x = x.detach().double().requires_grad_()
    added = FORMULAS[case.method](tensors, case.config(), x)
    added.backward(grad.double())
    return {"output": added.detach(), "x": x.grad} | {n: t.grad for n, t in learning.items()}


@pytest.mark.cell("definition", "fp64 reference: output and gradients of the input and of every trained tensor")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for case in CASES
        for dtype in (torch.float64, torch.float32)
        # a quantised base computes in fp32
        if dtype == torch.float32 or (case.has("fp64") and not case.entry.required_quantization)
    ],
    ids=str,
)
def test_formula(case, adapted, device, measure, dtype):
    """q_proj is square, v_proj half as high; the base drops out of the difference."""
    model = adapted(case)
    generator = torch.Generator().manual_seed(2)
    worst = 0.0
    for layer in list(adapted_layers(model).values())[:2]:
        if dtype == torch.float64:
            layer.double()
        x = torch.randn(2, 5, layer.in_features, generator=generator).to(device, dtype)
        grad = torch.randn(2, 5, layer.out_features, generator=generator).to(device, dtype)
        # bitsandbytes rounds in its own way where no gradient is wanted of it; the training path is the exact one
        found = through_the_layer(layer.train(), x, grad)
        wanted = through_the_formula(case, layer, x, grad)
        assert found.keys() == wanted.keys() and len(found) >= 2 + case.tensors
        for name, value in wanted.items():
            if value.norm() == 0:
                assert found[name].norm() == 0, name
            else:
                worst = max(worst, relative(found[name], value))
    measure(f"error against fp64, {'fp64' if dtype == torch.float64 else 'fp32'}", worst)
    # measured: at most 4e-15 in fp64, and in fp32 6e-6, where the output of the base is subtracted again
    assert worst < (1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.cell("definition", "the start is the base model where declared; else the shift is measured")
@every_case
def test_start(case, base, adapted, ids, measure):
    declared = case.entry.identity_at_init(case.config())
    shift = relative(logits(adapted(case, trained=False), ids), logits(base(case), ids))
    measure("change of the logits at the start", shift)
    assert shift < 1e-6 if declared else shift > 1e-3


@pytest.mark.cell("definition", "as many entries train as declared, on square and on narrower layers")
@every_case
def test_count(case, adapted):
    model = adapted(case, trained=False)
    shapes = [(layer.out_features, layer.in_features) for layer in adapted_layers(model).values()]
    assert shapes == 2 * [(128, 128), (64, 128)]
    declared = sum(case.entry.trainable_parameters(case.config(), *shape) for shape in shapes)
    assert sum(p.numel() for p in trainable(model).values()) == declared
    # DeepSpeed sends parameters as bytes, which a transposed view does not have
    assert all(t.is_contiguous() for layer in adapted_layers(model).values() for t in tensors_of(layer).values())


@pytest.mark.cell("definition", "published parameter counts that are right, on the real shapes")
@pytest.mark.parametrize(
    ("model", "method", "options", "expected"),
    PUBLISHED,
    ids=[
        f"{model}-{method}-r{options.get('r', options.get('n_frequency'))}" for model, method, options, _ in PUBLISHED
    ],
)
def test_published_count(model, method, options, expected):
    """Without memory: the model is built on the meta device, and the adapter with it."""
    config_class, values = MODELS[model]
    config = getattr(transformers, config_class)(**values)
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(config)
        targets = {"target_modules": TARGETS[model.partition("-")[0].rstrip("23")]}
        wrapped = get_peft_model(base, METHODS[method].build_config(**(targets | options)))
    assert wrapped.get_nb_trainable_parameters()[0] == expected
    assert all(p.is_meta for p in wrapped.parameters())


@pytest.mark.cell("definition", "every trained tensor has a gradient within two steps, or is a declared exception")
@every_case
def test_gradients_within_two_steps(case, adapted, ids):
    model = adapted(case, trained=False)
    parameters = trainable(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    alive = set()
    for _ in range(2):
        optimizer.zero_grad()
        torch.logsumexp(model(ids).logits, -1).square().sum().backward()
        alive |= {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    dead = {name for name in parameters if name.split(".")[-2] in case.dead}
    assert set(parameters) - alive == dead and bool(dead) == bool(case.dead)


@pytest.mark.cell(
    "definition", "the same seed gives the same start and the same steps, bit for bit; another seed others"
)
@every_method
def test_seeds(case, adapted, ids):
    def two_steps(seed: int) -> list[dict[str, torch.Tensor]]:
        model = adapted(case, trained=False, seed=seed, **({"dropout": 0.3} if case.has("dropout") else {})).train()
        states = [{name: p.detach().clone() for name, p in trainable(model).items()}]
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        return [*states, {name: p.detach().clone() for name, p in trainable(model).items()}]

    first, again, other = two_steps(1), two_steps(1), two_steps(2)
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(first[1][name], other[1][name]) for name in first[1])


def test_the_reference_would_see_a_wrong_formula():
    """The control of the first cell: another rank, scale or function is far outside its bound."""
    case = next(c for c in MAIN if c.method == "loran")
    model = train_a_little(get_peft_model(llama(), case.config()))
    layer = next(iter(adapted_layers(model).values()))
    x, grad = torch.randn(3, 128), torch.randn(3, 128)
    found = through_the_layer(layer, x, grad)
    wrong = through_the_formula(Case("loran", {"r": 4, "alpha": 8, "activation": "tanh"}), layer, x, grad)
    assert relative(found["output"], wrong["output"]) > 1e-3
