"""Tiny models of every backbone, built from configs, and the helpers by which cells look at any method's adapter."""

from __future__ import annotations

import copy

import torch
import transformers as tf
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

IDS = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

# how a base is stored: -> (quantisation, dtype in which it computes)
STORAGE = {
    "fp32": ("none", torch.float32),
    "bf16": ("none", torch.bfloat16),
    "fp16": ("none", torch.float16),
    "NF4, double quantisation": ("nf4", torch.float32),
    "int8": ("int8", torch.float32),
}


def llama(seed: int = 0) -> nn.Module:
    """A decoder with grouped-query attention: k and v are narrower than q. 128 wide, so that NF4 packs it."""
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return tf.LlamaForCausalLM(config).eval()


def bert(seed: int = 0) -> nn.Module:
    """An encoder with a classification head."""
    torch.manual_seed(seed)
    config = tf.BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return tf.BertForSequenceClassification(config).eval()


def t5(seed: int = 0) -> nn.Module:
    """An encoder-decoder."""
    torch.manual_seed(seed)
    config = tf.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        dropout_rate=0.0,
    )
    return tf.T5ForConditionalGeneration(config).eval()


def vit(seed: int = 0) -> nn.Module:
    """An image classifier."""
    torch.manual_seed(seed)
    config = tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return tf.ViTForImageClassification(config).eval()


def gpt2(seed: int = 0) -> nn.Module:
    """A decoder whose linear layers are `Conv1D`, with the weight stored as (d_in, d_out)."""
    torch.manual_seed(seed)
    config = tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=16, pad_token_id=0)
    return tf.GPT2LMHeadModel(config).eval()


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module name, as in the base model -> adapter layer, of any method."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def tensors_of(layer: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors in one layer, trainable and frozen, without the method's prefix: "A", "B", "A0", ..."""
    named = [*layer.named_parameters(), *layer.named_buffers()]
    own = [(name.split("."), tensor) for name, tensor in named if not name.startswith("base_layer.")]
    # a name without a prefix is bookkeeping: AdaLoRA's ranknum, which follows from the config and is not saved
    return {parts[0].partition("_")[2]: tensor for parts, tensor in own if adapter in parts and "_" in parts[0]}


def with_weight(layer: nn.Module) -> dict[str, Tensor]:
    """`tensors_of` the layer, and W0 (d_out, d_in) of its base where that is stored plainly."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    plain = type(base).__name__ in ("Linear", "Conv1D")
    return tensors_of(layer) | ({"W0": weight.detach().T if type(base) is Conv1D else weight.detach()} if plain else {})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of everything that trains."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_a_little(model: nn.Module, std: float = 0.05, seed: int = 0, adapter: str | None = None) -> nn.Module:
    """Move every tensor that trains (or those of `adapter`), as training would; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad if adapter is None else f".{adapter}" in name:
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.add_(noise.to(parameter.device, parameter.dtype))
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    """Logits in evaluation mode."""
    return model.eval()(ids, **kwargs).logits


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def fresh(model: nn.Module) -> nn.Module:
    """A deep copy."""
    return copy.deepcopy(model)
