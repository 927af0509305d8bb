"""The language model of a command line: --model, --adapter, --dtype and --quantization."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.spec import ModelSpec, TaskSpec, read_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the four arguments."""
    parser.add_argument("--model", help="folder or hub name of the base (default: what the adapter was trained on)")
    parser.add_argument("--adapter", type=Path, help="folder of a saved adapter; without it the bare model is run")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="storage and compute dtype of the base"
    )
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), help="storage of the base's linear layers")


def base_of(args: argparse.Namespace) -> ModelSpec:
    """The base model: the adapter's own, with what the command line says instead.

    Raises:
        UserError: neither says what the base is, or the adapter is none.
    """
    from curvelora.loading import read_adapter_config, stored_shapes

    if args.adapter:
        read_adapter_config(args.adapter)
        stored_shapes(args.adapter)
    stored = read_task(args.adapter) if args.adapter else None
    if stored is None and not args.model:
        where = f"{args.adapter} has no task.json" if args.adapter else "there is no --adapter to take it from"
        raise UserError(f"the base model is not known ({where}): give --model")
    if stored and stored[1].kind != "causal_lm":
        raise UserError(
            f"{args.adapter} was trained for {stored[1].kind}, and this command runs causal language models only"
        )
    said = {"path": args.model, "dtype": args.dtype, "quantization": args.quantization}
    spec = stored[0] if stored else ModelSpec(path=args.model)
    # never from the folder: an adapter from elsewhere must not switch this on
    return dataclasses.replace(spec, trust_remote_code=False, **{key: value for key, value in said.items() if value})


def load(spec: ModelSpec, adapter: Path | None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer).

    Raises:
        UserError: the checkpoint or the adapter cannot be read, or the adapter belongs to another base.
    """
    from curvelora.loading import check_fits, load_adapter, read_adapter_config
    from curvelora_eval.models import load_base, load_processor, shape_model
    from curvelora_eval.tasks import make_task

    task = make_task(TaskSpec(kind="causal_lm"))  # not the adapter's own, which may cut its inputs: nothing is cut here
    if adapter:
        check_fits(shape_model(spec, task), adapter)
    tokenizer = load_processor(spec, task)
    trained = getattr(read_adapter_config(adapter), "modules_to_save", None) if adapter else None
    model = load_base(spec, task, trained=trained or [])
    model = load_adapter(model, adapter) if adapter else model
    return model.eval(), tokenizer


def adapter_facts(adapter: Path | None) -> dict[str, Any] | None:
    """Where the adapter is and the hash of its weights."""
    from curvelora.loading import WEIGHTS_FILE
    from curvelora_eval.data import fingerprint

    return adapter and {"path": str(adapter), "sha256": fingerprint(adapter / WEIGHTS_FILE)}
