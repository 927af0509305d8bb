"""Turn an adapter whose update is linear in the input into a plain LoRA adapter of rank K, with the error stated.

For servers that know LoRA only (vLLM and others): the result is PEFT's own format and needs no curvelora. It takes weight-space
methods (LoRAN), linear bottlenecks (AuroRA with mode static), and PEFT's methods that merge (DoRA, AdaLoRA, FourierFT, ...).
Every layer gets the best factors that rank K allows. The errors are printed and written to extract.json; a dense update may
need a high rank, so read them, and evaluate the result with `curvelora eval`. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from curvelora.errors import UserError
from curvelora_eval.spec import ModelSpec, TaskKind
from curvelora_eval.wording import percent

if TYPE_CHECKING:
    from peft import PeftConfig

    from curvelora_eval.extract import LayerResult
    from curvelora_eval.tasks import Task

DTYPES = ("float32", "bfloat16", "float16")
SHOWN = 10  # layers in the printed table
ENERGY = 0.999  # that --rank auto keeps
FAR = 0.1  # a relative error of the update above which the summary warns
# PEFT's task types -> the kinds of task that have the same model class
TASK_OF = {"CAUSAL_LM": "causal_lm", "SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "sequence_classification"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `curvelora extract`."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="folder of a saved adapter")
    parser.add_argument("--rank", required=True, help="rank of the LoRA, or auto: the smallest that keeps --energy")
    parser.add_argument("--out", required=True, type=Path, help="folder for the LoRA adapter; new or empty")
    parser.add_argument(
        "--energy", type=float, help=f"auto: share of each layer's squared norm to keep (default {ENERGY})"
    )
    parser.add_argument(
        "--dtype", dest="factor_dtype", choices=DTYPES, default="float32", help="dtype of the factors (default float32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this command has written")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to work (default: the GPU if there is one)")
    base = parser.add_argument_group("model and task (default: what the adapter was trained with, unquantised)")
    base.add_argument("--model", help="folder or hub name of the unquantised base model")
    base.add_argument(
        "--base-dtype",
        dest="dtype",
        choices=DTYPES,
        help="dtype of the base; matters where the update depends on it (DoRA)",
    )
    base.add_argument("--task", choices=get_args(TaskKind), help="task kind")
    base.add_argument("--labels", help="class names, comma-separated, in order of their index")
    # `resolve` asks for these, and extraction has no use for them
    parser.set_defaults(quantization=None, metrics=None, max_length=None, max_new_tokens=None, column=[])
    parser.set_defaults(trust_remote_code=False)


def run(args: argparse.Namespace) -> int:
    """Check everything, then load, extract and write."""
    import torch

    from curvelora.loading import check_fits, load_adapter, read_adapter_config, stored_shapes
    from curvelora_eval import extract
    from curvelora_eval.eval_command import resolve
    from curvelora_eval.files import check_folder
    from curvelora_eval.models import default_device, load_base, shape_model
    from curvelora_eval.spec import write_task
    from curvelora_eval.tasks import make_task

    rank, energy = _rank_and_energy(args)
    config = read_adapter_config(args.adapter)
    extract.check_extractable(args.adapter, config)
    stored_shapes(args.adapter)
    extract.check_target(args.out, args.adapter, args.overwrite)
    check_folder(args.out)
    check_folder(args.out.resolve().parent)  # where it is written under a temporary name
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and there is none here: leave it out")
    _fill_from_config(args, config)
    model_spec, task_spec = resolve(args)
    task = make_task(task_spec)
    if task.new_head and task_spec.kind != "regression" and task_spec.labels is None:
        raise UserError(
            "the class names are not known: give them in order of their index, for example --labels negative,positive"
        )
    base = _unquantised(args, model_spec, task)
    check_fits(shape_model(base, task), args.adapter)
    device = torch.device(args.device) if args.device else default_device()
    trained = getattr(config, "modules_to_save", None) or []
    model = load_adapter(load_base(base, task, device, trained=trained), args.adapter)
    layers = extract.adapted_layers(model)
    results = extract.extract(layers, rank, energy, getattr(torch, args.factor_dtype))
    heads = extract.trained_modules(model, args.adapter)
    record = extract_record(args, config, base, len(next(iter(results.values())).found.A), energy, results)
    with extract.replaced_folder(args.out) as folder:
        written = extract.lora_config(config, layers, record["rank"], base.path)
        extract.write_adapter(folder, written, results, heads, record)
        write_task(folder, dataclasses.replace(model_spec, dtype=base.dtype), task_spec)
        extract.check_written(shape_model(base, task), folder)
    print("\n".join(summary(record)))
    print(f"written: {args.out}")
    return 0


def _rank_and_energy(args: argparse.Namespace) -> tuple[int | None, float | None]:
    """The rank, and the share of energy that auto keeps; one of them is None."""
    if args.rank != "auto":
        if not args.rank.isdecimal() or int(args.rank) < 1:
            raise UserError(f"--rank takes a whole number of at least 1, or auto, not {args.rank!r}")
        if args.energy is not None:
            raise UserError(
                f"--energy decides what --rank auto takes, and --rank is {args.rank}: leave one of them out"
            )
        return int(args.rank), None
    energy = ENERGY if args.energy is None else args.energy
    if not 0 < energy < 1:
        raise UserError(f"--energy is a share above 0 and below 1, for example 0.999, not {energy}")
    return None, energy


def _fill_from_config(args: argparse.Namespace, config: PeftConfig) -> None:
    """Take what PEFT's own config says of base and task where there is neither a task.json nor an argument."""
    from curvelora_eval.spec import read_task

    if read_task(args.adapter) is None:
        args.model = args.model or config.base_model_name_or_path
        args.task = args.task or TASK_OF.get(str(getattr(config.task_type, "value", config.task_type)))


