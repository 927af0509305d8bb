"""`curvelora merge`: a plain checkpoint that acts as the adapter did, the changes in numbers, and refusals that write nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    FourierFTConfig,
    IA3Config,
    LilyConfig,
    LoraConfig,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from curvelora import METHODS, AuroraConfig, LoranConfig, RanloraConfig, cli
from curvelora.loading import load_adapter
from curvelora.output_change import OutputChange
from curvelora_eval import merge, models
from curvelora_eval.merge_command import describe_change, is_far
from curvelora_eval.spec import ModelSpec, TaskSpec, read_task, write_task
from curvelora_eval.tasks import make_task
from run_files import result
from world import WEIGHTS, check_message

EXACT = 1e-5  # relative, fp32
BERT, LLAMA = ["query", "value"], ["q_proj", "v_proj"]
TASKS: dict[str, dict[str, Any]] = {
    "bert": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "labels": ["0", "1"]},
    "llama": {"kind": "causal_lm", "columns": {"text": "sentence"}},
    "t5": {"kind": "seq2seq", "columns": {"source": "sentence", "target": "sentence"}},
    "vit": {"kind": "image_classification", "labels": ["cat", "dog", "fish"]},
}
METHOD_CONFIGS: dict[str, Callable[[list[str]], PeftConfig]] = {
    "lora": lambda targets: LoraConfig(r=4, target_modules=targets),
    "loran": lambda targets: LoranConfig(r=4, alpha=8, amplitude=2e-2, target_modules=targets),
    "aurora": lambda targets: AuroraConfig(r=4, mode="static", target_modules=targets),
    "ranlora": lambda targets: RanloraConfig(r=4, activation="identity", target_modules=targets),
    "rslora": lambda targets: LoraConfig(r=4, use_rslora=True, target_modules=targets),
    "dora": lambda targets: LoraConfig(r=4, use_dora=True, target_modules=targets),
    "adalora": lambda targets: AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=targets),
    "fourierft": lambda targets: FourierFTConfig(n_frequency=4, target_modules=targets),
    "delora": lambda targets: DeloraConfig(r=4, target_modules=targets),
}
SIZE = {"adalora": "init_r", "fourierft": "n_frequency"}  # the option that stands for the rank


@pytest.fixture
def unseen(root: Path) -> Path:
    return root / "tests/data/sst2_sentences_unseen.tsv"


@pytest.fixture
def adapter(tmp_path: Path, tiny_models: dict[str, Path]) -> Callable[..., Path]:
    """`adapter(config, "llama", quantization="nf4")` -> the folder of an adapter whose every tensor does something."""

    def make(config: PeftConfig, name: str = "llama", path: Path | None = None, **storage: str) -> Path:
        spec = ModelSpec(path=str(path or tiny_models[name]), **{"dtype": "float32"} | storage)
        task = TaskSpec(**TASKS[name])
        torch.manual_seed(0)
        heads = ["classifier"] if task.labels else []
        if heads:
            config.modules_to_save = heads
        model = get_peft_model(models.load_base(spec, make_task(task), trained=heads), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
        write_task(tmp_path / "adapter", spec, task)
        return tmp_path / "adapter"

    return make


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`merged("--adapter", folder)` -> merge.json; the checkpoint is in `tmp_path / "merged"`."""

    def run(*arguments: Any, code: int = 0) -> dict[str, Any]:
        out = tmp_path / "merged"
        assert cli.main(["merge", "--out", str(out), *map(str, arguments)]) == code
        return result(out, "merge.json") if code == 0 else {}

    return run


