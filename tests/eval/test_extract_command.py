"""`curvelora extract`: stock PEFT loads what it writes, outputs differ by what it states, and refusals write nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, FourierFTConfig, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from curvelora import METHODS, AuroraConfig, LoranConfig, RanloraConfig, cli
from curvelora.errors import UserError
from curvelora.extraction import weight_change
from curvelora.loading import load_adapter
from curvelora.methods.full import FullConfig
from curvelora_eval import extract, extract_command, models
from curvelora_eval.spec import ModelSpec, TaskSpec, read_task, write_task
from curvelora_eval.tasks import make_task
from run_files import result
from world import WEIGHTS, check_message, edited

EXACT = 1e-5  # relative, of logits in fp32
LLAMA, BERT = ["q_proj", "v_proj"], ["query", "value"]
NARROW = ["k_proj", "v_proj"]  # 32 x 64 in the tiny llama; q_proj is 64 x 64
FULL = 32
CAUSAL = TaskSpec(kind="causal_lm", columns={"text": "sentence"})
CLASSES = TaskSpec(kind="sequence_classification", columns={"text": "sentence"}, labels=["0", "1"])


def loran(targets: list[str] = LLAMA) -> LoranConfig:
    """Its dW has full rank: BA + a sin(w BA)."""
    return LoranConfig(r=4, alpha=8, amplitude=0.5, frequency=50, target_modules=targets)


@pytest.fixture
def adapter(tmp_path: Path, tiny_models: dict[str, Path]) -> Callable[..., Path]:
    """`adapter(config, "llama")` -> the folder of an adapter whose every tensor does something."""

    def make(config: PeftConfig, name: str = "llama", task: TaskSpec = CAUSAL, path: Path | None = None) -> Path:
        spec = ModelSpec(path=str(path or tiny_models[name]), dtype="float32")
        heads = ["classifier"] if task.labels else []
        if heads:
            config.modules_to_save = heads
        torch.manual_seed(0)
        model = get_peft_model(models.load_base(spec, make_task(task), trained=heads), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
        write_task(tmp_path / "adapter", spec, task)
        return tmp_path / "adapter"

    return make


@pytest.fixture
def extracted(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`extracted(folder, "--rank", 8)` -> extract.json; the LoRA is in `tmp_path / "lora"`."""

    def run(*arguments: Any, code: int = 0) -> dict[str, Any]:
        argv = [*map(str, arguments), "--out", str(tmp_path / "lora")]
        assert cli.run_guarded(lambda: cli.run_module(extract_command, "curvelora extract", argv)) == code
        return result(tmp_path / "lora", "extract.json") if code == 0 else {}

    return run


def base_of(folder: Path) -> PreTrainedModel:
    spec, task = read_task(folder)
    return models.load_base(spec, make_task(task), trained=["classifier"])


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 512, (4, 9), generator=torch.Generator().manual_seed(5))
    return model.eval()(input_ids=tokens).logits


def relative(changed: torch.Tensor, reference: torch.Tensor) -> float:
    return ((changed - reference).norm() / reference.norm()).item()


