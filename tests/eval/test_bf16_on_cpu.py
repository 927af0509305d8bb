"""bf16 products on CPUs without instructions for them: rounded once, other dtypes untouched; in processes of their own."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from curvelora_eval.bf16_on_cpu import slow_here

CPUINFO = Path("/proc/cpuinfo")
PRELUDE = """
import warnings
warnings.simplefilter("error")
import torch
from curvelora_eval.bf16_on_cpu import round_products_once
torch.manual_seed(0)

def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)

a, b, c = drawn(37, 129), drawn(129, 65), drawn(65)
stacked, other, added = drawn(3, 17, 129), drawn(3, 129, 5), drawn(3, 17, 5)
products = {
    "mm": lambda d: a.to(d) @ b.to(d),
    "mm, both transposed": lambda d: b.to(d).t() @ a.to(d).t(),
    "mm, nothing in between": lambda d: a.to(d)[:, :0] @ b.to(d)[:0],
    "addmm": lambda d: torch.addmm(c.to(d), a.to(d), b.to(d), beta=0.5, alpha=2),
    "linear": lambda d: torch.nn.functional.linear(stacked.to(d), b.to(d).t(), c.to(d)),
    "bmm": lambda d: stacked.to(d) @ other.to(d),
    "baddbmm": lambda d: torch.baddbmm(added.to(d), stacked.to(d), other.to(d), beta=2, alpha=0.5),
}
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_products_are_rounded_once() -> None:
    """Within the unit roundoff of bf16 (2^-8) of fp64 products of the same rounded operands."""
    run("""
round_products_once()
a, b, c, stacked, other, added = (x.bfloat16().double() for x in (a, b, c, stacked, other, added))
for name, product in products.items():
    exact, ours = product(torch.float64), product(torch.bfloat16)
    assert ours.dtype == torch.bfloat16 and ours.shape == exact.shape, name
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-4).all(), name
""")


def test_few_rows_are_left_to_torch() -> None:
    """As in decoding, where a copy of the weight in fp32 would take longer than the product."""
    run("""
few = torch.randn(15, 129).bfloat16(), torch.randn(129, 65).bfloat16(), torch.randn(65).bfloat16()
many = torch.randn(16, 129).bfloat16(), few[1], few[2]
replaced = []
before = [torch.mm(*p[:2]) for p in (few, many)]
round_products_once()
floats = torch.Tensor.float
torch.Tensor.float = lambda t: replaced.append(tuple(t.shape)) or floats(t)
assert torch.equal(torch.mm(*few[:2]), before[0]) and not replaced
torch.addmm(few[2], *few[:2])
torch.bmm(few[0][None], few[1][None])
assert not replaced
torch.mm(*many[:2])
assert replaced == [(16, 129), (129, 65)]
""")


def test_other_dtypes_keep_their_bits_and_errors() -> None:
    run("""
dtypes = (torch.float32, torch.float64, torch.float16)
before = {(name, d): product(d) for name, product in products.items() for d in dtypes}
whole = torch.arange(6).view(2, 3) @ torch.arange(6).view(3, 2)
assert round_products_once() is round_products_once()
for (name, d), expected in before.items():
    assert torch.equal(products[name](d), expected), (name, d)
assert torch.equal(torch.arange(6).view(2, 3) @ torch.arange(6).view(3, 2), whole)
for wrong in (lambda: a.float() @ b.bfloat16(), lambda: a.bfloat16() @ b.float(), lambda: a.bfloat16() @ a.bfloat16()):
    try:
        wrong()
    except RuntimeError:
        continue
    raise AssertionError("accepted")
""")


def test_gradients_and_checkpoints_go_through() -> None:
    run("""
from torch.utils.checkpoint import checkpoint
round_products_once()
for d, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
    layer = torch.nn.Linear(129, 65).to(d)
    exact = torch.nn.Linear(129, 65).double()
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    x = stacked.to(d).requires_grad_()
    y = stacked.to(d).double().requires_grad_()
    checkpoint(layer, x, use_reentrant=False).square().mean().backward()
    exact(y).square().mean().backward()
    for ours, right in ((x.grad, y.grad), (layer.weight.grad, exact.weight.grad), (layer.bias.grad, exact.bias.grad)):
        assert (ours.double() - right).norm() <= bound * right.norm(), d
with torch.inference_mode():
    layer(x)
""")


def test_a_base_in_bf16_asks_for_it_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvelora_eval import models

    asked: list[bool] = []
    monkeypatch.setattr(models, "round_products_once", lambda: asked.append(True))
    for slow, dtype, device, times in (
        (True, "bfloat16", "cpu", 1),
        (True, "float32", "cpu", 0),
        (True, "bfloat16", "meta", 0),
        (False, "bfloat16", "cpu", 0),
    ):
        asked.clear()
        monkeypatch.setattr(models, "slow_here", lambda slow=slow: slow)
        spec = models.ModelSpec(path="nowhere", dtype=dtype)
        model = torch.nn.Linear(2, 2).to(device)
        model.device = torch.device(device)
        models.fill_in(model, spec, Images())
        assert len(asked) == times, (slow, dtype, device)


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.is_file(), reason="reads the flags of Linux on x86")
def test_slow_is_a_cpu_without_avx_512() -> None:
    flags = set(CPUINFO.read_text(encoding="ascii", errors="replace").split())
    assert slow_here() is not ({"avx512bw", "avx512vl", "avx512dq"} <= flags)


class Images:
    """A task whose bases need no padding token."""

    class spec:
        kind = "image_classification"
