"""Tiny checkpoints, saved as ordinary folders: they exercise every code path in a second; no behaviour is claimed of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from curvelora_training.matrix.ground import VOCABULARY, tiny_bert, tiny_llama, tokenizer


def build_tiny_models(folder: Path, sentences: list[str]) -> dict[str, Path]:
    """Write bert, llama (grouped-query attention), t5 and vit below `folder`; sizes divide by 64 so that NF4 applies.

    Without dropout of their own, so that runs of other batch shapes or launchers can be compared exactly.
    """
    torch.manual_seed(0)
    built = {
        "bert": tiny_bert(),
        "llama": tiny_llama(),
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
