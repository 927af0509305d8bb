"""`curvelora prepare`: a sharded checkpoint tensor by tensor, kept and resumed, and what is refused."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from curvelora import RanloraConfig, cli, factor_cache, prepare_command
from curvelora.factor_cache import VARIABLE, load, weight_key
from curvelora.svd import singular_triplets

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """-> the default cache folder, in a home of the test's own."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home/curvelora/factors"


@pytest.fixture
def base(llama, tmp_path: Path) -> Path:
    """A Llama in several shards."""
    llama().save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    return tmp_path / "base"


def prepare(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    words = [str(word) for word in argv]
    capsys.readouterr()  # what writing the checkpoint printed
    code = cli.run_guarded(lambda: cli.run_module(prepare_command, "curvelora prepare", words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {name: t for name, t in tensors.items() if name.rpartition(".")[0].endswith(TARGETS)}


@pytest.mark.parametrize(
    ("method", "init", "end"),
    [("ranlora", None, "last"), ("ranlora", "P", "first"), ("pissa", None, "first"), ("milora", None, "last")],
)
def test_every_weight_has_its_factors(capsys, base, tmp_path, method, init, end):
    options = ["--init", init] if init else []
    code, out, err = prepare(
        capsys, "--model", base, "--method", method, "--rank", 3, "--cache", tmp_path / "factors", *options
    )
    assert code == 0 and "error" not in err
    assert "10 weights" in out and "computed 10, kept 0" in out and f"export {VARIABLE}=" in out
    expected = weights(base)
    assert len(expected) == 10 and len(list((tmp_path / "factors").iterdir())) == 10
    for weight in expected.values():
        found = load(tmp_path / "factors", weight_key(weight), weight.shape, 3, end)
        assert torch.equal(found.S, singular_triplets(weight, 3, end).S) and found.bounds.proved


def test_the_time_that_is_left_is_estimated_from_one_weight_of_each_shape(capsys, base, home):
    _, out, _ = prepare(capsys, "--model", base, "--method", "ranlora", "--rank", 2)
    lines = out.splitlines()
    # q; k and v; up; down
    timed = {line.split(":")[0] for line in lines if line.endswith(" s") and " x " in line.split(":")[0]}
    assert timed == {"128 x 128", "64 x 128", "192 x 128", "128 x 192"}
    assert any(line.startswith("about ") and line.endswith("for the remaining 6 weights") for line in lines)
    assert len(list(home.iterdir())) == 10 and "export" not in out  # the default folder is found without


def test_what_is_in_the_cache_is_kept(capsys, base, home):
    common = ("--model", base, "--method", "ranlora")
    prepare(capsys, *common, "--rank", 4)
    times = {path: path.stat().st_mtime_ns for path in home.iterdir()}
    assert "computed 0, kept 10" in prepare(capsys, *common, "--rank", 4)[1]
    assert "computed 0, kept 10" in prepare(capsys, *common, "--rank", 2)[1]  # the last 2 of the last 4
    assert times == {path: path.stat().st_mtime_ns for path in home.iterdir()}
    assert "computed 10, kept 0" in prepare(capsys, *common, "--rank", 5)[1]
    assert "computed 10, kept 0" in prepare(capsys, "--model", base, "--method", "pissa", "--rank", 2)[1]


def test_an_interrupted_run_goes_on_where_it_stopped(capsys, base, home, monkeypatch):
    done = []

    def interrupted(weight, r, end):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(weight)
        return singular_triplets(weight, r, end)

    common = ("--model", base, "--method", "ranlora", "--rank", 2)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_command, "singular_triplets", interrupted)
        assert prepare(capsys, *common)[0] == 130
    assert len(list(home.iterdir())) == 6
    assert "computed 4, kept 6" in prepare(capsys, *common)[1]
    assert not list(home.glob(".writing*"))


def test_a_damaged_entry_is_computed_again(capsys, base, home):
    common = ("--model", base, "--method", "ranlora", "--rank", 2)
    prepare(capsys, *common)
    next(home.iterdir()).write_bytes(b"damaged")
    assert "computed 1, kept 9" in prepare(capsys, *common)[1]


def test_one_tensor_at_a_time(capsys, base, monkeypatch):
    """Each weight is gone before the next is read, so a model of any size fits."""
    alive, order = [], []

    def watched(weight, read=prepare_command.read_weight):
        assert all(reference() is None for reference in alive), "the tensor before is still held"
        tensor = read(weight)
        alive.append(weakref.ref(tensor))
        order.append(weight.file)
        return tensor

    monkeypatch.setattr(prepare_command, "read_weight", watched)
    assert prepare(capsys, "--model", base, "--method", "ranlora", "--rank", 2)[0] == 0
    assert len(alive) == 10 and len(set(order)) > 1


def test_training_uses_what_was_prepared(capsys, base, home, llama, monkeypatch):
    from transformers import AutoModelForCausalLM

    fresh = get_peft_model(llama(), RanloraConfig(target_modules=list(TARGETS)))
    prepare(capsys, "--model", base, "--method", "ranlora", "--rank", 2)
    monkeypatch.setattr(factor_cache, "singular_triplets", lambda *_: pytest.fail("it was prepared"))
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = get_peft_model(loaded, RanloraConfig(target_modules=list(TARGETS)))
    for (name, one), other in zip(fresh.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_for_a_base_that_is_loaded_in_another_dtype(capsys, base, home, monkeypatch):
    from transformers import AutoModelForCausalLM

    prepare(capsys, "--model", base, "--method", "ranlora", "--rank", 2, "--dtype", "bfloat16")
    monkeypatch.setattr(factor_cache, "singular_triplets", lambda *_: pytest.fail("it was prepared"))
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    get_peft_model(loaded, RanloraConfig(target_modules=list(TARGETS)))


def test_conv1d_is_stored_turned(capsys, tmp_path, home, monkeypatch):
    """GPT-2 stores (d_in, d_out); the factors are those of (d_out, d_in)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    argv = ("--model", tmp_path / "gpt2", "--method", "ranlora", "--rank", 2, "--target-modules", "c_attn,c_fc")
    assert "computed 2, kept 0" in prepare(capsys, *argv)[1]
    monkeypatch.setattr(factor_cache, "singular_triplets", lambda *_: pytest.fail("it was prepared"))
    get_peft_model(model, RanloraConfig(target_modules=["c_attn", "c_fc"]))


def packed(base: Path, **config) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def bytes_only(base: Path) -> None:
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({n: t.to(torch.uint8) if "q_proj" in n else t for n, t in tensors.items()}, path)


def garbled(base: Path) -> None:
    for path in base.glob("*.safetensors"):
        path.write_bytes(b"x")


REFUSED = {
    "unknown method": (["--method", "ranlra"], None, "--method ranlra starts from no singular factors.*'ranlora'"),
    "a method without": (["--method", "loran"], None, r"--method loran .*\(known: ranlora, pissa, milora\)"),
    "unknown init": (["--init", "Q"], None, "--init Q: RanLoRA prepares R"),
    "rank 0": (["--rank", "0"], None, "--rank 0: a rank is at least 1"),
    "rank too big": (["--rank", "65"], None, r"--rank 65 is more than the 64 triplets of .*k_proj.weight \(64 x 128\)"),
    "no such module": (
        ["--target-modules", "query"],
        None,
        r"--target-modules query: .* no such linear layer .*q_proj",
    ),
    "no such dtype": (["--dtype", "bf16"], None, "--dtype bf16 is unknown"),
    "no such device": (["--device", "tpu"], None, "--device tpu is unknown: write cpu, cuda or cuda:0"),
    "no device's number": (["--device", "cuda:x"], None, "--device cuda:x is unknown: write cpu"),
    "a device too many": (["--device", "cuda:99"], None, r"--device cuda:99: there are \d+ CUDA devices here"),
    "no config": ([], lambda base: (base / "config.json").write_text("[]"), "no checkpoint that can be read"),
    "no index": (
        [],
        lambda base: (base / "model.safetensors.index.json").write_text("[]"),
        "no safetensors checkpoint that can be read",
    ),
    "quantised": (
        [],
        lambda base: packed(base, quantization_config={"quant_method": "gptq"}),
        r"is quantised \(with gptq",
    ),
    "quantised unsaid": ([], bytes_only, r"is quantised \(.*q_proj.weight is stored as U8\)"),
    "damaged": (
        [],
        garbled,
        "no safetensors checkpoint",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_in_one_sentence(capsys, base, home, case):
    options, damage, said = REFUSED[case]
    if damage:
        damage(base)
    code, out, err = prepare(capsys, "--model", base, "--method", "ranlora", "--rank", 2, *options)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert re.search(said, err), err
    assert not home.exists()


def test_a_weight_that_does_not_fit_on_the_device(capsys, base, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prepare_command, "singular_triplets", full)
    code, _, err = prepare(capsys, "--model", base, "--method", "pissa", "--rank", 2)
    assert code == 2 and len(err.splitlines()) == 1 and re.search(r"does not fit on cpu.*is kept", err), err


@pytest.mark.parametrize("model", ["nowhere", "empty", "no/such-model"])
def test_a_missing_checkpoint(capsys, tmp_path, model):
    (tmp_path / "empty").mkdir()
    path = model if "/" in model else tmp_path / model
    code, out, err = prepare(capsys, "--model", path, "--method", "pissa", "--rank", 2)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "name a folder with" in err
