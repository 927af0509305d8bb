"""The built-in model shapes, for measurements that need no weights: cost, memory and numerics at 1B to 70B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from curvelora.errors import UserError, nearest

# name -> what its config.json says (Meta's model cards; arXiv 2307.09288 table 1, arXiv 2407.21783 table 3)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {  # Llama 3.2 1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "llama2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
POSITIONS = 8192


def shape_config(name: str) -> PretrainedConfig | None:
    """The config of a built-in shape or of a config.json; None where `name` means a checkpoint with weights.

    Raises:
        UserError: `name` is neither a shape nor a path nor a hub name, or the file is no config of transformers.
    """
    if name in SHAPES:
        return LlamaConfig(**SHAPES[name], max_position_embeddings=POSITIONS, use_cache=False)
    path = Path(name)
    if path.suffix == ".json":
        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{name} is no model config that can be read: {' '.join(str(error).split())[:200]}"
            ) from error
        config.use_cache = False
        return config
    if "/" not in name and not path.exists():
        raise UserError(
            f"--model {name}: there is no such shape or folder{nearest(name, SHAPES)} (shapes: {', '.join(SHAPES)}; or name "
            "a config.json, or a checkpoint folder)"
        )
    return None
