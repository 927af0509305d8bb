"""LoRAN in training: half-precision bases, gradient checkpointing, transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from curvelora import LoranConfig
from curvelora.methods.loran import LoranLayer


def config(**options) -> LoranConfig:
    return LoranConfig(
        **(dict(r=4, alpha=8, dropout=0.1, target_modules=["q_proj", "v_proj"], init_B_std=0.02) | options)
    )


def gradients(model, token_ids) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)  # dropout: the same mask in every call
    model.train()(token_ids, labels=token_ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_an_fp32_adapter(llama, token_ids, dtype):
    model = get_peft_model(llama().to(dtype), config(dropout=0.0))
    assert {p.dtype for n, p in model.named_parameters() if "loran_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "loran_" not in n} == {dtype}
    assert model(token_ids).logits.dtype == dtype
    found = gradients(model, token_ids)
    assert len(found) == 8 and all(g.dtype == torch.float32 and g.abs().max() > 0 for g in found.values())
    # about those of the fp32 model
    exact = gradients(get_peft_model(llama(), config(dropout=0.0)), token_ids)
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 0.05, name


def test_a_layer_never_rounds_its_factors_to_the_base_s_dtype():
    """PEFT would cast bf16 factors up again (by default), but what rounding lost does not come back."""
    layer = LoranLayer(torch.nn.Linear(16, 8, dtype=torch.bfloat16), "layer")
    layer.add_adapter("default", LoranConfig(r=2))
    A, B = layer.factors("default")
    assert A.dtype == B.dtype == torch.float32
    assert not torch.equal(A, A.bfloat16().float())


def test_autocast_over_an_fp32_base(llama, token_ids):
    model = get_peft_model(llama(), config(dropout=0.0))
    exact = gradients(model, token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, token_ids)
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() / gradient.norm() < 0.05, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(llama, token_ids, use_reentrant):
    """Dropout is on: the recomputed pass must draw the same mask."""
    model = get_peft_model(llama(), config())
    expected = gradients(model, token_ids)
    model.enable_input_require_grads()  # the reentrant kind needs an input with a gradient
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, token_ids)
    assert len(calls) == 2, "the layer is recomputed"
    assert found.keys() == expected.keys() and len(expected) == 8
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def factors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "loran_" in name}


def base(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "loran_" not in name}


def assert_only_factors_moved(model, before_factors, before_base):
    assert all(not torch.equal(p, before_factors[name]) for name, p in factors(model).items())
    assert all(torch.equal(p, before_base[name]) for name, p in base(model).items())


def test_transformers_trainer_takes_a_step_and_saves_an_adapter(llama, token_ids, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(llama(), config())
    before = factors(model), base(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
    )
    rows = [{"input_ids": row, "labels": row} for row in token_ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert_only_factors_moved(model, *before)
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("model*.safetensors"))  # not the base


@pytest.mark.slow
def test_trl_sft_trainer_takes_a_config_of_ours(llama, token_ids, tmp_path):
    """SFTTrainer calls get_peft_model itself; rows that are token ids need no tokenizer files."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        bf16=False,
    )
    rows = datasets.Dataset.from_dict({"input_ids": token_ids.tolist()})
    trainer = trl.SFTTrainer(
        model=llama(), args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config()
    )
    before = factors(trainer.model), base(trainer.model)
    assert len(before[0]) == 8
    trainer.train()
    assert_only_factors_moved(trainer.model, *before)
