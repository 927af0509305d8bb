"""A built-in shape as Unsloth loads and adapts it, from a checkpoint with random NF4 weights, for `unsloth_step`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from curvelora.errors import UserError
from curvelora_eval.files import make_folder, write_json
from curvelora_training.bench.arms import Arm, parse_arms
from curvelora_training.bench.cost import measure_steps, table
from curvelora_training.bench.devices import Device
from curvelora_training.bench.ground import Ground
from curvelora_training.bench.options import add_timing_arguments, rounds_from
from curvelora_training.bench.processes import join
from curvelora_training.bench.random_base import random_model
from curvelora_training.bench.settings import LabSettings, add_model_arguments, settings_from
from curvelora_training.bench.shapes import shape_config
from curvelora_training.bench.sources import RandomTokens
from curvelora_training.bench.trial import Trial
from curvelora_training.distributed import world_size

ARM = "unsloth=qlora@eager"  # our kernels stay out


@dataclass
class UnslothGround(Ground):
    """`Ground` whose one trial is Unsloth's model; own_checkpointing: see `unsloth_model`."""

    own_checkpointing: bool = False

    def trial(self, arm: Arm, seed: int, at_peak: bool = False) -> Trial:
        """As `Ground.trial`, with the model that Unsloth loads and adapts."""
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(self.settings.model, Path(folder), self.device.device)
            model = unsloth_model(self.settings, Path(folder), seed, self.own_checkpointing)
        computed = {
            "fused_layers": 0,
            "unsloth": version("unsloth"),
            "unsloth_checkpointing": self.own_checkpointing,
            "unsloth_patches": patches(model),
        }
        return Trial(model, self.optimisation(arm, at_peak), self.device, self.heads, arm.fp32, seed, computed)


def write_checkpoint(shape: str, folder: Path, device: torch.device) -> None:
    """A checkpoint of this shape with random weights, linear layers in NF4 with double quantisation, as transformers reads them.

    The tokenizer beside it, which Unsloth wants to load, knows a few words only.
    """
    config = shape_config(shape)
    model = random_model(config, "nf4", device)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.architectures = [type(model).__name__]
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    config.save_pretrained(folder)
    words = {word: number for number, word in enumerate(("<unk>", "<s>", "</s>", "<pad>", "a"))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)


def unsloth_model(settings: LabSettings, folder: Path, seed: int, own_checkpointing: bool) -> nn.Module:
    """The checkpoint in `folder` with LoRA, by Unsloth's own calls.

    Args:
        own_checkpointing: "unsloth", which moves activations to the CPU, instead of plain recomputation.
    """
    from unsloth import FastLanguageModel

    checkpointing = settings.checkpointing and ("unsloth" if own_checkpointing else True)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=settings.length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.rank,
        target_modules=list(settings.target_modules),
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=seed,
        max_seq_length=settings.length,
    )
    return FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)


def patches(model: nn.Module) -> dict[str, int]:
    """Function -> how many modules apply it to their LoRA layers, so that a record shows whether Unsloth's kernels ran."""
    found: Counter[str] = Counter()
    for module in model.modules():
        for name in ("apply_qkv", "apply_o"):
            if callable(function := getattr(module, name, None)) and name in vars(module):
                found[function.__name__] += 1
        if "forward" in vars(module) and "lora" in module.forward.__name__:
            found[module.forward.__name__] += 1
    return dict(found)


def build_ground(settings: LabSettings, device: torch.device, own_checkpointing: bool) -> UnslothGround:
    """What `measure_steps` measures; the base is there for its shapes."""
    started = time.perf_counter()
    config = shape_config(settings.model)
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    source = RandomTokens(config.vocab_size, settings.batch_size, settings.length)
    seconds = time.perf_counter() - started
    return UnslothGround(settings, base, source, [], Device(device), seconds, own_checkpointing=own_checkpointing)


def options() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = argparse.ArgumentParser(description="Time whole QLoRA steps by Unsloth; see `curvelora bench step`.")
    add_model_arguments(parser)
    add_timing_arguments(parser, 5, 2)
    own = "Unsloth's checkpointing, which moves activations to the CPU, instead of plain recomputation"
    parser.add_argument("--own-checkpointing", action="store_true", help=own)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/unsloth.json"), metavar="FILE", help="result")
    return parser


def run(argv: list[str] | None = None) -> int:
    """Measure, write the record, print the table; the exit status."""
    args = options().parse_args(argv)
    try:
        settings = settings_from(args, lambda: parse_arms("", [ARM]), None, [lambda: rounds_from(args)])
        if not settings.random or settings.base != "nf4":
            raise UserError("--model has to be a built-in shape or a config.json, and --base nf4")
        if args.own_checkpointing and not settings.checkpointing:
            raise UserError("--own-checkpointing is a kind of checkpointing: leave out --no-checkpointing")
        if world_size() > 1:
            raise UserError("Unsloth's step is measured in one process: start it without a launcher")
        make_folder(args.out.parent)
        ground = build_ground(settings, join(), args.own_checkpointing)
        for record in measure_steps(ground, rounds_from(args), args.std):
            write_json(args.out, record)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{settings.model} by Unsloth, std(BA) = {args.std:g}\n{table(record)}\n\nwritten: {args.out}")
    return 0
