"""ZeRO-1, 2 and 3 on two CPU processes: the same training as one process on the same global batches, whatever the method.

`curvelora matrix` makes the cells, in one process group, as a launch costs ten seconds of imports and a cell one or two; most
methods are slow tests.
"""

from __future__ import annotations

import shutil
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
from curvelora_training.bench.processes import join
from curvelora_training.config import RecipeError
from curvelora_training.matrix.cells import Cell
from curvelora_training.matrix.matrix import Matrix, open_matrix
from curvelora_training.prepare import load_and_prepare
from curvelora_training.run import train
from curvelora_training.saving import check_saved
from curvelora_training.zero3 import BY_MODULES, share_held
from run_files import metrics

REFUSED = {
    "delora": "which PEFT takes of ZeRO-3's placeholders",
    "adalora": "DeepSpeed has cleared them by then",
}
REFUSED_BY_FSDP = {"full": "leaves nothing frozen for FSDP2"}
# fp32 shows that the arithmetic agrees; bf16 and NF4, that the base is stored as asked
FP32 = [name for name in METHODS if name not in ("qlora", "dora_dynamic")]
BF16 = ["loran", "ranlora", "neat"]
QUANTISED = ["qlora", "loran", "ranlora", "aurora", "neat"]
# a causal language model has no new head, and so no wrapper around one: another order of modules
LANGUAGE = [name for name in FP32 if name not in ("delora", "adalora", "bitfit", "linear_probing")]
OFFLOADED = ("1_offload", "2_offload", "3_offload", "3_offload_params")


def classifier(base: str, method: str, kind: int | str = 3) -> Cell:
    return Cell("classifier", base, method, f"zero{kind}")


def language(method: str) -> Cell:
    return Cell("lm", "fp32", method, "zero3")


CELLS = [classifier("fp32", method) for method in FP32] + [language(method) for method in LANGUAGE]
CELLS += [classifier("bf16", method) for method in BF16] + [classifier("nf4", method) for method in QUANTISED]
CELLS += [classifier("fp32", "ranlora", stage) for stage in (1, 2)]
CELLS += [classifier("fp32", "loran", kind) for kind in (1, 2, *OFFLOADED)]
CELLS += [Cell("classifier", "fp32", "loran", "ddp"), Cell("lm", "nf4", "aurora", "ddp")]
SHARDED = [Cell("classifier", "bf16", method, "fsdp2") for method in ("loran", "dora")]
SHARDED += [
    Cell("lm", "fp32", method, "fsdp2") for method in ("ranlora", "neat", "aurora", "adalora", "delora", "pissa")
]
SHARDED += [Cell("classifier", "fp32", method, "fsdp2") for method in ("bitfit", "linear_probing", "full")]
CELLS += SHARDED
# the others are slow tests, and `curvelora matrix` makes all combinations
CORE = {classifier("fp32", m) for m in ("loran", "ranlora", "aurora", "full", "bitfit", "delora", "adalora")}
CORE |= {language(method) for method in ("loran", "ranlora", "neat", "full", "lora")}
CORE |= {classifier("fp32", "loran", kind) for kind in (1, 2, "3_offload_params")}
CORE |= {
    classifier("nf4", "loran"),
    classifier("bf16", "loran"),
    Cell("classifier", "fp32", "loran", "ddp"),
    SHARDED[0],
}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Matrix:
    folder = tmp_path_factory.mktemp("zero")
    return open_matrix(folder, 2, root / "ds_configs", ["classifier", "lm"])[0]


def made(matrix: Matrix, cell: Cell) -> dict[str, Any]:
    """The record of this cell, which is made with its like when one is asked for."""
    if matrix.record(cell) is None:
        matrix.make([c for c in CELLS if (c in CORE) is (cell in CORE)])
    record = matrix.record(cell)
    assert record is not None
    return record


