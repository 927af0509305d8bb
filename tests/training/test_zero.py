"""ZeRO-1, 2 and 3 on two CPU processes: the same training as one process on the same global batches, whatever the method.

One launch makes all cells (`cells.py`), as a launch costs ten seconds of imports and a cell one or two; most methods are slow
tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification

from curvelora import METHODS
from curvelora.errors import UserError
from curvelora_training.config import RecipeError
from curvelora_training.prepare import load_and_prepare
from curvelora_training.saving import check_saved
from curvelora_training.zero3 import share_held
from run_files import metrics, result

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
REFUSED = {
    "delora": "which PEFT takes of ZeRO-3's placeholders",
    "adalora": "DeepSpeed has cleared them by then",
}
NF4 = ["model.dtype=bfloat16", "model.quantization=nf4"]
# fp32 shows that the arithmetic agrees; bf16 and NF4, that the base is stored as asked
FP32 = [name for name in METHODS if name not in ("qlora", "dora_dynamic")]
BF16 = ["loran", "ranlora", "neat"]
QUANTISED = ["qlora", "loran", "ranlora", "aurora", "neat"]
# a causal language model has no new head, and so no wrapper around one: another order of modules
LANGUAGE = [name for name in FP32 if name not in ("delora", "adalora", "bitfit", "linear_probing")]


def adapter(method: str, targets: tuple[str, ...] = ("query", "value")) -> str:
    """Small settings of this method, as an override; without dropout: its masks differ between one process and two."""
    own: dict[str, Any] = {"method": method}
    if method not in ("bitfit", "full", "linear_probing"):
        own["target_modules"] = targets
        own |= {"fourierft": {"n_frequency": 50}, "adalora": {"init_r": 4, "target_r": 2}}.get(method, {"r": 4})
        if method not in ("fourierft", "adalora", "delora"):
            own |= {"alpha": 8, "dropout": 0.0}
    return f"adapter={json.dumps(own)}"


def deepspeed(kind: int | str) -> str:
    return f"training.deepspeed=ds_configs/zero{kind}.json"


# "METHOD BASE ZeRO-KIND" -> overrides
CELLS = {f"{method} fp32 ZeRO-3": [adapter(method), deepspeed(3)] for method in FP32}
CELLS |= {f"{method} bf16 ZeRO-3": [adapter(method), "model.dtype=bfloat16", deepspeed(3)] for method in BF16}
CELLS |= {f"{method} nf4 ZeRO-3": [adapter(method), *NF4, deepspeed(3)] for method in QUANTISED}
CELLS |= {f"{method} lm ZeRO-3": [adapter(method, ("q_proj", "down_proj")), deepspeed(3)] for method in LANGUAGE}
CELLS |= {f"ranlora fp32 ZeRO-{stage}": [adapter("ranlora"), deepspeed(stage)] for stage in (1, 2)}
OFFLOADED = ("1_offload", "2_offload", "3_offload", "3_offload_params")
CELLS |= {f"loran fp32 ZeRO-{kind}": [adapter("loran"), deepspeed(kind)] for kind in (1, 2, *OFFLOADED)}
# the others are slow tests
CORE = {f"{method} fp32 ZeRO-3" for method in ("loran", "ranlora", "aurora", "full", "bitfit", "delora", "adalora")}
CORE |= {f"{method} lm ZeRO-3" for method in ("loran", "ranlora", "neat", "full", "lora")}
CORE |= {"loran fp32 ZeRO-1", "loran fp32 ZeRO-2", "loran fp32 ZeRO-3_offload_params"}
CORE |= {"loran nf4 ZeRO-3", "loran bf16 ZeRO-3"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], root: Path) -> Callable[[str], Path]:
    """`made(name)` -> the run of that cell, beside which "NAME alone" is that of one process; made with its like when asked."""
    folder = tmp_path_factory.mktemp("zero")
    rows = [{"path": str(root / f"tests/data/sst2_sentences_{name}.tsv"), "limit": 32} for name in ("train", "unseen")]
    settings = {"learning_rate": 1e-3, "epochs": 1, "batch_size": 4, "eval_batch_size": 4, "log_every": 1}
    recipe = {
        "output": str(folder / "unused"),
        "model": {"path": str(tiny_models["bert"]), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 32},
        "data": {"train": rows[0], "validation": rows[1], "test": rows[1] | {"limit": 20}},
        "adapter": {"method": "loran"},
        "training": settings,
    }
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    recipe["model"]["path"] = str(tiny_models["llama"])
    recipe["task"] = {"kind": "causal_lm", "columns": {"text": "sentence"}, "max_length": 32}
    (folder / "lm.json").write_text(json.dumps(recipe), encoding="utf-8")

    def make(core: bool) -> None:
        two, one = [], []
        for name, overrides in CELLS.items():
            if (name in CORE) is core:
                path = folder / ("lm.json" if name.split()[1] == "lm" else "recipe.json")
                two.append([str(path), [*overrides, f"output={folder / name}"]])
                if name.split()[0] not in REFUSED:
                    alone = [o for o in overrides if "deepspeed" not in o]
                    one.append([str(path), [*alone, "training.batch_size=8", f"output={folder / name} alone"]])
        for launcher, listed in ((TORCHRUN, two), ([sys.executable], one)):
            (folder / "cells.json").write_text(json.dumps(listed), encoding="utf-8")
            run([*launcher, str(root / "tests/training/cells.py"), str(folder / "cells.json")], root)

    groups: set[bool] = set()

    def made(name: str) -> Path:
        core = name in CORE
        if core not in groups:
            make(core)
            groups.add(core)
        return folder / name

    return made


def run(command: list[str], root: Path) -> None:
    done = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("name", [n if n in CORE else pytest.param(n, marks=pytest.mark.slow) for n in CELLS])
def test_training_is_that_of_one_process(made: Callable[[str], Path], name: str) -> None:
    """Losses, evaluation, start shift and what is saved; the base lies in shares, in the dtype that was asked for."""
    method, base, engine = name.split()
    run = made(name)
    refused, alone = (run.with_name(f"{name}{ending}") for ending in (".refused", " alone"))
    if method in REFUSED:
        assert REFUSED[method] in refused.read_text(encoding="utf-8")
        assert not run.exists()
        return
    assert not refused.exists(), refused.read_text(encoding="utf-8")
    used = result(run)["engine"]
    assert (used["engine"], used["zero_stage"], used["processes"]) == ("DeepSpeedEngine", int(engine[5]), 2)
    frozen = "" if name.startswith("full lm") else "float32"  # nothing is
    assert used["frozen_dtype"] == {"bf16": "bfloat16", "nf4": "bfloat16, uint8"}.get(base, frozen)
    assert used["share_of_base"] == pytest.approx(0.5 if used["zero_stage"] == 3 else 1, abs=0.01)
    rounded = base in ("bf16", "nf4")
    # AdamW's first steps go by the signs of gradients, which rounding decides where they are zero but for rounding
    free = name.startswith("full lm")
    for kind in ("loss", "eval_loss"):
        losses, wanted = ([line[kind] for line in metrics(f) if kind in line] for f in (run, alone))
        assert losses == pytest.approx(wanted, rel=2e-3 if rounded else 1e-4 if free else 1e-5)
        assert len(losses) == (4 if kind == "loss" else 1)
    shifts = [(result(f)["start_shift"] or {}).get("relative") for f in (run, alone)]
    assert shifts[0] == pytest.approx(shifts[1], rel=1e-3, abs=1e-6)
    saved, wanted = (load_file(f / "adapter/adapter_model.safetensors") for f in (run, alone))
    for key, tensor in wanted.items():
        if ".original_module." not in key:  # see check_saved
            torch.testing.assert_close(saved[key], tensor, rtol=1e-4, atol=3e-3 if rounded or free else 1e-5)
            # four steps move an entry by up to 2.5e-3: on the mean the two runs have to agree far better than that
            apart = (saved[key].double() - tensor.double()).abs().mean().item()
            assert apart <= 2.5e-4
    scores = [json.loads((f / "evaluation.json").read_text()) for f in (run, alone)]
    values = [score["metrics"][score["primary_metric"]]["value"] for score in scores]
    assert values[0] == pytest.approx(values[1], rel=0.2 if rounded else 1e-3 if free else 1e-5)


def test_the_share_counts_what_stays_whole() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)).requires_grad_(False)
    assert share_held(model) == 1
    for layer in model:
        layer.weight.ds_numel, layer.weight.ds_tensor, layer.weight.ds_persist = 100, torch.zeros(50), False
        layer.weight.data = torch.zeros(0)
    assert share_held(model) == 0.5
    model[0].weight.ds_persist = True
    assert share_held(model) == 0.75


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.max_steps": 0}, "ZeRO-3 cannot run without training"),
        ({"model.quantization": "int8"}, "int8 keeps its codes where ZeRO-3 does not look"),
        ({"adapter": {"method": "full"}, "model.dtype": "bfloat16"}, "set model.dtype=float32, or take ZeRO-2"),
        ({"adapter": {"method": "delora", "r": 4}}, "which PEFT takes of ZeRO-3's placeholders"),
    ],
)
def test_what_zero_3_cannot_do_is_refused(
    recipe: dict, write: Callable[..., Path], root: Path, changes: dict[str, Any], said: str
) -> None:
    path = write(recipe, **changes, **{"training.deepspeed": str(root / "ds_configs/zero3.json")})
    with pytest.raises(RecipeError, match=said):
        load_and_prepare(path, [])


def test_a_broken_configuration_is_reported_once(recipe: dict, write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "z.json").write_text("{")
    with pytest.raises(RecipeError) as caught:
        load_and_prepare(write(recipe, **{"training.deepspeed": str(tmp_path / "z.json")}), [])
    assert str(caught.value).count("is no valid JSON") == 1


def test_a_head_of_other_classes_is_refused_under_zero_3(
    recipe: dict, write: Callable[..., Path], root: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    five = BertForSequenceClassification.from_pretrained(tiny_models["bert"], num_labels=5)
    five.save_pretrained(tmp_path / "five")
    for file in tiny_models["bert"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "five")
    changes = {"model.path": str(tmp_path / "five")}
    load_and_prepare(write(recipe, **changes), [])
    changes["training.deepspeed"] = str(root / "ds_configs/zero3.json")
    with pytest.raises(RecipeError, match=r"classifier\.\w+ in the shape \(5, ?(64)?\), \(2, ?(64)?\) is needed"):
        load_and_prepare(write(recipe, **changes), [])


def test_a_saved_adapter_is_read_again(recipe: dict, write: Callable[..., Path], tmp_path: Path) -> None:
    """A tensor that is missing, foreign or empty is found."""
    shapes = load_and_prepare(write(recipe), []).shapes
    file = tmp_path / "adapter_model.safetensors"
    from peft import get_peft_model_state_dict

    whole = {name: torch.zeros(t.shape) for name, t in get_peft_model_state_dict(shapes).items()}
    save_file(whole, file)
    check_saved(tmp_path, shapes)
    name = next(iter(whole))
    for damaged in (
        {key: tensor for key, tensor in whole.items() if key != name},
        whole | {"foreign": torch.zeros(1)},
        whole | {name: torch.zeros(0)},
    ):
        save_file(damaged, file)
        with pytest.raises(UserError, match="the saved adapter is not whole"):
            check_saved(tmp_path, shapes)


def test_a_checkpoint_that_is_not_whole_ends_the_run(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor is saved empty, as ZeRO-3 would elsewhere: the run ends, and keeps the checkpoint before and no other."""
    from curvelora_training.run import train
    from curvelora_training.trainer import AdapterTrainer

    path = write(recipe, **{"training.max_steps": 4, "training.save_every": 2})
    saves = []
    whole = AdapterTrainer._save

    def half(self: AdapterTrainer, output_dir: str, state_dict: Any = None) -> None:
        whole(self, output_dir, state_dict)
        saves.append(output_dir)
        if len(saves) == 2:
            file = Path(output_dir) / "adapter_model.safetensors"
            tensors = load_file(file)
            save_file(tensors | {next(iter(tensors)): torch.zeros(0)}, file)

    monkeypatch.setattr(AdapterTrainer, "_save", half)
    with pytest.raises(UserError, match=r"the saved adapter is not whole: .* has the shape \(0,\) in the file"):
        train(load_and_prepare(path, []))
    folder = Path(recipe["output"])
    assert [p.name for p in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / "adapter").exists() and not (folder / "result.json").exists()
