"""Every f and f' against formulas written a second time, and what half precision leaves of Sinter (methods.md 3.4)."""

from __future__ import annotations

import math

import pytest
import torch

from curvelora.activations import ALIASES, NAMES, Activation, canonical_name
from curvelora.errors import UserError

A, W = 5e-5, 1e4  # the published amplitude and frequency


def logistic(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


# name -> (f, f') as scalar Python functions, written from methods.md 3.2 and not from the package
FORMULAS = {
    "identity": (lambda x: x, lambda x: 1.0),
    "sinter": (lambda x: A * x * math.sin(W * x) + x, lambda x: 1 + A * math.sin(W * x) + A * W * x * math.cos(W * x)),
    "tanh": (math.tanh, lambda x: 1 - math.tanh(x) ** 2),
    "sigmoid": (logistic, lambda x: logistic(x) * (1 - logistic(x))),
    "relu": (lambda x: max(0.0, x), lambda x: float(x > 0)),
    "silu": (lambda x: x * logistic(x), lambda x: logistic(x) + x * logistic(x) * (1 - logistic(x))),
    "swish": (
        lambda x: x * logistic(25 * x),
        lambda x: logistic(25 * x) + 25 * x * logistic(25 * x) * (1 - logistic(25 * x)),
    ),
    "cos": (lambda x: x * math.cos(W * x) + x, lambda x: math.cos(W * x) - W * x * math.sin(W * x) + 1),
    "gaussian": (lambda x: 0.5 * x * math.exp(-x * x), lambda x: 0.5 * math.exp(-x * x) * (1 - 2 * x * x)),
}
# f(0), f'(0): the table of methods.md 3.2
AT_ZERO = {
    "identity": (0, 1),
    "sinter": (0, 1),
    "tanh": (0, 1),
    "sigmoid": (0.5, 0.25),
    "relu": (0, 0),
    "silu": (0, 0.5),
    "swish": (0, 0.5),
    "cos": (0, 2),
    "gaussian": (0, 0.5),
}


def values_of_many_magnitudes(n: int = 400, low: float = -7, high: float = 1) -> torch.Tensor:
    """Log-uniform |x| from 10^low to 10^high, both signs, fp64. Not 0: relu's kink is tested by the table."""
    generator = torch.Generator().manual_seed(0)
    x = 10 ** (low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64))
    return torch.cat([x, -x])


def test_the_tables_of_this_file_cover_every_activation():
    assert set(FORMULAS) == set(AT_ZERO) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_slope_follow_the_formula(name):
    x, activation = values_of_many_magnitudes(), Activation(name)
    for computed, formula in zip((activation.value(x), activation.slope(x)), FORMULAS[name], strict=True):
        expected = torch.tensor([formula(v) for v in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative_that_autograd_finds(name):
    x, activation = values_of_many_magnitudes().requires_grad_(), Activation(name)
    value = activation.value(x)
    derivative = torch.autograd.grad(value.sum(), x)[0]
    torch.testing.assert_close(activation.slope(x).detach(), derivative, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_slope_at_zero(name):
    activation = Activation(name)
    assert (activation.value_at_zero, activation.slope_at_zero) == AT_ZERO[name]
    # PyTorch's autograd agrees at the kink of relu as well: that zero is why relu with B = 0 never trains
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(activation.value(x).sum(), x)[0].item() == AT_ZERO[name][1]


def test_amplitude_and_frequency_belong_to_sinter_and_cos_only():
    x = values_of_many_magnitudes()
    for name in NAMES:
        plain, loud, fast = Activation(name), Activation(name, amplitude=0.1), Activation(name, frequency=10.0)
        assert torch.equal(plain.value(x), loud.value(x)) == (name != "sinter")
        assert torch.equal(plain.value(x), fast.value(x)) == (name not in ("sinter", "cos"))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sin", "sinter"),
        ("Sin", "sinter"),
        ("Sinter", "sinter"),
        ("swish-25", "swish"),
        ("Swish-25", "swish"),
        ("swish-1", "silu"),
    ],
)
def test_aliases_are_the_same_function(written, meant):
    assert canonical_name(written) == meant
    assert Activation(written) == Activation(meant)  # equal and hashable: a constant of the autograd function
    assert hash(Activation(written)) == hash(Activation(meant))


def test_every_alias_leads_somewhere():
    assert set(ALIASES.values()) <= set(NAMES)


@pytest.mark.parametrize(
    ("written", "near"), [("sintre", "sinter"), ("gausian", "gaussian"), ("swsh", "swish"), ("tanhh", "tanh")]
)
def test_unknown_name_names_the_nearest(written, near):
    with pytest.raises(UserError, match=f"unknown activation '{written}'; did you mean '{near}'") as caught:
        Activation(written)
    assert all(name in str(caught.value) for name in NAMES)


def sinter_inputs(dtype: torch.dtype) -> torch.Tensor:
    """A million values, log-uniform |x| in 1e-5..1e-1, both signs, as methods.md 3.4 draws them."""
    return values_of_many_magnitudes(500_000, -5, -1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinter_at_the_published_setting_is_the_identity_in_half_precision(dtype):
    """|f(x) - x| <= 5e-5 |x|, and half a unit in the last place is 2.4e-4 |x| (fp16) or 2e-3 |x| (bf16) or more."""
    x = sinter_inputs(dtype)
    assert torch.equal(Activation("sinter").value(x), x)
    # ... also when f itself is exact and only its result is rounded, which is what reaches a half-precision product
    assert torch.equal(Activation("sinter").value(x.double()).to(dtype), x)


def test_sinter_at_the_published_setting_is_there_in_fp32():
    """methods.md 3.4: 0.00 to 0.06 % of the values stay what they were, in every decade."""
    x = sinter_inputs(torch.float32)
    changed = Activation("sinter").value(x) != x
    assert changed.float().mean() > 0.999
    for decade in range(-5, -1):
        here = (x.abs() >= 10.0**decade) & (x.abs() < 10.0 ** (decade + 1))
        assert changed[here].float().mean() > 0.999


def test_a_louder_sinter_survives_bf16():
    """The control: above an amplitude of 2e-3 half precision sees the function, so the test above is not vacuous."""
    x = sinter_inputs(torch.bfloat16)
    assert (Activation("sinter", amplitude=2e-2).value(x.float()).to(torch.bfloat16) != x).float().mean() > 0.5
