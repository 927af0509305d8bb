"""`training.kernels` and `training.liger`: what a run takes, what its user is told, and what is refused before weights load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from curvelora import LoranConfig
from curvelora.errors import UserError
from curvelora.kernels import choice
from curvelora_training import kernel_choice
from curvelora_training.config import RecipeError, TrainingSpec, load_recipe
from curvelora_training.distributed import gpus_elsewhere
from curvelora_training.kernel_choice import check_fp8, choose_kernels
from curvelora_training.launch.checks import as_in_job
from curvelora_training.liger import check_liger
from curvelora_training.prepare import load_and_prepare
from liger_stub import has_gpu, install

ADAPTERS = 4


@pytest.fixture
def model() -> Any:
    """A Llama of two layers with two adapters each."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))
    return get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"]))


@pytest.fixture
def fusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """`fusing(3)`: three layers can take the fused path -> the modes that are asked for."""

    def fuse(layers: int) -> list[str]:
        modes: list[str] = []
        answers = {"auto": (layers, +Counter({"on Mars": ADAPTERS - layers})), "off": (0, Counter({"off": ADAPTERS}))}
        answers["fp8"] = answers["auto"]
        monkeypatch.setattr(kernel_choice, "use_kernels", lambda model, mode: modes.append(mode) or answers[mode])
        return modes

    return fuse


@pytest.fixture
def language(recipe: dict[str, Any], tiny_models: dict[str, Path], root: Path) -> dict[str, Any]:
    """A language model on problems, with gradient checkpointing."""
    problems = {"path": str(root / "tests/data/gsm8k_sample.jsonl"), "limit": 12}
    recipe["model"]["path"] = str(tiny_models["llama"])
    recipe["adapter"] |= {"target_modules": ["q_proj", "down_proj"]}
    recipe["training"] |= {"gradient_checkpointing": True, "max_steps": 2, "log_every": 1}
    task = {"kind": "causal_lm", "columns": {"text": "question"}, "max_length": 32}
    return recipe | {"task": task, "data": {"train": problems, "validation": problems}}


@pytest.mark.parametrize("written", ["off", "'off'"])
def test_off_is_no_boolean(recipe: dict[str, Any], write: Callable[..., Path], written: str) -> None:
    path = write(recipe)
    assert load_recipe(path).training.kernels == "auto" and not load_recipe(path).training.liger
    loaded = load_recipe(path, [f"training.kernels={written}"])
    assert loaded.training.kernels == "off"
    path.write_text(loaded.as_yaml(), encoding="utf-8")
    assert load_recipe(path) == loaded
    with pytest.raises(RecipeError, match=r"training\.kernels"):
        load_recipe(path, ["training.kernels=on"])