@pytest.fixture
def nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""
    for function in ("load_base", "load_adapter"):
        monkeypatch.setattr(merge, function, lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.fixture
def batch(unseen: Path, tiny_models: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The first eight unseen sentences."""
    texts = [line.split("\t")[0] for line in unseen.read_text(encoding="utf-8").splitlines()[1:9]]
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    return dict(tokenizer([text + "</s>" for text in texts], padding=True, padding_side="right", return_tensors="pt"))


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(tokens, vocabulary) or (rows, classes), without padding."""
    found = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found[batch["attention_mask"].bool()] if found.ndim == 3 else found


def relative(changed: torch.Tensor, reference: torch.Tensor) -> float:
    return ((changed - reference).norm() / reference.norm()).item()


def base_of(folder: Path, **storage: str) -> PreTrainedModel:
    """The base of an adapter, stored as its task.json says or as given."""
    spec, task = read_task(folder)
    return models.load_base(ModelSpec(**vars(spec) | storage), make_task(task), trained=["classifier"])


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_exact_methods_give_the_adapters_logits_without_peft(
    method: str, adapter: Any, merged: Any, batch: Any, tmp_path: Path
) -> None:
    folder = adapter(METHOD_CONFIGS[method](LLAMA))
    record = merged("--adapter", folder)
    base = logits(base_of(folder), batch)
    wanted = logits(load_adapter(base_of(folder), folder), batch)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits(plain, batch), wanted) < EXACT < 0.02 < relative(base, wanted)
    assert set(load_file(tmp_path / "merged/model.safetensors")) == set(
        load_file(Path(record["base"]["path"]) / "model.safetensors")
    )
    change = record["drift"]["merge"]
    assert change["relative"] < EXACT and change["agreement"] == 1.0 and change["positions"] > 100
    assert record["drift"]["gap"] is record["drift"]["trained"] is None
    size = SIZE.get(method, "r")
    assert (record["method"], record["merge"], record["settings"][size]) == (method, "exact", 4)


def test_what_is_written_and_printed(
    adapter: Any, merged: Any, unseen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(METHOD_CONFIGS["loran"](LLAMA))
    record = merged("--adapter", folder, "--data", unseen, "--limit", "11", "--batch-size", "4")
    shown = capsys.readouterr().out
    out = tmp_path / "merged"
    assert {p.name for p in out.iterdir()} >= {"config.json", "tokenizer.json", "merge.json", "README.md", "task.json"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "merged"]
    assert (record["schema"], record["kind"], record["task"]) == (1, "merge", "causal_lm")
    assert record["adapter"]["sha256"] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert record["probe"]["path"] == str(unseen) and record["probe"]["rows"] == 11
    assert record["probe"]["sha256"] == hashlib.sha256(unseen.read_bytes()).hexdigest()
    assert record["merged_into"] == {"quantization": "none", "dtype": "float32"}
    assert record["trained_on"] == {"path": record["base"]["path"], "revision": None, **record["merged_into"]}
    assert record["hardware"]["cpu_cores"] >= 1 and "transformers" in record["versions"]
    change = record["drift"]["merge"]
    assert change["changed_loss"] == pytest.approx(change["reference_loss"], rel=1e-5) and change["changed_loss"] > 1
    model, task = read_task(out)
    assert (model.path, model.quantization, task) == (str(out), "none", read_task(folder)[1])
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in (shown, card):
        assert record["base"]["path"] in text and "LoRAN, merge exact" in text and f"11 rows of {unseen}" in text
        assert "same answer on 100.0 % of" in text and "warning" not in text
    assert METHODS["loran"].formula in card and f"written: {out}" in shown


def test_a_new_head_is_merged_and_the_shown_command_scores_it(
    adapter: Any, merged: Any, batch: Any, unseen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(METHOD_CONFIGS["loran"](BERT), "bert")
    record = merged("--adapter", folder)
    assert record["probe"] == {"path": None, "what": "16 fixed sentences", "rows": 16}
    assert record["drift"]["merge"]["positions"] == 16 and record["drift"]["merge"]["reference_loss"] is None
    shown = capsys.readouterr().out.splitlines()[-1].removeprefix("score it: curvelora ")
    written, trained = load_file(tmp_path / "merged/model.safetensors"), load_file(folder / WEIGHTS)
    assert torch.equal(written["classifier.weight"], trained["base_model.model.classifier.weight"])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert relative(logits(plain, batch), logits(load_adapter(base_of(folder), folder), batch)) < EXACT
    rows = {"ROWS": str(unseen), "SCORES": str(tmp_path / "a")}
    assert cli.main([rows.get(word, word) for word in shlex.split(shown)]) == 0
    assert cli.main(["eval", "--adapter", str(folder), "--data", str(unseen), "--out", str(tmp_path / "b")]) == 0
    scores = [result(tmp_path / name, "evaluation.json")["metrics"] for name in "ab"]
    assert scores[0] == scores[1] and 0.3 < scores[0]["accuracy"]["value"] < 0.7
    assert (tmp_path / "a/predictions.jsonl").read_bytes() == (tmp_path / "b/predictions.jsonl").read_bytes()


def test_an_approximate_merge_needs_the_flag_and_records_its_gap(
    adapter: Any, merged: Any, batch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(AuroraConfig(r=4, target_modules=LLAMA))
    merged("--adapter", folder, code=2)
    check_message(capsys.readouterr().err, ["B sigma(A) x in its place", "--approximate", "gap is then measured"])
    assert not (tmp_path / "merged").exists()
    record = merged("--adapter", folder, "--approximate")
    gap, change = record["drift"]["gap"], record["drift"]["merge"]
    assert record["merge"] == "approximate" and gap["relative"] > 0.01
    assert change["relative"] == pytest.approx(gap["relative"], rel=1e-3) and gap["agreement"] < 0.99
    assert capsys.readouterr().out.count("warning: the merged model does not act as the adapter did") == 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits(plain, batch), logits(load_adapter(base_of(folder), folder), batch)) > 0.01


def test_an_adapter_of_a_quantised_base_goes_into_the_unquantised_one(
    adapter: Any, merged: Any, batch: Any, unseen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(METHOD_CONFIGS["loran"](LLAMA), quantization="nf4")
    record = merged("--adapter", folder, "--data", unseen, "--limit", "8")
    assert record["trained_on"] == record["base"] | {"quantization": "nf4", "dtype": "float32"}
    assert record["merged_into"] == {"quantization": "none", "dtype": "float32"}
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), batch)
    as_trained = logits(load_adapter(base_of(folder), folder), batch)
    assert relative(plain, logits(load_adapter(base_of(folder, quantization="none"), folder), batch)) < EXACT
    drift = record["drift"]
    assert drift["gap"] is None and drift["merge"]["relative"] < EXACT
    assert drift["trained"]["relative"] == pytest.approx(relative(plain, as_trained), rel=1e-3) and (
        drift["trained"]["relative"] > 0.02
    )
    same = (plain.argmax(-1) == as_trained.argmax(-1)).float().mean().item()
    assert drift["trained"]["agreement"] == pytest.approx(same) and same < 0.99
    assert drift["trained"]["changed_loss"] == drift["merge"]["changed_loss"] != drift["trained"]["reference_loss"]
    shown = capsys.readouterr().out
    assert "unquantised, in float32; the adapter was trained on it in nf4" in shown and "warning" in shown


def test_an_adapter_of_a_checkpoint_that_is_quantised_itself(
    adapter: Any, merged: Any, batch: Any, tiny_models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """task.json says `quantization: none` there; the merge goes into the unquantised checkpoint and says what that changes."""
    spec = ModelSpec(path=str(tiny_models["llama"]), dtype="float32", quantization="nf4")
    models.load_base(spec, make_task(TaskSpec(**TASKS["llama"]))).save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tiny_models["llama"]).save_pretrained(tmp_path / "packed")
    folder = adapter(LoraConfig(r=4, target_modules=LLAMA), path=tmp_path / "packed")
    merged("--adapter", folder, code=2)
    check_message(capsys.readouterr().err, ["is quantised itself", "--model"])
    as_trained = logits(load_adapter(base_of(folder), folder), batch)
    record = merged("--adapter", folder, "--model", tiny_models["llama"])
    trained_on = {"path": str(tmp_path / "packed"), "revision": None, "quantization": "nf4", "dtype": "float32"}
    assert (record["method"], record["trained_on"]) == ("qlora", trained_on)
    assert record["base"]["path"] == str(tiny_models["llama"])
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), batch)
    assert relative(plain, as_trained) > 0.02 and record["drift"]["trained"]["relative"] > 0.02
    assert f"the adapter was trained on {tmp_path / 'packed'} in nf4" in capsys.readouterr().out


