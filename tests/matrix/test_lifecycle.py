"""Saving, loading elsewhere, several adapters on one model, batches whose rows use different ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import MAIN, OURS, those_with
from models import STORAGE, bert, logits, t5, tensors_of, train_a_little, trainable
from models import adapted_layers as layers_of
from peft import PeftModel, get_peft_model
from refusals import MIXED_DORA, MIXED_NAMES, MIXED_TRAINING
from safetensors.torch import load_file

every_method = pytest.mark.parametrize("case", MAIN, ids=str)
two_adapters = pytest.mark.parametrize("case", those_with("second"), ids=str)
own_rows = pytest.mark.parametrize("case", those_with("rows"), ids=str)
named_rows = pytest.mark.parametrize("case", those_with("refused rows"), ids=str)

# What a user's script does; `import curvelora` is all that it needs from this project.
ELSEWHERE = """
import json, sys, torch, curvelora
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
jobs, base, device = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
for folder, quantization in jobs:
    options = {}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
        options["device_map"] = {"": device}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options).to(device)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, folder, torch_device=device).eval()
    ids = torch.load(folder + "/ids.pt", weights_only=True).to(device)
    with torch.no_grad():
        torch.save(model(ids).logits, folder + "/logits.pt")
"""


@pytest.fixture(scope="module")
def reloaded(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: str, load_llama, device
) -> dict[str, tuple[Path, torch.Tensor]]:
    """Method -> (folder, logits before saving); one fresh process has loaded them all and written its own logits."""
    from models import IDS

    saved, jobs = {}, []
    for case in MAIN:
        quantization = case.entry.required_quantization or "none"
        torch.manual_seed(0)
        model = train_a_little(get_peft_model(load_llama(quantization), case.config(dropout=0.1)))
        folder = tmp_path_factory.mktemp("saved") / case.method
        model.save_pretrained(folder)
        torch.save(IDS, folder / "ids.pt")
        saved[case.method] = folder, logits(model, IDS.to(device)).cpu()
        jobs.append((str(folder), quantization))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(jobs), llama_folder, str(device)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return saved


@pytest.mark.cell("lifecycle", "saved, loaded in a fresh process by PEFT alone: the same logits, bit for bit")
@every_method
def test_fresh_process(case, reloaded):
    folder, expected = reloaded[case.method]
    found = torch.load(folder / "logits.pt", weights_only=True, map_location="cpu")
    assert torch.equal(found, expected) and found.std() > 0


@pytest.mark.cell("lifecycle", "the folder holds the adapter's tensors in fp32 as safetensors, and nothing of the base")
@every_method
def test_folder(case, reloaded, adapted):
    folder, _ = reloaded[case.method]
    names = {path.name for path in folder.iterdir()} - {"ids.pt", "logits.pt"}
    assert names <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    stored = load_file(folder / "adapter_model.safetensors")
    tensors = [t for layer in layers_of(adapted(case)).values() for t in tensors_of(layer).values()]
    assert sorted(tuple(t.shape) for t in stored.values()) == sorted(tuple(t.shape) for t in tensors)
    assert all(t.dtype == torch.float32 for t in stored.values())
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == case.config().peft_type.value


@pytest.mark.cell("lifecycle", "`low_cpu_mem_usage`, and loading to train on")
@every_method
@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
def test_ways_to_load(case, reloaded, base, ids, options, device):
    folder, expected = reloaded[case.method]
    model = PeftModel.from_pretrained(base(case), folder, torch_device=str(device), **options)
    assert torch.equal(logits(model, ids).cpu(), expected)
    assert not any(p.is_meta for p in model.parameters())
    assert bool(trainable(model)) is options.get("is_trainable", False)


@pytest.mark.cell(
    "lifecycle", "`low_cpu_mem_usage` on a base in {storage}: every tensor as in the file, frozen or not as asked"
)
@pytest.mark.parametrize("storage", [name for name in STORAGE if name != "fp32"])
@pytest.mark.parametrize("case", OURS, ids=str)
def test_low_memory_on_other_bases(case, storage, load_llama, tmp_path, device):
    """PEFT's LoRA comes back rounded to the dtype of the base there."""
    model = train_a_little(get_peft_model(load_llama(*STORAGE[storage]), case.config()))
    model.save_pretrained(tmp_path)
    for trained in (False, True):
        loaded = PeftModel.from_pretrained(
            load_llama(*STORAGE[storage]),
            tmp_path,
            torch_device=str(device),
            low_cpu_mem_usage=True,
            is_trainable=trained,
        )
        assert bool(trainable(loaded)) is trained
        for name, layer in layers_of(loaded).items():
            for tensor, value in tensors_of(layers_of(model)[name]).items():
                assert torch.equal(tensors_of(layer)[tensor], value) and tensors_of(layer)[tensor].dtype == value.dtype


@pytest.mark.cell("lifecycle", "put on again under the same name, on the same modules with another rank: a fresh start")
@every_method
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_put_on_again(case, base, ids):
    model = base(case)
    get_peft_model(model, case.config(r=2))
    torch.manual_seed(0)
    again = get_peft_model(model, case.config())
    torch.manual_seed(0)
    fresh = get_peft_model(base(case), case.config())
    assert torch.equal(logits(again, ids), logits(fresh, ids))
    shapes = [{n: p.shape for n, p in model.named_parameters() if ".default" in n} for model in (again, fresh)]
    assert shapes[0] == shapes[1] and len(shapes[0]) >= 4 * case.tensors


