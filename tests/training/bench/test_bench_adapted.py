"""Arms on one base: they share its tensors, leave each other alone, start alike, and compute in the precision they claim."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

from curvelora.errors import UserError
from curvelora_eval.lab.updates import adapted_layers, factors
from curvelora_training.bench.adapted import (
    arm_model,
    arm_tensors,
    float32_copy,
    set_update_std,
    shared_copy,
    update_std_of,
)
from curvelora_training.bench.arms import named_arm, own_arm
from curvelora_training.bench.devices import Device
from curvelora_training.bench.full import FullLinear
from curvelora_training.bench.trial import Optimisation, Trial

CPU = torch.device("cpu")
ADAPTERS = ["qlora", "loran:identity", "loran:sinter", "ranlora", "aurora", "neat", "moslora", "pissa", "olora"]
KAIMING = ["qlora", "lora", "loran:identity", "loran:sinter", "aurora", "moslora", "loran:sinter@fp32"]


def storages(model: torch.nn.Module) -> dict[str, int]:
    return {n: t.data_ptr() for n, t in (*model.named_parameters(), *model.named_buffers())}


def trained(model, batches, fp32=False, steps=3):
    """`model` after a few steps at a rate that moves it visibly."""
    trial = Trial(model, Optimisation(learning_rate=0.05, steps=steps), Device(CPU), [], fp32)
    for batch in batches[:steps]:
        trial.step(batch)
    return model


@torch.no_grad()
def logits(model, batch):
    return model.eval()(input_ids=batch["input_ids"]).logits


@pytest.mark.parametrize("stored", ["nf4", "bf16", "fp32"])
def test_a_shared_copy_has_other_modules_on_the_same_tensors(base, stored):
    model = base(stored)
    twin = shared_copy(model)
    assert storages(model) == storages(twin) and len(storages(model)) > 10
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert getattr(one, "quant_state", None) is getattr(two, "quant_state", None)


def test_a_layer_that_bitsandbytes_quantised_shares_its_scales_too():
    layer = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    twin = shared_copy(torch.nn.Sequential(layer))[0]
    assert twin is not layer and twin.weight is layer.weight
    assert twin.quant_state is layer.quant_state is layer.weight.quant_state is not None


@pytest.mark.parametrize("stored", ["nf4", "fp32"])
@pytest.mark.parametrize("arm", ["qlora", "loran:sinter", "ranlora", "full"])
def test_training_one_arm_leaves_the_base_and_the_others_bit_for_bit(base, options, batches, arm, stored):
    model = base(stored)
    other = arm_model(model, named_arm("loran:tanh"), options, [], 1, random=True)
    set_update_std(other, 0.01)
    before = logits(other, batches[0]), logits(model, batches[0])
    one = arm_model(model, named_arm(arm), options, [], 0, random=True)
    start = logits(one, batches[0])
    trained(one, batches)
    assert not torch.equal(logits(one, batches[0]), start)
    assert torch.equal(logits(other, batches[0]), before[0]) and torch.equal(logits(model, batches[0]), before[1])
    assert not any(p.requires_grad for p in model.parameters())


class Dtypes(TorchDispatchMode):
    """Records the dtype of every floating-point result of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.seen.add(value.dtype)
        return result


@pytest.mark.parametrize("stored", ["nf4", "bf16"])
@pytest.mark.parametrize("arm", [*ADAPTERS, "full"])
def test_an_fp32_arm_computes_in_fp32_from_end_to_end(base, options, batches, arm, stored):
    model = base(stored)
    for name, expected in ((arm, {torch.bfloat16, torch.float32}), (f"{arm}@fp32", {torch.float32})):
        chosen = named_arm(name)
        wrapped = arm_model(model, chosen, options, [], 0, random=True)
        trial = Trial(wrapped, Optimisation(steps=2), Device(CPU), [], chosen.fp32)
        with Dtypes() as dtypes:
            trial.step(batches[0])
        assert dtypes.seen - {torch.float64} == expected