@pytest.mark.parametrize("left", ["nothing", "config"])
def test_the_base_of_the_training_is_not_here(
    left: str, adapter: Any, merged: Any, tiny_models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be measured is said, and no other checkpoint is measured in its place."""
    shutil.copytree(tiny_models["llama"], tmp_path / "here")
    folder = adapter(METHOD_CONFIGS["loran"](LLAMA), path=tmp_path / "here", quantization="nf4")
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    if left == "config":
        (tmp_path / "here").mkdir()
        shutil.copy(tmp_path / "elsewhere/config.json", tmp_path / "here")
    record = merged("--adapter", folder, "--model", tmp_path / "elsewhere")
    assert record["drift"]["trained"] is None and record["trained_on"]["path"] == str(tmp_path / "here")
    shown = capsys.readouterr().out
    assert f"the adapter was trained on {tmp_path / 'here'} in nf4" in shown
    assert f"not measured, because {tmp_path / 'here'} cannot be loaded here" in shown


def test_bfloat16_is_rounded_once_and_the_rounding_reported(
    adapter: Any, merged: Any, batch: Any, unseen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, modes, outputs = adapter(METHOD_CONFIGS["loran"](BERT), "bert"), [], merge.outputs

    def watched(model: nn.Module, batches: Any) -> Any:
        modes.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return outputs(model, batches)

    monkeypatch.setattr(merge, "outputs", watched)
    texts = unseen.read_text(encoding="utf-8").splitlines()[:9]
    ended = "\n".join([texts[0], *(text.replace("\t", "</s>\t") for text in texts[1:])])  # as `batch` has them
    (tmp_path / "rows.tsv").write_text(ended + "\n", encoding="utf-8")
    record = merged("--adapter", folder, "--dtype", "bfloat16", "--data", tmp_path / "rows.tsv")
    assert modes == [torch.bfloat16] * 2  # both sides as evaluation runs them
    written = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    model = load_adapter(base_of(folder, dtype="bfloat16"), folder)
    name = "bert.encoder.layer.1.attention.self.query"
    layer = model.get_submodule(f"base_model.model.{name}")
    exact = layer.base_layer.weight.float() + layer.delta_weight("default")
    assert torch.equal(written[f"{name}.weight"], exact.bfloat16())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after, before = (logits(m, batch).double() for m in (plain, model))
    change = record["drift"]["merge"]
    assert change["relative"] == pytest.approx(relative(after, before), rel=1e-9) and 1e-4 < change["relative"] < 0.05
    assert record["merged_into"]["dtype"] == "bfloat16" and record["trained_on"]["dtype"] == "float32"


@pytest.mark.parametrize(("name", "targets", "unit"), [("t5", ["q", "v"], "tokens"), ("vit", LLAMA, "rows")])
def test_other_task_kinds(
    name: str, targets: list[str], unit: str, adapter: Any, merged: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    change = merged("--adapter", adapter(METHOD_CONFIGS["loran"](targets), name))["drift"]["merge"]
    assert change["relative"] < EXACT and change["agreement"] == 1.0 and change["positions"] >= 16
    assert f"of {change['positions']} {unit}" in capsys.readouterr().out


def test_an_output_layer_tied_to_the_embeddings(adapter: Any, merged: Any, tiny_models: Any, tmp_path: Path) -> None:
    """The update belongs to the output layer alone: added to both, the logits would be others altogether."""
    config = LlamaConfig.from_pretrained(tiny_models["llama"], tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny_models["llama"]).save_pretrained(tmp_path / "tied")
    folder = adapter(METHOD_CONFIGS["loran"](["q_proj", "lm_head"]), path=tmp_path / "tied")
    assert merged("--adapter", folder)["drift"]["merge"]["relative"] < EXACT
    weights = load_file(tmp_path / "merged/model.safetensors")
    before = load_file(tmp_path / "tied/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights["model.embed_tokens.weight"], before)
    assert relative(weights["lm_head.weight"], before) > 0.02


def test_an_adapter_without_task_and_a_method_of_peft_alone(adapter: Any, merged: Any, tiny_models: Any) -> None:
    folder = adapter(IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    (folder / "task.json").unlink()
    merged("--adapter", folder, code=2)
    given = ["--model", tiny_models["llama"], "--task", "causal_lm", "--dtype", "float32"]
    record = merged("--adapter", folder, *given)
    assert (record["method"], record["merge"], record["trained_on"]) == ("ia3", None, None)
    assert record["drift"]["merge"]["relative"] < EXACT and record["drift"]["gap"] is None


def test_methods_without_a_layer_keep_their_names(adapter: Any, merged: Any, batch: Any, tmp_path: Path) -> None:
    """BitFit, linear probing and full fine-tuning share PEFT's word for no target."""
    named = {name: METHODS[name].build_config() for name in ("bitfit", "full", "linear_probing")}
    assert {name: merge.method_of(config).name for name, config in named.items()} == {name: name for name in named}
    folder = adapter(named["full"])
    record = merged("--adapter", folder)
    assert (record["method"], record["merge"]) == ("full", "exact")
    wanted = logits(load_adapter(base_of(folder), folder), batch)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), batch), wanted) < EXACT
    assert relative(logits(base_of(folder), batch), wanted) > 0.02


