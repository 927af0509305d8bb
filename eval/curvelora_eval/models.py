"""Load the frozen base model, its preprocessor, or only its shapes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state
from transformers.utils import logging

from curvelora.errors import UserError
from curvelora.layers.base_weight import keep_4bit_layout
from curvelora_eval.bf16_on_cpu import round_products_once, slow_here
from curvelora_eval.spec import ModelSpec
from curvelora_eval.tasks import Task

# Names that transformers gives to the heads it initialises anew.
HEADS = ("classifier", "score", "classification_head", "pre_classifier", "pooler")
# Output layers that quantisation leaves alone: they decide the logits, and new heads must train.
UNQUANTISED = ("lm_head", "embed_out", *HEADS)


def default_device() -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_checkpoint(spec: ModelSpec) -> None:
    """Raise `UserError` where a local checkpoint is missing, or holds only pickled weights."""
    folder = Path(spec.path)
    looks_local = spec.path.startswith((".", "/", "~")) or folder.exists() or spec.path.count("/") > 1
    if not looks_local:
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{spec.path} holds no model: there is no config.json in it")
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{spec.path} holds pickled weights (.bin), which can run code when loaded: convert them to safetensors"
        )


def load_config(spec: ModelSpec, task: Task) -> Any:
    """The checkpoint's config with the task's own settings.

    Raises:
        UserError: the checkpoint does not exist or its config cannot be read.
    """
    check_checkpoint(spec)
    try:
        return AutoConfig.from_pretrained(
            spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **task.model_options()
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model {spec.path} cannot be found or read: {' '.join(str(error).split())[:300]}"
        ) from error


def storage_of(spec: ModelSpec, config: Any) -> str:
    """How the base's linear layers are stored: as `spec` says, or as the checkpoint with this config is quantised itself."""
    own = getattr(config, "quantization_config", None)
    if spec.quantization != "none" or not own:
        return spec.quantization
    settings = own if isinstance(own, dict) else own.to_dict()
    if settings.get("load_in_4bit"):  # bitsandbytes, also where an old config does not name it
        return settings.get("bnb_4bit_quant_type", "fp4")
    if settings.get("load_in_8bit"):
        return "int8"
    method = settings.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def shape_model(spec: ModelSpec, task: Task) -> PreTrainedModel:
    """The model without its weights (meta device): every name and shape, in a moment and without memory."""
    config = load_config(spec, task)
    with (
        torch.device("meta"),
        set_zero3_state(),
    ):  # also where DeepSpeed is to partition the model itself, and not its shapes
        pinned = {"code_revision": spec.revision} if spec.trust_remote_code and spec.revision else {}
        return task.auto_class.from_config(config, trust_remote_code=spec.trust_remote_code, **pinned)


def load_processor(spec: ModelSpec, task: Task) -> Any:
    """The tokenizer, or the image processor for image tasks.

    Raises:
        UserError: the checkpoint has none.
    """
    auto = AutoImageProcessor if task.spec.kind == "image_classification" else AutoTokenizer
    try:
        processor = auto.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        kind = "image processor" if auto is AutoImageProcessor else "tokenizer"
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{spec.path} has no {kind} that can be read: {reason}") from error
    # transformers makes up an empty tokenizer for some architectures where the checkpoint has none
    files = getattr(processor, "vocab_files_names", {}).values()
    if files and Path(spec.path).is_dir() and not any((Path(spec.path) / name).is_file() for name in files):
        raise UserError(f"{spec.path} has no tokenizer: there is none of {', '.join(sorted(files))} in it")
    if auto is AutoTokenizer:
        processor.pad_token = processor.pad_token or processor.eos_token or processor.unk_token
        processor.padding_side = "right"  # learned positions count from the first token, which padding must not be
    return processor


def load_base(
    spec: ModelSpec, task: Task, device: torch.device | None = None, trained: Iterable[str] = ()
) -> PreTrainedModel:
    """Load the base model frozen, in the storage that `spec` asks for.

    Args:
        trained: modules that train in full or come with the adapter, and may therefore be missing in the checkpoint.

    Raises:
        UserError: the checkpoint does not exist, its weights cannot be read, or some of them are missing.
    """
    config = load_config(spec, task)
    device = device or default_device()
    options: dict[str, Any] = {
        "config": config,
        "dtype": getattr(torch, spec.dtype),
        "attn_implementation": attention(spec, task, device),
    }
    if spec.quantization != "none":
        options["quantization_config"] = quantisation_config(spec)
        options["device_map"] = {"": device}
    model = _load_weights(spec, task, options, set(trained))
    keep_4bit_layout(model)
    if spec.quantization == "none":
        model.to(device)
    fill_in(model, spec, task)
    return model


def fill_in(model: PreTrainedModel, spec: ModelSpec, task: Task) -> None:
    """What every loaded base gets: a padding token in its config, no gradients, and bf16 products that a CPU forms quickly."""
    if model.device.type == "cpu" and spec.dtype == "bfloat16" and slow_here():
        round_products_once()
    if task.spec.kind != "image_classification":
        text = model.config.get_text_config()
        model.config.pad_token_id = text.pad_token_id = _padding(text, spec, task)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _padding(config: Any, spec: ModelSpec, task: Task) -> int | None:
    """The token that batches are padded with.

    A decoder's classification head reads the last token that is not `config.pad_token_id`, so that must be the tokenizer's own
    padding token, whatever the checkpoint's config says; else the head reads padding.
    """
    if task.new_head:
        with contextlib.suppress(UserError):  # without a tokenizer nothing is padded
            if (padding := load_processor(spec, task).pad_token_id) is not None:
                return padding
    own = getattr(config, "pad_token_id", None)
    ends = getattr(config, "eos_token_id", None) if own is None else own
    return next(iter(ends), None) if isinstance(ends, list | tuple) else ends


def _load_weights(spec: ModelSpec, task: Task, options: dict[str, Any], trained: set[str]) -> PreTrainedModel:
    """`from_pretrained`, with transformers' report of missing weights turned into an error where nothing trains them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = task.auto_class.from_pretrained(
            spec.path,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            # a head for other classes is replaced; any other tensor of another size is an error below
            ignore_mismatched_sizes=task.new_head,
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"the weights of {spec.path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)
    unusable = [*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])]
    missing = sorted(name for name in unusable if not trained & set(name.split(".")))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"{spec.path} has no weights that fit {shown}: take a checkpoint of {type(model).__name__} that has, or train them "
            "(a recipe names such modules in adapter.modules_to_save)"
        )
    return model


def quantisation_config(spec: ModelSpec) -> BitsAndBytesConfig:
    """bitsandbytes settings: NF4 (blocks of 64, optional double quantisation) or int8; heads stay as they are."""
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTISED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        llm_int8_skip_modules=list(UNQUANTISED),
    )


def attention(spec: ModelSpec, task: Task, device: torch.device) -> str | None:
    """The attention implementation to ask for (None leaves it to transformers); see `ModelSpec.attention`."""
    if spec.attention != "auto":
        return spec.attention
    if device.type == "cpu":
        return "eager"
    flash = spec.dtype != "float32" and importlib.util.find_spec("flash_attn") is not None
    if flash and getattr(shape_model(spec, task), "_supports_flash_attn", False):
        return "flash_attention_2"
    return None  # SDPA where the architecture has it


def head_modules(model: nn.Module) -> list[str]:
    """Names of the new heads that `model` has."""
    return [name for name, _ in model.named_children() if name in HEADS]