def stock(folder: Path, lora: Path) -> PeftModel:
    """The extracted LoRA on the base of `folder`, as PEFT itself loads it; it warns where a tensor is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(base_of(folder), lora)


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (loran(NARROW), FULL),
        (AuroraConfig(r=4, mode="static", target_modules=LLAMA), 4),
        (RanloraConfig(r=4, activation="identity", target_modules=LLAMA), 8),  # B A - B0 A0
        (LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=NARROW), FULL),
        (LoraConfig(r=4, use_rslora=True, target_modules=LLAMA), 4),
        (AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LLAMA), 4),
        (FourierFTConfig(n_frequency=30, target_modules=NARROW), FULL),
    ],
    ids=["loran", "aurora static", "ranlora identity", "dora", "rslora", "adalora", "fourierft"],
)
def test_with_rank_enough_stock_peft_gives_the_adapters_logits(
    config: PeftConfig, rank: int, adapter: Any, extracted: Any, tmp_path: Path
) -> None:
    folder = adapter(config)
    record = extracted(folder, "--rank", rank)
    base, wanted = logits(base_of(folder)), logits(load_adapter(base_of(folder), folder))
    assert relative(logits(stock(folder, tmp_path / "lora")), wanted) < EXACT < 0.01 < relative(base, wanted)
    assert len(record["layers"]) == 4 and record["rank"] == rank
    for layer in (record["overall"], *record["layers"].values()):
        assert layer["relative_error"] < 1e-6 and layer["energy"] > 1 - 1e-12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "lora"]


def test_with_less_the_error_is_as_stated(adapter: Any, extracted: Any, tmp_path: Path) -> None:
    """Of every layer against the adapter's own dW, and the best possible one; logits come nearer with every rank."""
    folder = adapter(loran())
    original = load_adapter(base_of(folder), folder)
    base, wanted = logits(base_of(folder)), logits(original)
    gaps = []
    for rank in (2, 8, 24):
        record = extracted(folder, "--rank", rank, "--overwrite")
        tensors = load_file(tmp_path / "lora" / WEIGHTS)
        squares = {"error": 0.0, "norm": 0.0, "kept": 0.0}
        for name, layer in record["layers"].items():
            delta = original.get_submodule(f"base_model.model.{name}").delta_weight("default").double().detach()
            A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
            assert A.shape == (rank, 64) and B.shape == (layer["d_out"], rank)
            S = torch.linalg.svdvals(delta)
            error = (delta - B @ A).norm()
            assert layer["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
            assert layer["relative_error"] == pytest.approx((error / delta.norm()).item(), rel=1e-5)
            assert layer["relative_error"] == pytest.approx((S[rank:].norm() / S.norm()).item(), rel=1e-4)
            assert layer["energy"] == pytest.approx((S[:rank].norm() / S.norm()).item() ** 2, rel=1e-5)
            share = S.square().cumsum(0) / S.square().sum()
            assert layer["rank_99"] == int((share < 0.99).sum()) + 1
            assert layer["rank_all"] == min(delta.shape)
            squares["error"] += error.item() ** 2
            squares["norm"] += delta.norm().item() ** 2
            squares["kept"] += S[:rank].norm().item() ** 2
        total = record["overall"]
        assert total["relative_error"] == pytest.approx((squares["error"] / squares["norm"]) ** 0.5, rel=1e-5)
        assert total["energy"] == pytest.approx(squares["kept"] / squares["norm"], rel=1e-5)
        gap = relative(logits(stock(folder, tmp_path / "lora")), wanted)
        assert 0 < gap < 3 * total["relative_error"] * relative(base, wanted)
        gaps.append(gap)
    assert gaps == sorted(gaps, reverse=True)


def test_what_is_written_and_printed(
    adapter: Any, extracted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = loran()
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", "some/base"
    folder = adapter(config)
    record = extracted(folder, "--rank", 6)
    shown, out = capsys.readouterr().out, tmp_path / "lora"
    assert {p.name for p in out.iterdir()} == {"adapter_config.json", WEIGHTS, "extract.json", "task.json"}
    written = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    names = [f"model.layers.{i}.self_attn.{target}" for i in (0, 1) for target in LLAMA]
    assert written["target_modules"] == sorted(names) == sorted(record["layers"])
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 6, 6)
    assert written["task_type"] == "CAUSAL_LM" and not written["fan_in_fan_out"]
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == saved["base_model_name_or_path"]
    assert (record["schema"], record["kind"], record["method"], record["rank"]) == (1, "extract", "loran", 6)
    assert record["adapter"]["sha256"] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert record["settings"]["r"] == 4 and "peft" in record["versions"] and record["energy_asked"] is None
    assert read_task(out) == read_task(folder)
    assert "loran -> lora of rank 6, 4 layers, in float32" in shown and f"written: {out}" in shown
    worst = max(layer["relative_error"] for layer in record["layers"].values())
    assert f"{record['overall']['relative_error']:.2e} over all, {worst:.2e} in the worst layer" in shown
    assert shown.count("64 x 64") == shown.count("32 x 64") == 2 and "warning: this LoRA is another adapter" in shown


def test_stock_peft_needs_no_curvelora(adapter: Any, extracted: Any, tiny_models: Any, tmp_path: Path) -> None:
    folder = adapter(loran(NARROW))
    extracted(folder, "--rank", FULL)
    program = f"""
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tiny_models["llama"])!r}, attn_implementation="eager")
model = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r}).eval()
tokens = torch.randint(3, 512, (4, 9), generator=torch.Generator().manual_seed(5))
save_file({{"logits": model(input_ids=tokens).logits.detach()}}, {str(tmp_path / "logits.safetensors")!r})
assert not any(name.startswith("curvelora") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert relative(found, logits(load_adapter(base_of(folder), folder))) < EXACT


def test_a_trained_head_goes_along(
    adapter: Any, extracted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(AuroraConfig(r=4, mode="static", target_modules=BERT), "bert", CLASSES)
    extracted(folder, "--rank", 4, "--dtype", "bfloat16")
    assert "note: trained in full and carried along: classifier" in capsys.readouterr().out
    saved, written = load_file(folder / WEIGHTS), load_file(tmp_path / "lora" / WEIGHTS)
    for name in ("weight", "bias"):
        key = f"base_model.model.classifier.{name}"
        assert torch.equal(written[key], saved[key])  # not rounded with the factors
    assert {t.dtype for name, t in written.items() if "lora_" in name} == {torch.bfloat16}
    extracted(folder, "--rank", 4, "--overwrite")
    assert relative(logits(stock(folder, tmp_path / "lora")), logits(load_adapter(base_of(folder), folder))) < EXACT


def test_conv1d(adapter: Any, extracted: Any, tiny_models: Any, tmp_path: Path) -> None:
    """Weights stored as (d_in, d_out), beside one that is not: c_attn of GPT-2, and its output layer."""
    from transformers import AutoTokenizer

    config = GPT2Config(
        vocab_size=512, bos_token_id=1, eos_token_id=2, n_embd=48, n_layer=2, n_head=2, tie_word_embeddings=False
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_models["llama"]).save_pretrained(tmp_path / "gpt2")
    folder = adapter(loran(["c_attn", "lm_head"]), path=tmp_path / "gpt2")
    record = extracted(folder, "--rank", 48)
    assert record["layers"]["transformer.h.0.attn.c_attn"]["d_out"] == 144
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text(encoding="utf-8"))["fan_in_fan_out"]
    model = PeftModel.from_pretrained(base_of(folder), tmp_path / "lora")
    assert relative(logits(model), logits(load_adapter(base_of(folder), folder))) < EXACT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_the_factors_is_in_the_stated_error(
    dtype: str, adapter: Any, extracted: Any, tmp_path: Path
) -> None:
    folder = adapter(LoraConfig(r=4, target_modules=LLAMA))
    record = extracted(folder, "--rank", 4, "--dtype", dtype)
    original, tensors = load_adapter(base_of(folder), folder), load_file(tmp_path / "lora" / WEIGHTS)
    for name, layer in record["layers"].items():
        delta = weight_change(original.get_submodule(f"base_model.model.{name}"), name)
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert A.dtype == B.dtype == getattr(torch, dtype)
        error = (delta - B.double() @ A.double()).norm() / delta.norm()
        assert layer["relative_error"] == pytest.approx(error.item(), rel=1e-6)
        assert 1e-5 < layer["relative_error"] < torch.finfo(A.dtype).eps
        assert layer["energy"] > 1 - 1e-12  # the rank is not what is missing
    assert relative(logits(stock(folder, tmp_path / "lora")), logits(original)) < 0.02


def test_the_smallest_rank_that_keeps_an_energy(
    adapter: Any, extracted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(loran())
    record = extracted(folder, "--rank", "auto", "--energy", "0.99")
    layers = record["layers"].values()
    assert record["rank"] == max(layer["rank_99"] for layer in layers) and record["energy_asked"] == 0.99
    assert min(layer["energy"] for layer in layers) >= 0.99 > 0.5
    record = extracted(folder, "--rank", "auto", "--energy", "0.9999999999", "--overwrite")
    assert record["rank"] == 64  # of q_proj; v_proj has 32, and zeros
    wanted = logits(load_adapter(base_of(folder), folder))
    assert relative(logits(stock(folder, tmp_path / "lora")), wanted) < EXACT
    low = extracted(adapter(LoraConfig(r=3, target_modules=LLAMA)), "--rank", 5, "--overwrite")
    assert low["overall"]["relative_error"] < 1e-6
    assert "no update has a rank above 3, so --rank 3 gives the same" in capsys.readouterr().out


def test_an_untrained_adapter_is_said_to_be_one(
    tiny_models: Any, extracted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a task.json, as PEFT leaves it: base and kind of task are in PEFT's own config."""
    spec = ModelSpec(path=str(tiny_models["llama"]), dtype="float32")
    config = LoranConfig(r=4, target_modules=LLAMA, task_type="CAUSAL_LM")
    get_peft_model(models.load_base(spec, make_task(CAUSAL)), config).save_pretrained(tmp_path / "adapter")
    record = extracted(tmp_path / "adapter", "--rank", 2)
    assert record["overall"] == {"norm": 0.0, "relative_error": 0.0, "energy": 1.0}
    assert record["base"] == {"path": spec.path, "revision": None, "dtype": "float32"}
    assert "warning: the update is zero in every layer" in capsys.readouterr().out


# the adapter, the arguments, and what the one sentence must contain; nothing heavy has been loaded by then
REFUSED: dict[str, tuple[PeftConfig, list[str], list[str]]] = {
    "ranlora": (RanloraConfig(r=4, target_modules=LLAMA), [], ["RanLoRA", "phi acts on A x", "serve it as an adapter"]),
    "aurora dynamic": (AuroraConfig(r=4, target_modules=LLAMA), [], ["AuroRA", "B sigma(A x)", "mode: static"]),
    "prompt": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), [], ["changes no weight of the base"]),
    "biases": (LoraConfig(target_modules=LLAMA, bias="lora_only"), [], ["trains biases too", "merge it instead"]),
    "full": (FullConfig(), [], ["full fine-tuning changes every weight", "`curvelora merge`"]),
    "bitfit": (METHODS["bitfit"].build_config(), [], ["trains biases too"]),
    "rank 0": (loran(), ["--rank", "0"], ["--rank takes a whole number of at least 1, or auto, not '0'"]),
    "rank many": (loran(), ["--rank", "many"], ["or auto, not 'many'"]),
    "energy and rank": (loran(), ["--rank", "4", "--energy", "0.9"], ["leave one of them out"]),
    "energy above 1": (loran(), ["--rank", "auto", "--energy", "99"], ["a share above 0 and below 1", "not 99"]),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_refused_before_anything_is_loaded(
    wrong: str,
    adapter: Any,
    extracted: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, arguments, said = REFUSED[wrong]
    folder = adapter(config)
    monkeypatch.setattr(models, "load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    extracted(folder, *(arguments or ["--rank", "4"]), code=2)
    check_message(capsys.readouterr().err, said)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_rank_that_one_layer_has_not(adapter: Any, extracted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    extracted(adapter(loran()), "--rank", FULL + 1, code=2)
    said = ["--rank 33 is above min(d_in, d_out)=32 of module 'model.layers.0.self_attn.v_proj'", "--rank 32 or less"]
    check_message(capsys.readouterr().err, said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(r=4, target_modules=["embed_tokens"]), "module 'model.embed_tokens' is of type Embedding"),
        (
            LoraConfig(r=4, target_modules=LLAMA, trainable_token_indices=[3, 5]),
            "single tokens of module 'model.embed_tokens'",
        ),
    ],
    ids=["embedding", "tokens"],
)
def test_what_is_no_linear_layer(
    config: PeftConfig, said: str, adapter: Any, extracted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extracted(adapter(config), "--rank", 4, code=2)
    check_message(capsys.readouterr().err, [said])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_pickled_weights_and_another_base_are_refused(
    adapter: Any, extracted: Any, tiny_models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(loran())
    edited("adapter_config.json", r=8)(folder)
    extracted(folder, "--rank", 4, code=2)
    check_message(capsys.readouterr().err, ["belongs to another model"])
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    extracted(folder, "--rank", 4, code=2)
    check_message(capsys.readouterr().err, ["pickled weights"])


def test_a_quantised_checkpoint_is_refused(
    adapter: Any, extracted: Any, tiny_models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder, packed = adapter(loran()), Path(shutil.copytree(tiny_models["llama"], tmp_path / "packed"))
    edited("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(packed)
    extracted(folder, "--rank", 4, "--model", packed, code=2)
    check_message(capsys.readouterr().err, ["is quantised itself", "--model"])


def test_nothing_is_overwritten_unasked(
    adapter: Any, extracted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = adapter(LoraConfig(r=4, target_modules=LLAMA)), tmp_path / "lora"
    extracted(folder, "--rank", 2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    extracted(folder, "--rank", 3, code=2)
    check_message(capsys.readouterr().err, ["is not empty", "--overwrite"])
    # a disk that fails: the old files are still there, and nothing else
    monkeypatch.setattr(
        extract, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    extracted(folder, "--rank", 3, "--overwrite", code=2)
    check_message(capsys.readouterr().err, ["lora cannot be written (No space left on device)"])
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    extracted(folder, "--rank", 3, "--overwrite", code=2)
    check_message(capsys.readouterr().err, ["also holds notes.txt"])
    (out / "notes.txt").unlink()
    assert extracted(folder, "--rank", 3, "--overwrite")["rank"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "lora"]


def test_the_adapter_itself_and_other_folders_are_never_replaced(
    adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(LoraConfig(r=4, target_modules=LLAMA))
    for out, said in ((folder, "is the adapter itself"), (tmp_path, "was not written by this command")):
        argv = [str(folder), "--rank", "2", "--out", str(out), "--overwrite"]
        assert cli.run_guarded(lambda argv=argv: cli.run_module(extract_command, "curvelora extract", argv)) == 2
        check_message(capsys.readouterr().err, [said])
    assert (folder / WEIGHTS).is_file()


def test_names_that_end_alike_are_refused(tmp_path: Path) -> None:
    """PEFT would put the LoRA of `a` on `b.a` as well."""

    def base() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.ModuleDict({"a": nn.Linear(4, 3)})})

    model = get_peft_model(base(), LoranConfig(r=2, target_modules="a"))
    layers = extract.adapted_layers(model)
    assert set(layers) == {"a"}
    results = extract.extract(layers, 2, None, torch.float32)
    config = extract.lora_config(model.peft_config["default"], layers, 2, "base")
    extract.write_adapter(tmp_path / "lora", config, results, {}, {})
    with pytest.raises(UserError, match=r"would not find the adapted layers again .*b\.a\.lora_A"):
        extract.check_written(base(), tmp_path / "lora")


def test_help_and_registration(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run_module(extract_command, "curvelora extract", ["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "--energy" in shown and "needs no curvelora" in shown
    points = (root / "eval/pyproject.toml").read_text(encoding="utf-8")
    assert 'extract = "curvelora_eval.extract_command"' in points and cli.HOME["extract"][0] == "curvelora-eval"