def test_what_only_peft_knows_to_be_unmergeable(
    adapter: Any, merged: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged("--adapter", adapter(LilyConfig(target_modules=LLAMA)), code=2)
    check_message(capsys.readouterr().err, ["cannot be merged", "not supported for Lily"])
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.usefixtures("nothing_heavy")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (RanloraConfig(r=4, target_modules=LLAMA), ["RanLoRA", "phi acts on A x", "keep it as an adapter"]),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), ["PROMPT_TUNING changes no weight"]),
    ],
    ids=["ranlora with gelu", "prompt tuning"],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_loaded(
    config: PeftConfig, said: list[str], adapter: Any, merged: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged("--adapter", adapter(config), "--approximate", code=2)  # the flag is no key to the impossible
    check_message(capsys.readouterr().err, ["cannot be merged", *said])
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_change_in_words() -> None:
    change = OutputChange(0.0123, 0.5, 0.875, 1.0, 1.25, 8)
    said = "logits differ by 1.2 % (at most 0.5), same answer on 87.5 % of 8 rows, loss 1.0000 -> 1.2500"
    assert describe_change(change, "rows") == said and is_far(change)
    single = dataclasses.replace(change, agreement=None, reference_loss=None)
    assert describe_change(single, "rows") == "logits differ by 1.2 % (at most 0.5) over 8 rows" and not is_far(single)
    broken = dataclasses.replace(change, relative=float("nan"))
    assert describe_change(broken, "rows") == "the logits are not finite, over 8 rows" and is_far(broken)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["merge", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "--approximate" in shown and "unquantised base" in shown
    assert cli.main(["--help"]) == 0
    assert "  merge      add an adapter to the weights" in capsys.readouterr().out