@pytest.mark.parametrize(
    "cell", [pytest.param(c, id=c.name, marks=() if c in CORE else pytest.mark.slow) for c in CELLS]
)
def test_training_is_that_of_one_process(matrix: Matrix, cell: Cell) -> None:
    """Losses, evaluation, start shift and what is saved; the base lies in shares, in the dtype that was asked for."""
    record = made(matrix, cell)
    if said := (REFUSED_BY_FSDP if cell.engine == "fsdp2" else REFUSED).get(cell.method):
        assert record["status"] == "refused" and said in record["why"]
        assert not matrix.run(cell).exists()
        return
    assert record["status"] == "agrees", record["why"]
    used, measured = record["engine_used"], record["measured"]
    stage = int(cell.engine[4]) if cell.engine.startswith("zero") else None
    engine = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP2"}.get(cell.engine, "DeepSpeedEngine")
    assert (used["engine"], used["zero_stage"], used["processes"]) == (engine, stage, 2)
    frozen = "" if (cell.task, cell.method) == ("lm", "full") else "float32"  # nothing is
    assert used["frozen_dtype"] == {"bf16": "bfloat16", "nf4": "bfloat16, uint8"}.get(cell.base, frozen)
    # the tiny BERT's positions are a quarter of it, and stay whole with FSDP2
    share = 0.5 if stage == 3 else 1 if cell.engine != "fsdp2" else 0.5 if cell.task == "lm" else 0.636
    assert used["share_of_base"] == pytest.approx(share, abs=0.02)
    by_modules = cell.method in BY_MODULES or cell.engine == "zero3_offload_params"
    if cell.method in ("loran", "qlora"):
        assert used["fused_layers"] == 0 and sum(used["unfused_layers"].values()) > 0  # on a CPU
    assert used["base_gathered_by"] == (None if stage != 3 else "modules" if by_modules else "blocks")
    # AdamW's first steps go by the signs of gradients, which rounding decides where they are zero but for rounding
    free = (cell.task, cell.method) == ("lm", "full")
    rounded = cell.base in ("bf16", "nf4")
    assert max(measured["loss"], measured["eval_loss"]) <= (2e-3 if rounded else 1e-4 if free else 1e-5)
    assert measured["largest_entry"] <= (3e-3 if rounded or free else 1e-5)
    # four steps move an entry by up to 2.5e-3: on the mean the two runs have to agree far better than that
    assert measured["mean_entry"] <= 2.5e-4
    lines = metrics(matrix.run(cell))
    assert [sum(kind in line for line in lines) for kind in ("loss", "eval_loss")] == [4, 1]
    assert load_file(matrix.run(cell) / "adapter/adapter_model.safetensors")


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
        (
            {"adapter": {"method": "dora", "r": 4}, "model.quantization": "nf4", "model.dtype": "bfloat16"},
            "PEFT make another weight of the one that ZeRO-3 keeps",
        ),
        ({"adapter": {"method": "delora", "r": 4}}, "which PEFT takes of ZeRO-3's placeholders"),
    ],
)
def test_what_zero_3_cannot_do_is_refused(
    recipe: dict, write: Callable[..., Path], root: Path, changes: dict[str, Any], said: str
) -> None:
    path = write(recipe, **changes, **{"training.deepspeed": str(root / "ds_configs/zero3.json")})
    with pytest.raises(RecipeError, match=said):
        load_and_prepare(path, [])


@pytest.mark.parametrize(
    ("environment", "changes", "said"),
    [
        ({}, {"model.quantization": "nf4", "model.dtype": "bfloat16"}, "nf4 stores bytes .* which FSDP2 cannot share"),
        ({}, {"adapter": {"method": "full"}}, "leaves nothing frozen for FSDP2 to share"),
        ({}, {"training.gradient_checkpointing": True}, "has not been tried with FSDP2"),
        ({}, {"training.deepspeed": "ds_configs/zero2.json"}, "exclude each other"),
        ({"FSDP_VERSION": "1"}, {}, "asks for FSDP 1: take ds_configs/accelerate_fsdp2.yaml"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "offloading with FSDP2 is not there"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(
    recipe: dict,
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    environment: dict[str, str],
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(root)
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        load_and_prepare(write(recipe, **changes), [])


def test_fsdp_on_one_process_and_in_the_lab_is_refused(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="shares the base between processes, and there is one"):
        train(load_and_prepare(write(recipe), []))
    with pytest.raises(UserError, match="asks for FSDP, and a comparison"):
        join()


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