@pytest.mark.parametrize("stored", ["nf4", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_float32_copy_has_the_stored_numbers(base, config, batches, stored, tied):
    model = base(stored, tie_word_embeddings=tied)
    twin = float32_copy(model)
    plain = {}
    for (name, one), two in zip(
        model.named_parameters(remove_duplicate=False),
        [p for _, p in twin.named_parameters(remove_duplicate=False)],
        strict=True,
    ):
        if getattr(one, "quant_state", None) is None:
            assert two.dtype == torch.float32 and torch.equal(one.float(), two)
            plain[name] = two.data
            continue
        assert (
            two.data_ptr() == one.data_ptr() and two.quant_state.absmax.data_ptr() == one.quant_state.absmax.data_ptr()
        )
        plain[name] = dequantize_4bit(two.data, two.quant_state)
        assert plain[name].dtype == torch.float32
        assert torch.equal(plain[name].bfloat16(), dequantize_4bit(one.data, one.quant_state))
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) is tied
    assert model.config.dtype == torch.bfloat16 and twin.config.dtype == torch.float32
    reference = LlamaForCausalLM(config(tie_word_embeddings=tied))
    reference.load_state_dict(plain, strict=True)
    expected = logits(reference.double(), batches[0])
    error = (logits(twin, batches[0]).double() - expected).norm() / expected.norm()
    assert error < 1e-5
    assert (logits(model, batches[0]).double() - expected).norm() / expected.norm() > 20 * error


def first_factors(model, arm, options, seed):
    wrapped = arm_model(model, named_arm(arm), options, [], seed, random=True)
    return {name: factors(layer) for name, layer in adapted_layers(wrapped).items()}


@pytest.mark.parametrize("arm", KAIMING[1:])
def test_arms_start_from_the_same_A(base, options, arm):
    model = base("bf16")
    ours, first = first_factors(model, arm, options, 3), first_factors(model, KAIMING[0], options, 3)
    others = first_factors(model, arm, options, 4)
    assert ours.keys() == first.keys() and len(ours) == 4
    for name, (A, B) in ours.items():
        assert A.dtype == torch.float32 and torch.equal(A, first[name][0])
        assert not torch.equal(A, others[name][0])
        assert B.abs().max() == 0
        bound = A.shape[1] ** -0.5  # kaiming_uniform(a = sqrt 5), PEFT's own start of A
        assert 0.9 * bound < A.abs().max() <= bound
    q = "model.layers.{}.self_attn.q_proj"
    assert not torch.equal(ours[q.format(0)][0], ours[q.format(1)][0])


@pytest.mark.parametrize("arm", [*ADAPTERS, "full"])
def test_an_arm_starts_as_the_base_s_function(base, options, batches, arm):
    model = base("fp32")
    wrapped = arm_model(model, named_arm(arm), options, [], 0, random=True)
    expected = logits(model, batches[0])
    tolerance = 1e-3 if arm == "ranlora" else 1e-5  # RanLoRA is it to first order only
    assert (logits(wrapped, batches[0]) - expected).norm() / expected.norm() < tolerance


@pytest.fixture
def classifier() -> BertForSequenceClassification:
    """A frozen encoder with a head of two classes."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=128, **sizes)).requires_grad_(False)
    model.config.dtype = torch.float32
    return model


def head_of(model) -> list[torch.Tensor]:
    return [p for n, p in model.named_parameters() if "classifier" in n and p.requires_grad]


def test_heads_start_alike_in_all_arms_and_differ_by_seed(classifier, options):
    options["target_modules"] = ["query", "value"]
    arms = [*ADAPTERS, "full", "loran:sinter@fp32"]
    started = {arm: head_of(arm_model(classifier, named_arm(arm), options, ["classifier"], 5, False)) for arm in arms}
    other = head_of(arm_model(classifier, named_arm("qlora"), options, ["classifier"], 6, False))
    weight, bias = started["qlora"]
    assert 0.01 < weight.std() < 0.03 and bias.abs().max() == 0 and not torch.equal(weight, other[0])
    for arm, (w, b) in started.items():
        assert torch.equal(w, weight) and torch.equal(b, bias), arm
        assert w.data_ptr() != classifier.classifier.weight.data_ptr()


@pytest.mark.parametrize("target", [1e-3, 0.05])
@pytest.mark.parametrize("arm", ADAPTERS)
def test_the_update_gets_the_size_that_was_asked_for(base, options, arm, target):
    model = arm_model(base("nf4"), named_arm(arm), options | {"r": 8}, [], 0, random=True)
    reached = set_update_std(model, target)
    layers = adapted_layers(model).values()
    products = torch.cat([(B.double() @ A.double()).flatten() for A, B in map(factors, layers)])
    assert update_std_of(model) == reached == pytest.approx(products.square().mean().sqrt().item(), rel=1e-9)
    assert reached == pytest.approx(target, rel=0.08)


def test_full_fine_tuning_has_no_factors_to_size(base, options):
    assert set_update_std(arm_model(base(), named_arm("full"), options, [], 0, True), 0.01) is None


def test_full_fine_tuning_trains_the_dequantised_weight(base, options, batches):
    model = base("nf4")
    wrapped = arm_model(model, named_arm("full"), options, [], 0, random=True)
    layers = {n: m for n, m in wrapped.named_modules() if isinstance(m, FullLinear)}
    assert len(layers) == 4 and {n for n, p in wrapped.named_parameters() if p.requires_grad} == {
        f"{n}.weight" for n in layers
    }
    for name, layer in layers.items():
        packed = model.get_submodule(name).weight
        assert torch.equal(layer.initial_weight, dequantize_4bit(packed.data, packed.quant_state))
        assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, layer.initial_weight.float())
    start = {name: copy.deepcopy(layer.weight.data) for name, layer in layers.items()}
    trained(wrapped, batches)
    for name, layer in layers.items():
        assert torch.equal(layer.initial_weight.float(), start[name]) and not torch.equal(layer.weight, start[name])
    assert not any("initial_weight" in key for key in wrapped.state_dict())


def test_full_linear_is_the_linear_layer_with_its_bias():
    weight, bias, x = torch.randn(3, 5), torch.randn(3), torch.randn(2, 5)
    layer = FullLinear(weight, bias)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.double().T + bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("arm", [*ADAPTERS, "full", "loran:sinter@fp32", "qlora@fp32"])
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_an_arm_s_own_tensors_are_all_that_is_not_the_base_s(base, options, storage, arm):
    model = base(storage)
    wrapped = arm_model(model, named_arm(arm), options, [], 0, random=True)
    shared, own = set(storages(model).values()), {t.data_ptr() for t in arm_tensors(wrapped)}
    assert own and not own & shared
    assert {t.data_ptr() for t in wrapped.parameters() if t.requires_grad} <= own
    assert set(storages(wrapped).values()) <= own | shared


def test_ranlora_keeps_its_own_scale_unless_an_arm_says_otherwise(base, options):
    def alpha(arm):
        return arm_model(base(), arm, options, [], 0, random=True).peft_config["default"].alpha

    assert alpha(named_arm("ranlora")) == "2r"
    assert alpha(own_arm("mine=ranlora,alpha=3")) == 3
    assert alpha(named_arm("loran")) == options["alpha"]


def test_targets_that_match_nothing_are_refused(base, options):
    with pytest.raises(UserError, match="match no module"):
        arm_model(base(), named_arm("full"), options | {"target_modules": ["nothing"]}, [], 0, True)
