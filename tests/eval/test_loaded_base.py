"""One base for many adapters: each leaves it as it was, or it is loaded again."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from curvelora.errors import UserError
from curvelora.registry import METHODS
from curvelora_eval.evaluation import checkpoint_hash
from curvelora_eval.evaluation.arms import Arm, labels
from curvelora_eval.evaluation.ask import base_notes, model_spec
from curvelora_eval.evaluation.loaded_base import LoadedBase, checksum
from curvelora_eval.spec import ModelSpec, TaskSpec
from named_tasks import save_adapter
from run_files import result

IDS = torch.arange(3, 35)[None]
# the methods that a recipe can put on a causal model with nothing but a rank and target modules, one of each kind of layer
TRIED = ("lora", "dora", "loran", "ranlora", "aurora", "neat", "pissa", "fourierft", "adalora")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def base(llama_folder: Path) -> LoadedBase:
    return LoadedBase(lambda: AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="eager"))


@pytest.mark.parametrize("name", TRIED)
def test_an_adapter_leaves_no_trace(base: LoadedBase, llama_folder: Path, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    options |= {"adalora": {"total_step": 10}, "fourierft": {"n_frequency": 16}}.get(name, {"r": 4})
    adapter = save_adapter(tmp_path / name, llama_folder, METHODS[name].build_config(**options))
    before, loads = logits(base.bare()), base.loads
    places = list(base.bare().named_modules())
    with_adapter = logits(base.put_on(adapter))
    assert not torch.allclose(before, with_adapter, atol=1e-3)
    assert base.take_off() is None
    assert torch.equal(logits(base.bare()), before) and base.loads == loads
    assert list(base.bare().named_modules()) == places
    assert torch.equal(logits(base.put_on(adapter)), with_adapter)
    assert base.take_off() is None


def test_an_adapter_with_a_head_of_its_own_leaves_the_bases_head(
    base: LoadedBase, llama_folder: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = save_adapter(tmp_path / "a", llama_folder, config)
    before = logits(base.bare())
    base.put_on(adapter)
    assert base.take_off() is None and torch.equal(logits(base.bare()), before)


def test_a_base_that_was_changed_is_loaded_again(base: LoadedBase, llama_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = save_adapter(tmp_path / "a", llama_folder, config)
    before, loads = logits(base.bare()), base.loads
    base.put_on(adapter).merge_and_unload()
    said = base.take_off()
    assert "model.layers.0.self_attn.q_proj.weight" in said and "loaded again" in said
    assert torch.equal(logits(base.bare()), before) and base.loads == loads + 1


def test_a_checksum_sees_one_bit_and_a_swap() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(torch.bfloat16)
    before = checksum(model)
    assert checksum(model) == before and "1.running_mean" in before
    weight = model[0].weight.data
    first = weight[0, 0].item()
    weight[0, 0] = torch.nextafter(torch.tensor(first), torch.tensor(9.0)).bfloat16() + 0.01
    assert checksum(model) != before
    weight[0, 0] = first
    assert checksum(model) == before
    weight[0, :2] = weight[0, :2].flip(0).clone()
    assert checksum(model) != before


def test_labels_are_the_runs_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [Path(p) for p in ("runs/a/adapter", "runs/b/adapter/", "mine")]
    assert labels(paths) == ["a", "b", "mine"]
    assert labels([Path("x/a/adapter"), Path("y/a/adapter"), Path("b")]) == ["x-a", "y-a", "b"]
    assert labels([Path("x/one/a"), Path("y/one/a"), Path("x/two/a")]) == ["x-one-a", "y-one-a", "two-a"]
    assert labels([Path("x/baseline")]) == ["x-baseline"]  # which the bare model is called
    assert labels([Path("run"), Path("run/adapter")]) == ["1-run", "2-run"]
    with pytest.raises(UserError, match="given twice"):
        labels([Path("a"), Path("b/../a")])


def test_adapters_that_were_trained_on_different_bases(llama_folder: Path) -> None:
    def arm(label: str, **model: Any) -> Arm:
        spec = ModelSpec(**{"path": "models/seven", "dtype": "float32"} | model)
        return Arm(label, Path(label), LoraConfig(), (spec, TaskSpec(kind="causal_lm")))

    def resolved(*arms: Arm, **given: Any) -> tuple[ModelSpec, list[str]]:
        args = argparse.Namespace(
            **{"model": None, "dtype": None, "quantization": None, "trust_remote_code": False} | given
        )
        spec = model_spec(args, list(arms))
        return spec, [note for arm in arms for note in base_notes(arm, spec)]

    spec, notes = resolved(arm("a", quantization="nf4"), arm("b", quantization="nf4"))
    assert (spec.path, spec.dtype, spec.quantization, notes) == ("models/seven", "float32", "nf4", [])
    with pytest.raises(UserError, match=r"a: nf4, b: none.*--quantization"):
        resolved(arm("a", quantization="nf4"), arm("b"))
    assert resolved(arm("a", quantization="nf4"), arm("b"), quantization="int8")[0].quantization == "int8"
    with pytest.raises(UserError, match=r"--model"):
        resolved(arm("a"), arm("b", path="models/eight"))
    spec, notes = resolved(arm("a"), arm("b", path="models/eight"), model="elsewhere/seven")
    assert spec.path == "elsewhere/seven" and notes == ["b was trained on models/eight, and is put on elsewhere/seven"]
    old, new = arm("a", path="org/seven", revision="one"), arm("b", path="org/seven", revision="two")
    spec, notes = resolved(old, new)
    assert spec.revision == "one"
    assert notes == ["b was trained on org/seven at revision two, and is put on org/seven at revision one"]
    assert resolved(old, model="org/eight")[0].revision is None  # a commit of another repository
    assert resolved(arm("b", path="org/eight", revision="x"), old, model="org/seven")[0].revision == "one"
    with pytest.raises(UserError, match="give --model"):
        resolved(Arm("baseline"))
    assert not resolved(arm("a", trust_remote_code=True))[0].trust_remote_code


@pytest.mark.usefixtures("offline")
def test_another_base_is_said_in_the_result(
    evaluate: Callable[..., Path],
    adapters: dict[str, Path],
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By content: a copy elsewhere is the same base, and a folder of the same name need not be."""
    copy = Path(shutil.copytree(llama_folder, tmp_path / "copy/other-name"))
    other = Path(shutil.copytree(llama_folder, tmp_path / "other" / llama_folder.name))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    task = ["--task", "boolq", "--protocol", "loglikelihood", "--batch-check", 0, "--limit", 2]
    task += ["--adapter", adapters["lora"], "--baseline"]
    for model, notes in (
        (copy, []),
        (other, [f"lora was trained on {llama_folder}, and is put on {other}"]),
    ):
        capsys.readouterr()
        out = evaluate(*task, "--model", model, out=tmp_path / "scores" / model.parent.name)
        found = {
            label: result(out / label / "boolq-loglikelihood", "evaluation.json") for label in ("lora", "baseline")
        }
        assert (found["lora"]["notes"], found["baseline"]["notes"]) == (notes, [])
        said, summary = capsys.readouterr().out, result(out, "summary.json")["scores"]["lora"]["boolq-loglikelihood"]
        assert all(f"note: {note}" in said and note in summary["remarks"] for note in notes)
        assert said.count("was trained on") == 2 * len(notes)


def test_a_large_checkpoint_is_known_by_samples(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    def found() -> dict[str, Any]:
        return checkpoint_hash.checkpoint_hash(ModelSpec(path=str(copy)))

    copy = Path(shutil.copytree(llama_folder, tmp_path / "copy"))
    whole = found()
    assert whole["sha256_of"] == "contents" and found() == whole
    monkeypatch.setattr(checkpoint_hash, "WHOLE", 100)
    sampled = found()
    assert sampled["sha256_of"] == "headers and samples" and sampled["sha256"] != whole["sha256"]
    weights = load_file(copy / "model.safetensors")
    save_file({n: x + 1e-3 for n, x in weights.items()}, copy / "model.safetensors", metadata={"format": "pt"})
    assert found()["sha256"] != sampled["sha256"]
    monkeypatch.undo()
    assert found()["sha256"] != whole["sha256"]
    missing = checkpoint_hash.checkpoint_hash(ModelSpec(path="nobody/nothing-of-that-name"))
    assert missing == {"sha256": None, "sha256_of": None}
