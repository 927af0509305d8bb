"""Loading a saved adapter: the same numbers as PEFT's own loader, one exception for every damage, and no pickle is opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    BOFTConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from curvelora import AuroraConfig, LoranConfig, RanloraConfig
from curvelora.errors import UserError
from curvelora.loading import CONFIG_FILE, WEIGHTS_FILE, check_fits, load_adapter, read_adapter_config, stored_shapes

CONFIGS = {
    "loran": LoranConfig(r=4, alpha=8, target_modules=["q_proj", "v_proj"]),
    "loran with ranks that differ": LoranConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
}


@pytest.fixture
def saved(llama, tmp_path):
    """-> save(config): the folder of an adapter on a Llama, with B that does something."""

    def save(config=CONFIGS["loran"]) -> Path:
        wrapped = get_peft_model(llama(), config)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "loran_" in name or "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_same_logits_as_peft(saved, llama, token_ids, config):
    folder = saved(config)
    ours, theirs = load_adapter(llama(), folder), PeftModel.from_pretrained(llama(), folder)
    with torch.no_grad():
        found, wanted, bare = (model.eval()(token_ids).logits for model in (ours, theirs, llama()))
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, bare)  # the adapter does something


def test_a_new_head_is_loaded_with_the_adapter(bert, token_ids, tmp_path):
    config = LoranConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    wrapped = get_peft_model(bert(), config).eval()
    with torch.no_grad():
        wrapped.base_model.model.classifier.modules_to_save["default"].weight.normal_()
        wanted = wrapped(token_ids).logits
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_adapter(bert(), tmp_path).eval()(token_ids).logits, wanted)


@pytest.mark.parametrize("trainable", [False, True])
def test_only_the_adapter_trains_and_only_when_asked(saved, llama, trainable):
    model = load_adapter(llama(), saved(), trainable=trainable)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # 2 layers x (q, v) x (A, B)
    assert len(training) == (8 if trainable else 0) and all("loran_" in name for name in training)
    assert model.peft_config["default"].inference_mode is not trainable


def test_the_adapter_can_have_a_name(saved, llama, token_ids):
    folder = saved()
    named, plain = load_adapter(llama(), folder, adapter_name="tone"), load_adapter(llama(), folder)
    assert list(named.peft_config) == ["tone"] and named.active_adapter == "tone"
    with torch.no_grad():
        assert torch.equal(named.eval()(token_ids).logits, plain.eval()(token_ids).logits)


def test_shapes_are_those_of_the_tensors(saved):
    folder = saved(CONFIGS["loran with ranks that differ"])
    tensors = load_file(folder / WEIGHTS_FILE)
    assert stored_shapes(folder) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # q is 128 wide and v, with two heads of four, 64
    assert sorted(set(stored_shapes(folder).values())) == [(2, 128), (4, 128), (64, 2), (128, 4)]


def test_shapes_are_read_without_the_tensors(tmp_path):
    """A gigabyte that is all hole: reading it would take its memory, reading its header takes a page."""
    size = 1 << 30
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path = tmp_path / WEIGHTS_FILE
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    before = resident()
    assert stored_shapes(tmp_path) == {"x": (size // 4,)}
    assert resident() - before < 100 << 20


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def edit(folder: Path, **values) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | values))


def rewrite(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def grow(tensors: dict) -> dict:
    return {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}


# what was done to the folder -> what the message must contain
DAMAGES = {
    "no folder": (shutil.rmtree, ["is no folder"]),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), ["holds no adapter", CONFIG_FILE]),
    "config cut": (lambda f: (f / CONFIG_FILE).write_text('{"peft_'), [f"{CONFIG_FILE} is damaged"]),
    "config of bytes": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), [f"{CONFIG_FILE} is damaged"]),
    "config is a list": (lambda f: (f / CONFIG_FILE).write_text("[1]"), [f"{CONFIG_FILE} is damaged"]),
    "config without method": (lambda f: (f / CONFIG_FILE).write_text("{}"), ["is damaged", "peft_type"]),
    "method null": (lambda f: edit(f, peft_type=None), ["the method None"]),
    "method unknown": (lambda f: edit(f, peft_type="LORAM"), ["'LORAM'", "did you mean 'lora"]),
    "rank 0": (lambda f: edit(f, r=0), ["rank must be"]),
    "rank is a word": (lambda f: edit(f, r="four"), ["rank must be"]),
    "targets that are not there": (lambda f: edit(f, target_modules=["query"]), ["does not fit this model", "query"]),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), ["no adapter weights"]),
    "weights empty": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), ["truncated, damaged"]),
    "weights are text": (lambda f: (f / WEIGHTS_FILE).write_text("version https://git-lfs"), ["truncated, damaged"]),
    "a tensor lost": (
        lambda f: rewrite(f, lambda t: dict(sorted(t.items())[1:])),
        ["belongs to another model", "layers.0.self_attn.q_proj.loran_A is missing in the file"],
    ),
    "a tensor too many": (
        lambda f: rewrite(f, lambda t: t | {"extra": torch.ones(1)}),
        ["extra is in the file but not in the model"],
    ),
    "shapes that differ": (
        lambda f: rewrite(f, grow),
        ["loran_A is 8 x 128 in the file and 4 x 128 in the model", "and 5 more"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_sentence(saved, llama, damage):
    """And it is the same before the weights of the base are loaded."""
    folder = saved()
    change, parts = DAMAGES[damage]
    change(folder)
    with pytest.raises(UserError) as caught:
        load_adapter(llama(), folder)
    for part in (str(folder), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    with torch.device("meta"):
        shapes = llama()
    with pytest.raises(UserError) as early:
        check_fits(shapes, folder)
    assert str(early.value) == str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora", use_dora=True),
        RanloraConfig(r=4, target_modules=["q_proj"]),
        AuroraConfig(r=4, target_modules=["q_proj"], learnable=False),
        BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),  # cannot be made without weights
    ],
    ids=["pissa", "dora from olora", "ranlora", "aurora", "boft"],
)
def test_what_fits_fits_without_weights(llama, config, tmp_path):
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    with torch.device("meta"):
        fitting, other = llama(), llama(hidden_size=64)
    check_fits(fitting, tmp_path)
    assert all(p.is_meta for p in fitting.parameters())
    if isinstance(config, BOFTConfig):
        return
    with pytest.raises(UserError, match="belongs to another model"):
        check_fits(other, tmp_path)


def test_an_adapter_of_another_architecture_names_what_it_looked_for(saved, bert):
    with pytest.raises(UserError, match=r"does not fit this model.*q_proj"):
        load_adapter(bert(), saved())


class Marker:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", WEIGHTS_FILE])
def test_a_pickle_is_never_opened(saved, llama, tmp_path, name):
    folder, marker = saved(), tmp_path / "was unpickled"
    (folder / WEIGHTS_FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Marker(marker)))
    with pytest.raises(
        UserError, match="truncated, damaged" if name == WEIGHTS_FILE else rf"pickled weights \({name}\)"
    ):
        load_adapter(llama(), folder)
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()  # the file would have told


def test_a_damaged_weights_file_is_refused_or_equal(saved):
    """Every bit of the header's length and bytes all over header and data, flipped; and cuts at every kind of place."""
    path = saved() / WEIGHTS_FILE
    whole = path.read_bytes()
    tensors = load_file(path)
    start = 8 + int.from_bytes(whole[:8], "little")
    flips = [(i, 1 << bit) for i in range(8) for bit in range(8)]
    flips += [(i, 1 << (i % 8)) for i in range(8, start, 3)]  # header JSON
    cuts = [0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(whole) - 1]
    contents = [whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :] for i, mask in flips]
    contents += [whole[:cut] for cut in cuts] + [whole + b"\0", whole + whole]
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            shapes = stored_shapes(path.parent)
        except UserError:
            refused += 1
        else:  # a renamed tensor, for instance; nothing can be read beyond the file's own data
            assert sum(torch.Size(shape).numel() for shape in shapes.values()) * 2 <= len(whole)
    assert refused >= 64 - 8 + len(cuts)
    path.write_bytes(whole)
    assert stored_shapes(path.parent) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_a_damaged_weights_file_never_ends_in_another_exception(saved, llama):
    """The same through `load_adapter`, at fewer places: a whole model is built for each."""
    path = saved() / WEIGHTS_FILE
    whole, tensors = path.read_bytes(), load_file(path)
    start = 8 + int.from_bytes(whole[:8], "little")
    places = [0, 7, *range(8, start, 97), start, len(whole) - 1]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        try:
            model = load_adapter(llama(), path.parent)
        except UserError:
            continue
        # flipped data is another number, which no format without a checksum can know; names and shapes are as needed
        loaded = {name for name, _ in model.named_parameters() if "loran_" in name}
        assert len(loaded) == len(tensors) and (place >= start or load_file(path).keys() == tensors.keys())


def test_read_adapter_config_gives_the_config_back(saved):
    config = read_adapter_config(saved())
    assert isinstance(config, LoranConfig) and (config.r, config.alpha, config.target_modules) == (
        4,
        8,
        {"q_proj", "v_proj"},
    )


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_prompt_learning_is_refused_rather_than_ignored(saved, llama, config):
    """Around the base alone it would pass for an adapter that does nothing."""
    folder = saved(config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for refuse in (read_adapter_config, lambda f: load_adapter(llama(), f), lambda f: check_fits(llama(), f)):
        with pytest.raises(UserError, match=r"cannot be merged or loaded here: P[A-Z_]*_TUNING.*from_pretrained"):
            refuse(folder)
