"""What a quantised base costs PiSSA, MiLoRA and OLoRA in this project's form, beside the papers' rewritten base (QPiSSA).

    python -m curvelora_training.bench.residual_quantisation --model .models/minilm --out docs/results/residual_quantisation.json

For every linear weight W of a checkpoint, with C what the init removes: the error |Q(W) - W| of a base that is quantised as it
is, and |Q(W - C) + C - W| of one that is rewritten before; Q is NF4 and back. The ratio is over all layers together (root of the
sums of squares): below 1 the rewritten base is nearer to the unquantised model at the start of training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor, nn
from transformers import AutoModel

from curvelora.cli import run_guarded
from curvelora.errors import UserError
from curvelora.registry import get_method
from curvelora_eval.environment import describe_environment
from curvelora_eval.files import write_json

METHODS = ("pissa", "milora", "olora")


def nf4_error(weight: Tensor) -> float:
    """Frobenius norm of what NF4 (blocks of 64, double quantisation) changes of `weight`, (d_out, d_in) fp32."""
    codes, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return (functional.dequantize_4bit(codes, quant_state=state) - weight).norm().item()


@torch.no_grad()
def measure(model: nn.Module, ranks: list[int]) -> dict[str, Any]:
    """Method -> rank -> ratio of the errors, over all linear layers whose rows are whole blocks."""
    # bitsandbytes on a CPU takes wrong scales where a block of codes ends inside a row
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features % 64 == 0}
    plain = sum(nf4_error(layer.weight.float()) ** 2 for layer in layers.values()) ** 0.5
    size = sum(layer.weight.norm().item() ** 2 for layer in layers.values()) ** 0.5
    found: dict[str, Any] = {"layers": len(layers), "relative_error": plain / size, "ratio": {}}
    for name in METHODS:
        method, of_rank = get_method(name), {}
        for r in ranks:
            config, squares = method.build_config(r=r, alpha=r), 0.0
            for path, layer in layers.items():
                adapted = method.model_class.tuner_layer_cls(layer, path)
                A0, B0 = adapted.removed_factors(config, None)
                squares += nf4_error(layer.weight.float() - B0 @ A0) ** 2
            of_rank[str(r)] = squares**0.5 / plain
        found["ratio"][name] = of_rank
    return found


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="unquantised checkpoint")
    parser.add_argument("--ranks", default="16,64", metavar="R,R,...", help="default 16,64")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON goes")
    args = parser.parse_args(argv)

    def work() -> int:
        try:
            ranks = [int(rank) for rank in args.ranks.split(",")]
        except ValueError:
            raise UserError(f"--ranks must be whole numbers, for example 16,64, not {args.ranks!r}") from None
        model = AutoModel.from_pretrained(args.model, dtype=torch.float32)
        record = {"schema": 1, "kind": "residual_quantisation", "model": Path(args.model).name, "ranks": ranks}
        record |= measure(model, ranks) | {"environment": describe_environment()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, record)
        for name, of_rank in record["ratio"].items():
            print(f"{name:8} " + "  ".join(f"r={r}: {ratio:.3f}" for r, ratio in of_rank.items()))
        print(f"written: {args.out}")
        return 0

    return run_guarded(work)


if __name__ == "__main__":
    sys.exit(main())