@pytest.mark.cell("lifecycle", "several adapters: add, switch, both at once, disable, delete")
@two_adapters
def test_several(case, two, adapted, base, ids):
    first = logits(two, ids)
    assert torch.equal(first, logits(adapted(case), ids))  # an added one waits until it is set
    assert all(".default" in name for name in trainable(two))
    two.set_adapter("second")
    second = logits(two, ids)
    assert not torch.equal(second, first) and all(".second" in name for name in trainable(two))
    with two.disable_adapter():
        assert torch.equal(logits(two, ids), logits(base(case), ids))
    assert torch.equal(logits(two, ids), second)
    two.base_model.set_adapter(["default", "second"])
    layer = layers_of(two)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 128, device=ids.device)
    parts = []
    for names in (["default"], ["second"], ["default", "second"]):
        layer.set_adapter(names)
        parts.append(layer(x) - layer.base_layer(x))
    if case.has("sums"):
        torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=1e-4, atol=1e-5)
    two.set_adapter("default")
    two.delete_adapter("second")
    assert not any("second" in name for name in two.state_dict()) and list(two.peft_config) == ["default"]
    assert torch.equal(logits(two, ids), first)


@pytest.mark.cell("lifecycle", "an adapter that is not active gets no gradient")
@two_adapters
def test_inactive(case, two, ids):
    two.set_adapter("second")
    two.train()(ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in two.named_parameters() if ".default" in name or ".second" in name}
    assert (
        all((grad is None) == (".default" in name) for name, grad in grads.items()) and len(grads) >= 8 * case.tensors
    )


@pytest.mark.cell("lifecycle", "mixed batches: every row with its own adapter (`adapter_names`), as row by row")
@named_rows
def test_mixed_batch(case, two, ids, refused):
    rows = torch.cat([ids, ids.flip(0), ids[:1]])
    names = ["default", "second", "__base__", "second", "default"]
    if not case.has("rows"):
        with refused(MIXED_DORA):
            logits(two, rows, adapter_names=names)
        return
    found = logits(two, rows, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with two.disable_adapter():
                wanted = logits(two, rows[row : row + 1])
        else:
            two.set_adapter(name)
            wanted = logits(two, rows[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-5)
    two.set_adapter("default")
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(logits(two, rows), logits(two, rows, adapter_names=["default"] * 5))


@pytest.mark.cell("lifecycle", "mixed batches with an unknown adapter or too few names, and in training")
@named_rows
def test_mixed_batch_refusals(case, two, ids, refused):
    for names in (["default", "thrid"], ["default"]):
        with refused(MIXED_NAMES):
            two.eval()(ids, adapter_names=names)
    with refused(MIXED_TRAINING):
        two.train()(ids, adapter_names=["default", "second"])
    if case.entry.provided_by == "curvelora":  # PEFT 0.21 leaves its hooks behind after an error
        logits(two, ids)


@pytest.mark.cell("lifecycle", "generation with beams, rows with adapters of their own")
@own_rows
def test_generate_mixed(case, two, ids):
    options = dict(max_new_tokens=3, num_beams=2, do_sample=False)
    found = two.eval().generate(input_ids=ids, adapter_names=["second", "default"], **options)
    for row, name in enumerate(("second", "default")):
        two.set_adapter(name)
        assert torch.equal(found[row : row + 1], two.generate(input_ids=ids[row : row + 1], **options))


@pytest.mark.cell("lifecycle", "generation with beams in an encoder-decoder, whose encoder does not repeat its rows")
@own_rows
def test_generate_mixed_encoder_decoder(case, ids, device):
    options = {"target_modules": ["q", "v", "wi", "wo"]}
    model = get_peft_model(t5(), case.config(**options))
    model.add_adapter("second", case.config(**options | {"r": 2}))
    train_a_little(model, std=0.3, seed=1, adapter="default")
    train_a_little(model, std=0.3, seed=2, adapter="second").to(device).eval()
    generation = dict(max_new_tokens=4, num_beams=3, do_sample=False)
    names = ["second", "default"]
    found = model.generate(input_ids=ids, adapter_names=names, **generation)
    with torch.no_grad():
        scores = model(input_ids=ids, decoder_input_ids=found, adapter_names=names).logits
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids[row : row + 1], **generation)
        assert torch.equal(found[row : row + 1, : alone.shape[1]], alone)
        with torch.no_grad():
            wanted = model(input_ids=ids[row : row + 1], decoder_input_ids=found[row : row + 1]).logits
        torch.testing.assert_close(scores[row : row + 1], wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[0], found[1])


@pytest.mark.cell("lifecycle", "mixed batches with a head of each adapter's own (`modules_to_save`)")
@own_rows
def test_mixed_batch_with_heads(case, ids, device):
    options = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    model = get_peft_model(bert(), case.config(**options))
    model.add_adapter("second", case.config(**options))
    train_a_little(model, std=0.3, seed=1, adapter="default")
    train_a_little(model, std=0.3, seed=2, adapter="second").to(device)
    names = ["second", "default"]
    found = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(found[row : row + 1], logits(model, ids[row : row + 1]), rtol=1e-4, atol=1e-5)
