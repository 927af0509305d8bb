"""Tiny checkpoints, saved as ordinary folders: they exercise every code path in a second; no behaviour is claimed of them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

VOCABULARY = 512


def tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `sentences`."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    base.train_from_iterator(
        sentences, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def build_tiny_models(folder: Path, sentences: list[str]) -> dict[str, Path]:
    """Write bert, llama (grouped-query attention), t5 and vit below `folder`; sizes divide by 64 so that NF4 applies.

    Without dropout of their own, so that runs of other batch shapes or launchers can be compared exactly.
    """
    torch.manual_seed(0)
    built = {
        "bert": BertModel(
            BertConfig(
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                vocab_size=VOCABULARY,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
            )
        ),
        "llama": LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "t5": T5ForConditionalGeneration(
            T5Config(
                dropout_rate=0.0,
                vocab_size=VOCABULARY,
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        "vit": ViTForImageClassification(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                image_size=32,
                patch_size=8,
            )
        ),
    }
    words = tokenizer(sentences)
    paths = {}
    for name, model in built.items():
        paths[name] = folder / name
        model.save_pretrained(paths[name])
        if name == "vit":
            ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(paths[name])
        else:
            words.save_pretrained(paths[name])
    return paths
