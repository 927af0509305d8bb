"""Published parameter counts that are right (the rows marked so in docs/methods.md): model, method, options, entries."""

from __future__ import annotations

LLAMA2 = {"vocab_size": 32000}
# name -> (transformers config class, its values, targets)
QV_LLAMA = ["q_proj", "v_proj"]
FIVE_LLAMA = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SEVEN_LLAMA = [*FIVE_LLAMA, "o_proj", "gate_proj"]
MODELS = {
    "llama2-7b": (
        "LlamaConfig",
        LLAMA2 | dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    ),
    "llama2-13b": (
        "LlamaConfig",
        LLAMA2 | dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    ),
    "llama3-8b": (
        "LlamaConfig",
        dict(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    ),
    "roberta-base": ("RobertaConfig", dict(vocab_size=50265)),
    "roberta-large": (
        "RobertaConfig",
        dict(
            vocab_size=50265,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
        ),
    ),
    "vit-base": ("ViTConfig", dict()),
    "vit-large": (
        "ViTConfig",
        dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    ),
}
TARGETS = {"llama": QV_LLAMA, "roberta": ["query", "value"], "vit": ["q_proj", "v_proj"]}

# (model, method, options, entries that train)
PUBLISHED = [
    *(("llama3-8b", "lora", {"r": r, "target_modules": FIVE_LLAMA}, 1_769_472 * r) for r in (2, 4, 8, 16, 32)),
    ("llama3-8b", "moslora", {"r": 2, "target_modules": FIVE_LLAMA}, 3_539_584),
    ("llama3-8b", "pissa", {"r": 32, "target_modules": SEVEN_LLAMA}, 83_886_080),
    ("llama3-8b", "aurora", {"r": 2, "target_modules": FIVE_LLAMA}, 3_542_144),
    *(("llama3-8b", "ranlora", {"r": r, "target_modules": FIVE_LLAMA}, 1_769_632 * r) for r in (2, 4, 8, 16)),
    ("llama2-7b", "loran", {"r": 64}, 33_554_432),
    ("llama2-7b", "lora", {"r": 64}, 33_554_432),
    ("llama2-7b", "qlora", {"r": 64}, 33_554_432),
    ("llama2-7b", "loran", {"r": 8}, 4_194_304),
    ("llama2-13b", "loran", {"r": 64}, 52_428_800),
    ("roberta-base", "lora", {"r": 8}, 294_912),
    ("roberta-large", "lora", {"r": 8}, 786_432),
    ("roberta-base", "ranlora", {"r": 2}, 73_776),
    ("roberta-large", "ranlora", {"r": 2}, 196_704),
    ("vit-base", "ranlora", {"r": 2}, 73_776),
    ("vit-base", "aurora", {"r": 2}, 74_208),
    ("vit-large", "aurora", {"r": 2}, 197_568),
    ("vit-large", "lora", {"r": 16}, 1_572_864),
    ("roberta-base", "fourierft", {"n_frequency": 1000}, 24_000),
]
