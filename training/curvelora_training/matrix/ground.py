"""What the cells train: tiny models with random weights, or a checkpoint, on real text, as one recipe for each task."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from curvelora.errors import UserError
from curvelora_eval.files import make_folder, write_json, write_text
from curvelora_training.bench.sources import read_text

VOCABULARY = 512
ROWS = 4  # a step and process
STEPS = 4
SHORTEST = 40  # characters of a paragraph that makes a row
# task -> (kind, modules that the tiny model's adapters are put on)
TASKS = {
    "classifier": ("sequence_classification", ("query", "value")),
    "lm": ("causal_lm", ("q_proj", "down_proj")),
}


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


def tiny_bert() -> BertModel:
    """Two layers; sizes divide by 64, so that NF4 applies. Without dropout, whose masks differ between one process and two."""
    return BertModel(
        BertConfig(
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
        )
    )


def tiny_llama() -> LlamaForCausalLM:
    """Two layers with grouped-query attention; sizes divide by 64."""
    return LlamaForCausalLM(
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
    )


def lay_ground(
    folder: Path, tasks: list[str], model: str | None, data: str | None, processes: int, seed: int
) -> dict[str, Path]:
    """Write models, rows and recipes below `folder`; returns task -> recipe.

    Rows are paragraphs of the text; their label says which half of it they are from.

    Args:
        model: a checkpoint for all tasks; tiny models where None.
        data: a UTF-8 text; the one that comes with the package where None.

    Raises:
        UserError: the text cannot be read, or is too short.
    """
    make_folder(folder)
    paragraphs = [" ".join(part.split()) for part in read_text(data)[0].split("\n\n")]
    paragraphs = [part for part in paragraphs if len(part) >= SHORTEST]
    count = ROWS * STEPS * processes
    if len(paragraphs) < 2 * count:
        raise UserError(
            f"the text has {len(paragraphs)} paragraphs of at least {SHORTEST} characters, and {2 * count} are needed: give "
            "more text with --data"
        )
    half = len(paragraphs) // 2
    rows = [
        {"text": paragraphs[i // 2 + half * (i % 2)], "label": ("first", "second")[i % 2] + " half"}
        for i in range(2 * count)
    ]
    for name, part in (("train", rows[:count]), ("unseen", rows[count:])):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    if model is None:
        tiny = {"classifier": tiny_bert, "lm": tiny_llama}
        words = tokenizer(paragraphs)
        disable_progress_bar()
        for task in tasks:
            torch.manual_seed(0)
            tiny[task]().save_pretrained(folder / task)
            words.save_pretrained(folder / task)
    recipes = {}
    for task in tasks:
        unseen = {"path": str((folder / "unseen.jsonl").resolve())}
        recipe = {
            "output": str(folder / "unused"),
            "model": {"path": model or str((folder / task).resolve()), "dtype": "float32"},
            "task": {"kind": TASKS[task][0], "columns": {"text": "text"}, "max_length": 32},
            # a short last batch of evaluation would be weighed otherwise by several processes
            "data": {
                "train": {"path": str((folder / "train.jsonl").resolve())},
                "validation": unseen,
                "test": unseen | {"limit": 20},
            },
            "adapter": {"method": "loran"},
            "training": {
                "learning_rate": 1e-3,
                "epochs": 1,
                "batch_size": ROWS,
                "eval_batch_size": ROWS,
                "log_every": 1,
            },
            "seed": seed,
        }
        write_json(folder / f"{task}.json", recipe)
        recipes[task] = (folder / f"{task}.json").resolve()
    return recipes
