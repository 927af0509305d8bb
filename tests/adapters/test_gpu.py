"""On a CUDA GPU: the same function as in fp64, with TF32 switched on by the user, under autocast, on NF4 and int8 bases."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import curvelora
from curvelora.activations import Activation
from curvelora.layers.dense_delta import DeltaMap, dense_delta, dense_delta_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
D_OUT, D_IN, R, TOKENS = 1536, 1000, 64, 333


def factors(std_u: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, D_IN) and B (D_OUT, R) in fp32 with std(BA) close to `std_u`."""
    generator = torch.Generator("cuda").manual_seed(1)
    A = torch.randn(R, D_IN, device="cuda", generator=generator) / D_IN**0.5
    B = torch.randn(D_OUT, R, device="cuda", generator=generator) * std_u * (D_IN / R) ** 0.5
    return A, B


@pytest.fixture
def tf32() -> None:
    """The user's global setting that trades accuracy for speed."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("std_u", [1e-3, 1e-2])
def test_tf32_does_not_reach_the_phase(tf32: None, std_u: float) -> None:
    """f's own contribution, (Sinter - identity), against fp64; computed with TF32 products it is far off."""
    A, B = factors(std_u)
    sinter, identity = DeltaMap(Activation("sinter", 5e-5, 1e4), 0.25), DeltaMap(Activation("identity"), 0.25)
    wanted = dense_delta(A.double(), B.double(), sinter, torch.float64) - 0.25 * (B.double() @ A.double())
    found = dense_delta(A, B, sinter, torch.float32).double() - dense_delta(A, B, identity, torch.float32).double()
    # fp32 rounds the sum at 2^-24 of it, and Sinter adds 5e-5 of it: 1e-3 is what fp32 itself allows
    assert ((found - wanted).norm() / wanted.norm()).item() < 5e-3
    u = (B @ A).double()  # with TF32
    careless = 0.25 * 5e-5 * u * torch.sin(1e4 * u)
    assert ((careless - wanted).norm() / wanted.norm()).item() > (0.02 if std_u == 1e-2 else 0.002)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [False, True])
def test_forward_and_gradients(dtype: torch.dtype, position: bool) -> None:
    """Against autograd in fp64 on the same, already rounded, inputs."""
    A, B = factors(1e-2)
    delta_map = DeltaMap(Activation("sinter", 2e-2, 1e3), 0.25, position)
    x = torch.randn(TOKENS, D_IN, device="cuda", dtype=dtype)
    g = torch.randn(TOKENS, D_OUT, device="cuda", dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    y = dense_delta_product(*leaves, delta_map)
    y.backward(g)
    exact = [t.double().clone().requires_grad_() for t in (x, A, B)]
    wanted = exact[0] @ delta_map.value(exact[2] @ exact[1]).T
    wanted.backward(g.double())
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for found, reference in [(y, wanted), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]:
        assert ((found.double() - reference).norm() / reference.norm()).item() < bound


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_bases_train_save_and_load(quantization: str, tmp_path) -> None:
    """Gradients flow, the loss falls, and the saved adapter gives the same logits on a fresh base."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from curvelora.loading import load_adapter

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    settings = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if quantization == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )

    def base() -> nn.Module:
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=copy.deepcopy(settings), dtype=torch.bfloat16, device_map={"": 0}
        )

    config = curvelora.LoranConfig(r=8, alpha=16, dropout=0.0, amplitude=2e-2, target_modules="all-linear")
    model = get_peft_model(base(), config)
    ids = torch.randint(0, 512, (4, 64), device="cuda")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(base(), tmp_path / "adapter")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)


def test_a_base_that_is_moved_while_merged(tmp_path) -> None:
    """The scales of the weight that comes back move as well. NF4 only: a model with int8 layers cannot be moved after its first
    pass, merged or not, because bitsandbytes (0.50) leaves their statistics where they were.
    """
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.bfloat16, device_map={"": 0}
    )
    model = get_peft_model(base, curvelora.LoranConfig(r=8, init_B_std=0.1, target_modules=["q_proj"])).eval()
    ids = torch.arange(8, device="cuda")[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.merge_adapter()
        assert not torch.equal(model(input_ids=ids).logits, before)
        model.to("cpu").unmerge_adapter()
        assert torch.equal(model.to("cuda")(input_ids=ids).logits, before)


def test_published_setting_is_nearly_absent_from_bf16_products() -> None:
    A, B = factors(1e-2)
    published = DeltaMap(Activation("sinter", 5e-5, 1e4), 0.25)
    measured = curvelora.measure_resolvability(A, B, published, torch.bfloat16)
    assert measured.forward < 0.02
    assert measured.derivative > 0.99
    large = DeltaMap(Activation("sinter", 2e-2, 1e4), 0.25)
    assert curvelora.measure_resolvability(A, B, large, torch.bfloat16).forward > 0.5