@pytest.mark.parametrize(
    ("fused", "spec", "fsdp", "mode", "said"),
    [
        (4, {}, False, "auto", "fused kernels: 4 of 4 adapter layers"),
        (3, {}, False, "auto", "fused kernels: 3 of 4 adapter layers (not: 1 on Mars)"),
        (4, {"kernels": "off"}, False, "off", None),
        (4, {"kernels": "off", "liger": True}, False, "off", "fused kernels: 0 of 4 adapter layers (not: 4 off), the rest of "
            "the model by liger-kernel"),
        (4, {"liger": True, "keep_products": 3}, True, "off", "fused kernels: 0 of 4 adapter layers (not: FSDP2 shares the "
            "base), the rest of the model by liger-kernel"),
        (0, {}, False, "auto", None),
        (4, {"kernels": "fp8"}, False, "fp8", "fused kernels: 4 of 4 adapter layers, FP8 in their gradients where its error is "
            "bounded"),
    ],
)  # fmt: skip
def test_the_line_at_the_start(
    model: Any,
    fusing: Callable[[int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    fused: int,
    spec: dict[str, Any],
    fsdp: bool,
    mode: str,
    said: str | None,
) -> None:
    patched = []
    monkeypatch.setattr(kernel_choice, "use_liger", lambda model, keeps: patched.append((model, keeps)))
    monkeypatch.setattr(kernel_choice.torch.cuda, "is_available", lambda: False)
    modes, line = fusing(fused), choose_kernels(model, TrainingSpec(**spec), fsdp)
    assert modes == [mode] and patched == [(model.get_base_model(), "keep_products" in spec)] * spec.get("liger", False)
    assert line == said


def test_on_a_gpu_the_line_says_that_nothing_is_fused_and_why(
    model: Any, fusing: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fusing(0)
    monkeypatch.setattr(kernel_choice.torch.cuda, "is_available", lambda: True)
    assert choose_kernels(model, TrainingSpec()) == "fused kernels: 0 of 4 adapter layers (not: 4 on Mars)"


def test_the_kernels_themselves_are_asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice.torch.cuda, "is_available", lambda: True)
    line = choose_kernels(model, TrainingSpec(kernels="off"))
    assert line.startswith("fused kernels: 0 of 4 adapter layers (not: 4 ")


def test_a_run_with_liger_is_the_same_run(
    language: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    fusing: Callable[[int], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(tmp_path / "site", monkeypatch)
    modes, path = fusing(2), write(language)
    plain = finetune(path)
    assert "fused kernels: 2 of 4 adapter layers (not: 2 on Mars)" in capsys.readouterr().out
    folder = finetune(path, "training.liger=true", "training.kernels=off", f"output={tmp_path / 'with'}")
    assert "fused kernels: 0 of 4 adapter layers (not: 4 off), the rest" in capsys.readouterr().out
    assert modes == ["auto", "off"]
    from liger_kernel.transformers.monkey_patch import calls

    assert calls["loss"] > 2 and calls["rope"] == 2 * calls["loss"] + 2 * 2  # two layers, made again in two steps
    file = "adapter/adapter_model.safetensors"
    assert (folder / file).read_bytes() == (plain / file).read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.path": "bert"}, "training.liger: liger-kernel has nothing for models of type bert"),
        (
            {"adapter.target_modules": ["lm_head"]},
            "training.liger: liger-kernel's loss takes the output layer's weight",
        ),
        ({"training.deepspeed": "zero3.json"}, "training.liger takes weights without calling their layers"),
    ],
)
def test_what_liger_cannot_do_is_said_before_weights_are_read(
    language: dict[str, Any],
    write: Callable[..., Path],
    tiny_models: dict[str, Path],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    install(tmp_path / "site", monkeypatch)
    if "training.deepspeed" in changes:
        changes = {"training.deepspeed": str(root / "ds_configs/zero3.json")}
    if "model.path" in changes:
        changes = {"model.path": str(tiny_models["bert"]), "adapter.target_modules": ["query"]}
    with pytest.raises(RecipeError, match=said):
        load_and_prepare(write(language, **changes, **{"training.liger": True}), [])


def test_liger_that_is_not_installed_is_said_with_the_other_errors(
    language: dict[str, Any], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvelora_training.liger.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as caught:
        load_and_prepare(
            write(language, **{"training.liger": True, "training.keep_best": True, "data.validation": None}), []
        )
    assert "training.liger: liger-kernel is not installed: pip install liger-kernel" in str(caught.value)
    assert "training.keep_best needs validation rows" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"capability": (8, 9)}, None),
        ({"capability": (8, 6)}, r"a GPU of capability 8\.6 has no FP8, which needs 8\.9"),
        ({"capability": None}, "there are no kernels: on a CPU"),
        ({"mode": "off"}, "CURVELORA_KERNELS=off leaves kernels out"),
        ({"triton": "Triton is not installed"}, "Triton is not installed"),
        ({"shared": True}, "where DeepSpeed gathers the base by modules or FSDP2 shares it"),
        ({"config": LoraConfig()}, "it is for LoRAN's gradients, and lora has none"),
        ({"config": LoranConfig(activation="relu")}, "there is no bound on an f that is learned"),
        ({"config": LoranConfig(learn="amplitude")}, "there is no bound on an f that is learned"),
        ({"dtype": "float32"}, r"model\.dtype is float32"),
    ],
)
def test_fp8_where_it_could_act_nowhere(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str | None
) -> None:
    given = {
        "config": LoranConfig(),
        "dtype": "bfloat16",
        "shared": False,
        "capability": (9, 0),
        "mode": "auto",
    } | given
    monkeypatch.setenv("CURVELORA_KERNELS", given["mode"])
    monkeypatch.setattr(kernel_choice, "why_no_triton", lambda mode: given.get("triton"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: given["capability"] is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: given["capability"])
    choice.why_no_device.cache_clear()
    try:
        arguments = given["config"], given["dtype"], given["shared"]
        if said is None:
            check_fp8(*arguments)
        else:
            with pytest.raises(UserError, match=rf"training\.kernels: fp8 would act nowhere: .*{said}.*: write auto"):
                check_fp8(*arguments)
    finally:
        choice.why_no_device.cache_clear()


@pytest.mark.parametrize(("stage", "refused"), [(None, False), (2, False), (3, False), ("3 by modules", True)])
def test_fp8_is_refused_with_the_other_errors_before_weights_are_read(
    language: dict[str, Any],
    write: Callable[..., Path],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int | str | None,
    refused: bool,
) -> None:
    """ZeRO-3 that gathers the base by blocks is our own, whose layers have kernels."""
    asked: list[bool] = []
    changes: dict[str, Any] = {"training.kernels": "fp8"}
    if stage is not None:
        changes["training.deepspeed"] = str(root / f"ds_configs/zero{str(stage)[0]}.json")
    with monkeypatch.context() as patched:
        patched.setattr("curvelora_training.prepare.check_fp8", lambda config, dtype, shared: asked.append(shared))
        patched.setattr("curvelora_training.prepare.by_blocks", lambda *_: stage == 3)
        patched.setattr("curvelora_training.prepare.check_by_modules", lambda *_: None)
        load_and_prepare(write(language, **changes), [])
    assert asked == [refused]
    with pytest.raises(RecipeError) as caught:
        load_and_prepare(write(language, **changes, **{"training.keep_best": True, "data.validation": None}), [])
    assert "training.kernels: fp8" in str(caught.value) and "training.keep_best" in str(caught.value)


@pytest.mark.parametrize("gpus", [0, 8])
def test_a_job_on_other_machines_needs_no_gpu_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, gpus: int
) -> None:
    """`curvelora launch` on a login node: what its nodes have decides."""
    install(tmp_path / "site", monkeypatch)
    has_gpu(monkeypatch, False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    job = SimpleNamespace(world_size=max(gpus, 1), engine="ddp", gpus_per_node=gpus)
    asks = (
        lambda: check_fp8(LoranConfig(), "bfloat16", False),
        lambda: check_liger(model.get_base_model()),
    )
    with as_in_job(job):
        for ask, said in zip(asks, ("on a CPU", "needs a GPU"), strict=True):
            if gpus:
                ask()
            else:
                with pytest.raises(UserError, match=said):
                    ask()
        with pytest.raises(UserError, match="no bound on an f"):
            check_fp8(LoranConfig(activation="relu"), "bfloat16", False)
    assert not gpus_elsewhere()