def _unquantised(args: argparse.Namespace, spec: ModelSpec, task: Task) -> ModelSpec:
    """The base to load: not quantised, in the dtype of the training, or else in its checkpoint's own.

    Raises:
        UserError: there is no such checkpoint, or it is quantised itself.
    """
    from curvelora_eval.models import load_config
    from curvelora_eval.spec import read_task

    config = load_config(spec, task)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"the checkpoint {spec.path} is quantised itself, and the update is taken beside full weights: give the checkpoint "
            "that it was made from as --model"
        )
    dtype = spec.dtype
    if args.dtype is None and read_task(args.adapter) is None:
        own = str(getattr(config, "dtype", None)).removeprefix("torch.")
        dtype = own if own in DTYPES else "float32"
    return dataclasses.replace(spec, quantization="none", dtype=dtype)


def extract_record(
    args: argparse.Namespace,
    config: PeftConfig,
    base: ModelSpec,
    rank: int,
    energy: float | None,
    results: dict[str, LayerResult],
) -> dict[str, Any]:
    """The content of extract.json, as in `docs/results_format.md`."""
    from curvelora.loading import WEIGHTS_FILE
    from curvelora_eval.data import fingerprint
    from curvelora_eval.environment import describe_environment
    from curvelora_eval.extract import overall
    from curvelora_eval.merge import method_of

    method = method_of(config)
    return {
        "schema": 1,
        "kind": "extract",
        "base": {"path": base.path, "revision": base.revision, "dtype": base.dtype},
        "adapter": {"path": str(args.adapter), "sha256": fingerprint(args.adapter / WEIGHTS_FILE)},
        "method": method.name if method else str(config.peft_type.value).lower(),
        "settings": method.settings(config) if method else {},
        "modules_to_save": sorted(getattr(config, "modules_to_save", None) or []),
        "rank": rank,
        "energy_asked": energy,
        "dtype": args.factor_dtype,
        "overall": overall(results),
        "layers": {name: result.as_dict() for name, result in results.items()},
        **describe_environment(),
    }


def summary(record: dict[str, Any]) -> list[str]:
    """What was extracted and what it misses, in plain words; of many layers, those with the largest errors."""
    layers, total = record["layers"], record["overall"]
    worst = sorted(layers, key=lambda name: -layers[name]["relative_error"])[:SHOWN]
    rows = [("module", "size", "error", "energy", "rank for 99 %", "99.9 %", "all")]
    for name in worst:
        layer = layers[name]
        ranks = [str(layer[key]) for key in ("rank_99", "rank_999", "rank_all")]
        size = f"{layer['d_out']} x {layer['d_in']}"
        rows.append((name, size, f"{layer['relative_error']:.2e}", percent(layer["energy"]), *ranks))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{record['method']} -> lora of rank {record['rank']}, {len(layers)} layers, in {record['dtype']}",
        f"error of the update (Frobenius, relative): {total['relative_error']:.2e} over all, "
        f"{layers[worst[0]]['relative_error']:.2e} in the worst layer; energy kept: {percent(total['energy'])}",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]
    if len(layers) > SHOWN:
        lines.append(f"{len(layers) - SHOWN} more layers, with smaller errors, are in extract.json")
    needed = max(layer["rank_all"] for layer in layers.values())
    if total["norm"] == 0:
        lines.append("warning: the update is zero in every layer: the adapter was not trained, or is not the one meant")
    elif needed < record["rank"]:
        lines.append(f"note: no update has a rank above {needed}, so --rank {needed} gives the same")
    if layers[worst[0]]["relative_error"] > FAR:
        lines.append(
            "warning: this LoRA is another adapter than the one it came from: evaluate it, or take a higher rank"
        )
    if trained := record["modules_to_save"]:
        lines.append(f"note: trained in full and carried along: {', '.join(trained)}; vLLM refuses such adapters")
    return lines
