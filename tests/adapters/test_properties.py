"""The shared matrix: what the registry says of a method is what it does. A new method joins with a line in CASES."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from curvelora import METHODS
from curvelora.method import Merge

# (method, recipe options). The models below have q and v projections; their shapes are written out in ADAPTED.
CASES = [
    ("lora", {"r": 4}),
    ("lora", {"r": 3, "alpha": 9, "dropout": 0.1, "use_rslora": True}),
    ("lora", {"r": 4, "init_lora_weights": "gaussian"}),
    ("lora", {"r": 4, "init_lora_weights": False}),
    ("lora", {"r": 4, "use_dora": True}),
    ("qlora", {"r": 4}),
    ("loran", {"r": 4}),
    ("loran", {"r": 3, "alpha": 9, "dropout": 0.0, "amplitude": 2e-2, "scale_position": "inside"}),
    ("loran", {"r": 4, "init_B_std": 0.02}),
    *[
        ("loran", {"r": 4, "activation": name})
        for name in ("identity", "tanh", "relu", "silu", "swish-25", "cos", "gaussian")
    ],
    ("loran", {"r": 1, "activation": "sigmoid"}),
    ("linear_probing", {"modules_to_save": ["classifier"]}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CASES]
ADAPTED = 2 * [(128, 128), (64, 128)]  # (d_out, d_in) of q and v in both layers of the tiny Llama
HEAD = 3 * 32 + 3  # the tiny BERT's classifier


def test_every_registered_method_is_in_the_matrix():
    assert {name for name, _ in CASES} == set(METHODS)


@pytest.fixture
def case(request, llama, bert):
    """-> (method, config, build): `build()` gives the base model, without the adapter, the same every time."""
    name, options = request.param
    method = METHODS[name]
    if name == "linear_probing":
        return method, method.build_config(**options), bert
    return method, method.build_config(target_modules=["q_proj", "v_proj"], **options), llama


every_case = pytest.mark.parametrize("case", CASES, ids=IDS, indirect=True)


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def perturb(model) -> None:
    """Give every trainable tensor a value, as training would."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.03)


@every_case
def test_identity_at_init(case, token_ids):
    method, config, build = case
    expected = method.identity_at_init(config)
    before = logits(build(), token_ids)
    difference = relative(logits(get_peft_model(build(), config), token_ids), before)
    assert difference < 1e-6 if expected else difference > 1e-4


@every_case
def test_merge(case, token_ids):
    method, config, build = case
    assert method.merge(config) is Merge.EXACT  # no method of another kind is registered yet
    model = get_peft_model(build(), config)
    perturb(model)
    before = logits(model, token_ids)
    assert relative(before, logits(build(), token_ids)) > 1e-3  # there is something to merge
    merged = model.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    assert relative(logits(merged, token_ids), before) < 1e-5


@every_case
def test_trainable_parameters(case):
    method, config, build = case
    model = get_peft_model(build(), config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = HEAD if method.name == "linear_probing" else 0
    assert count == sum(method.trainable_parameters(config, *shape) for shape in ADAPTED) + head


def test_a_bias_on_lora_s_B_is_counted(llama):
    """Not in the matrix: PEFT merges it only into layers that have a bias."""
    config = METHODS["lora"].build_config(r=4, lora_bias=True, target_modules=["q_proj", "v_proj"])
    count, _ = get_peft_model(llama(), config).get_nb_trainable_parameters()
    assert count == sum(METHODS["lora"].trainable_parameters(config, *shape) for shape in ADAPTED)


@every_case
def test_every_trainable_tensor_gets_a_gradient_within_two_steps(case, token_ids):
    """Except with relu and B = 0, which is known never to start."""
    _, config, build = case
    model = get_peft_model(build(), config).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(token_ids).logits
        torch.logsumexp(output, -1).square().sum().backward()
        optimizer.step()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().max() == 0)]
    if getattr(config, "activation", None) == "relu" and config.init_B_std == 0:
        assert len(dead) == 8
    else:
        assert not dead


@every_case
def test_a_recipe_option_is_understood_or_refused(case):
    method, _, _ = case
    with pytest.raises(ValueError, match=f"method '{method.name}' has no option 'no_such_option'"):
        method.build_config(no_such_option=1)
    described = method.describe()
    assert described["name"] == method.name and described["provided_by"] in ("curvelora", "peft")
    assert all(described[key] for key in ("title", "family", "formula", "paper", "cost"))


LLAMA2 = {
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}


# methods.md 9, "reference"; LoRA on the same modules has as many.
@pytest.mark.parametrize(
    ("size", "r", "expected"), [("7B", 64, 33_554_432), ("7B", 8, 4_194_304), ("13B", 64, 52_428_800)]
)
@pytest.mark.parametrize("name", ["loran", "lora"])
def test_published_counts_on_the_real_shapes(name, size, r, expected):
    """The models are built without memory, and the adapters with them: nothing is multiplied by hand."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, **LLAMA2[size]))
        model = get_peft_model(base, METHODS[name].build_config(r=r, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == expected
    assert all(p.is_meta for p in model.parameters())
