"""`curvelora fetch`: a hub on this machine that the real client asks, and every way in which what was brought can be wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from curvelora.cli import run_guarded, run_module
from curvelora.errors import UserError
from curvelora_eval.data import load_rows
from curvelora_eval.spec import DataSpec, ModelSpec
from curvelora_training.config import load_recipe
from curvelora_training.fetch import command
from curvelora_training.fetch.gather import make_plan
from curvelora_training.fetch.hub import choose
from curvelora_training.fetch.manifest import inside, read_manifest
from hub_stub import MODEL_COMMIT, ROWS_COMMIT, Hub, serving


@pytest.fixture
def hub(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a tiny model in several forms, pickles among them, and this process online."""
    files = {path.name: path.read_bytes() for path in tiny_models["bert"].iterdir()}
    other = ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "run_me.py", "README.md")
    with serving(Hub(files | dict.fromkeys(other, b"not for us")), monkeypatch) as served:
        yield served


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """What the data set org/rows has, in its split train."""
    found = Dataset.from_dict({"sentence": ["good", "bad", "null"], "label": [1, 0, 1]})

    def load(path: str, split: str | None, revision: str) -> Dataset:
        assert (path, split, revision) == ("org/rows", "train", ROWS_COMMIT)
        return found

    monkeypatch.setattr("datasets.load_dataset", load)
    return found


def fetch(*arguments: str | Path) -> int:
    return run_guarded(lambda: run_module(command, "curvelora fetch", [str(argument) for argument in arguments]))


def below(folder: Path) -> set[str]:
    return {
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and ".cache" not in p.relative_to(folder).parts
    }


@pytest.fixture
def local(recipe: dict[str, Any], write: Callable[..., Path]) -> Path:
    """A recipe whose model and rows lie here."""
    return write(recipe)


@pytest.fixture
def fetched(local: Path, tmp_path: Path) -> Path:
    """What was fetched for it, everything copied."""
    assert fetch(local, "--to", tmp_path / "there", "--copy") == 0
    return tmp_path / "there"


def test_a_model_and_rows_of_the_hub(
    hub: Hub,
    rows: Dataset,
    recipe: dict[str, Any],
    write: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(recipe, **{"model.path": "org/tiny", "data.train": {"path": "org/rows", "split": "train"}})
    to = tmp_path / "there"
    assert fetch(path, "--to", to) == 0
    shown = capsys.readouterr().out
    whole = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert below(to) == {*(f"model/{name}" for name in whole), "data/train.parquet", "manifest.json"}
    assert set(hub.taken) == whole, "nothing else was downloaded, least of all a pickle"
    record = read_manifest(to)
    assert record["commits"] == {"model": MODEL_COMMIT, "train": ROWS_COMMIT}
    for name, entry in record["files"].items():
        content = (to / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert list(record["local"]) == [str(Path(recipe["data"]["test"]["path"]).resolve())]
    assert "data.test.path: a file here, hashed and left in place" in shown

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # from here on as on a compute node
    assert fetch(path, "--to", to, "--verify") == 0
    shown = capsys.readouterr().out
    assert "all 6 files are as they were fetched" in shown
    overrides = next(line for line in shown.splitlines() if line.startswith("overrides: ")).split()[1:]
    assert "data.train.split=null" in overrides
    resolved = load_recipe(path, overrides)
    assert resolved.model.path == str(to / "model") and resolved.data.train.split is None
    assert load_rows(resolved.data.train).to_dict() == rows.to_dict()
    assert make_plan(resolved).model is None, "with the overrides nothing has to come from the hub"


def test_a_file_that_is_not_what_the_hub_says_is_refused(
    hub: Hub, recipe: dict[str, Any], write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.claims["model.safetensors"] = "0" * 64
    assert fetch(write(recipe, **{"model.path": "org/tiny"}), "--to", tmp_path / "there") == 2
    error = capsys.readouterr().err
    assert "model/model.safetensors is not what the hub has" in error or "model did not come" in error
    assert not (tmp_path / "there/manifest.json").exists()


def test_what_the_hub_does_not_give_is_said_before_anything_comes(
    hub: Hub, recipe: dict[str, Any], write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """All of it at once."""
    for name in [name for name in hub.files if name.endswith(".safetensors") and "/" not in name]:
        del hub.files[name]
    data = {"data.train": "org/none", "data.test": {"path": "data/none.tsv"}}
    assert fetch(write(recipe, **{"model.path": "org/tiny"} | data), "--to", tmp_path / "there") == 2
    error = capsys.readouterr().err
    assert "org/tiny has its weights as pytorch_model.bin only, which can run code" in error
    assert "data.train: org/none is neither here nor on the hub" in error
    assert "data.test: data/none.tsv does not exist here" in error
    assert fetch(write(recipe, **{"model.path": "org/gated"}), "--to", tmp_path / "there") == 2
    assert "accepted its licence on the hub and log in" in capsys.readouterr().err
    assert not (tmp_path / "there").exists() and hub.taken == []


def test_offline_is_said(recipe: dict[str, Any], write: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    assert fetch(write(recipe, **{"model.path": "org/tiny"})) == 2
    assert "org/tiny has to come from the hub, and HF_HUB_OFFLINE is set" in capsys.readouterr().err


NAMES = ("config.json", "model.safetensors", "tokenizer.model", "vocab.txt", "modeling_x.py", "sub/config.json", "x.pt")


def test_which_files_of_a_repository_are_taken() -> None:
    spec = ModelSpec(path="org/x")
    files = dict.fromkeys(NAMES)
    assert set(choose(spec, files)) == {"config.json", "model.safetensors", "tokenizer.model", "vocab.txt"}
    assert "modeling_x.py" in choose(ModelSpec(path="org/x", trust_remote_code=True), files)
    shards = {"config.json", "a-1-of-2.safetensors", "a-2-of-2.safetensors", "a.safetensors.index.json"}
    assert set(choose(spec, dict.fromkeys(shards | {"consolidated-00.safetensors", "../x.safetensors"}))) == shards
    assert "consolidated.safetensors" in choose(spec, dict.fromkeys(["config.json", "consolidated.safetensors"]))
    with pytest.raises(UserError, match=r"has no config\.json"):
        choose(spec, dict.fromkeys(["a.safetensors"]))
    with pytest.raises(UserError, match=r"no \.safetensors files, so it is no model"):
        choose(spec, dict.fromkeys(["README.md"]))


def test_local_files_are_hashed_in_place(
    local: Path, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = Path(shutil.copy(recipe["data"]["train"]["path"], tmp_path / "train.tsv"))
    own = (local, f"data.train.path={rows}", "--to", tmp_path / "there")
    assert fetch(*own) == 0
    assert below(tmp_path / "there") == {"manifest.json"}
    assert fetch(*own, "--verify") == 0
    rows.write_text(rows.read_text(encoding="utf-8").replace("a", "b", 1), encoding="utf-8")
    capsys.readouterr()
    assert fetch(*own, "--verify") == 2
    assert f"{rows} was changed" in capsys.readouterr().err


def test_local_files_that_are_copied_train_alike(
    fetched: Path, local: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    record = read_manifest(fetched)
    assert record["local"] == {} and record["overrides"]["data.train.path"] == "data/train/sst2_sentences_train.tsv"
    overrides = [f"{key}={fetched / value}" for key, value in record["overrides"].items()]
    copied, original = load_recipe(local, overrides), load_recipe(local)
    assert load_rows(copied.data.train).to_dict() == load_rows(original.data.train).to_dict()
    assert copied.model.path == str(fetched / "model") != original.model.path
    assert fetch(local, "--to", fetched, "--copy") == 0, "fetching again is no error"


def test_folders_of_rows_are_copied_with_their_names(
    recipe: dict[str, Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    Dataset.from_dict({"sentence": ["x", "y"], "label": [0, 1]}).save_to_disk(str(tmp_path / "saved"))
    path = write(recipe, **{"data.train": str(tmp_path / "saved")})
    assert fetch(path, "--to", tmp_path / "there", "--copy") == 0
    copied = load_from_disk(str(tmp_path / "there/data/train/saved"))
    assert copied["sentence"] == ["x", "y"]
    assert load_rows(DataSpec(path=str(tmp_path / "there/data/train/saved"))).num_rows == 2


FLAWS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / "model/config.json").unlink(), "model/config.json is missing"),
    "cut": (lambda f: (f / "model/model.safetensors").write_bytes(b"x"), "model/model.safetensors has 1 bytes, and "),
    "changed": (lambda f: flip(f / "model/model.safetensors"), "model/model.safetensors was changed"),
    "more": (
        lambda f: (f / "model/pytorch_model.bin").write_bytes(b"x"),
        "model/pytorch_model.bin is not in the manifest",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds nothing that was fetched whole"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"schema": 1'), "manifest.json cannot be read"),
    "another file": (lambda f: (f / "manifest.json").write_text("[]"), "is no manifest of `curvelora fetch`"),
    "leads out": (lambda f: edit(f, files={"../../secret": {}}), "'../../secret' would lie outside of"),
    "absolute": (lambda f: edit(f, files={"/etc/passwd": {}}), "'/etc/passwd' would lie outside of"),
    "other overrides": (lambda f: edit(f, overrides={"model.path": "../../x"}), "'../../x' would lie outside of"),
    "no overrides": (lambda f: edit(f, overrides=[1]), "it has no overrides"),
    "no files": (lambda f: edit(f, files=3), "it lists no files"),
    "other wheels": (
        lambda f: edit(f, wheels_for="Python 2.7, Plan9 vax"),
        "the wheels are for Python 2.7, Plan9 vax, and this",
    ),
}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize("name", FLAWS)
def test_every_flaw_is_named(fetched: Path, local: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    damage, part = FLAWS[name]
    damage(fetched)
    capsys.readouterr()
    assert fetch(local, "--to", fetched, "--verify") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and part in error and "Traceback" not in error
    assert error.count("\n  - ") <= 1, "one flaw, one line"


def test_another_recipe_s_folder_is_noticed(fetched: Path, local: Path, capsys: pytest.CaptureFixture) -> None:
    assert fetch(local, "--to", fetched, "--verify", "data.train.limit=8") == 0, "it needs the same files"
    assert fetch(local, "--to", fetched, "--verify", "model.path=org/other") == 2
    assert "was fetched for another recipe: model was" in capsys.readouterr().err


def test_nothing_is_written_outside(local: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there/model").symlink_to(tmp_path / "elsewhere")
    assert fetch(local, "--to", tmp_path / "there", "--copy") == 2
    assert "'model' would lie outside of" in capsys.readouterr().err
    assert below(tmp_path / "elsewhere") == set()
    for name in ("../x", "/x", "model/../../x", "a\\..\\x"):
        with pytest.raises(UserError, match="would lie outside"):
            inside(tmp_path / "there", name)
    (tmp_path / "there/model").unlink()
    (tmp_path / "there/model").mkdir()
    (tmp_path / "there/model/mine.bin").write_bytes(b"x")
    assert fetch(local, "--to", tmp_path / "there", "--copy") == 2
    assert "holds files that do not belong to it (model/mine.bin)" in capsys.readouterr().err
    assert not (tmp_path / "there/manifest.json").exists()


def test_a_disk_that_is_too_small_is_said_first(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert fetch(local, "--to", tmp_path / "there", "--copy") == 2
    assert "0.0 GB are to come" in capsys.readouterr().err and below(tmp_path / "there") == set()


def test_wheels(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """pip itself is not run here: it would ask the index."""
    requirements = tmp_path / "project/needs.txt"
    requirements.parent.mkdir()
    requirements.write_text("-e ./adapters\n", encoding="utf-8")
    calls: list[tuple[list[str], Path]] = []

    def pip(arguments: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess:
        calls.append((arguments, cwd))
        (Path(arguments[arguments.index("--wheel-dir") + 1]) / "x-1-py3-none-any.whl").write_bytes(b"wheel")
        return subprocess.CompletedProcess(arguments, 0, stderr="")

    monkeypatch.setattr("subprocess.run", pip)
    own = (local, "--to", tmp_path / "there")
    assert fetch(*own, "--wheels", requirements) == 0
    [(arguments, cwd)] = calls
    assert arguments[1:4] == ["-m", "pip", "wheel"] and arguments[-2:] == ["--requirement", "needs.txt"]
    assert (
        cwd == requirements.parent.resolve()
        and "wheels/x-1-py3-none-any.whl" in read_manifest(tmp_path / "there")["files"]
    )
    assert f"--find-links {tmp_path / 'there/wheels'}" in capsys.readouterr().out
    assert fetch(*own, "--verify") == 0

    failed = subprocess.CompletedProcess([], 1, stderr="noise\nERROR: No matching distribution found for x\n")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    capsys.readouterr()
    assert fetch(*own, "--wheels", requirements) == 2
    assert "No matching distribution found for x" in capsys.readouterr().err
    assert not (tmp_path / "there/manifest.json").exists(), "it would list what is no longer whole"
    assert fetch(*own, "--wheels", tmp_path / "none.txt") == 2
    assert fetch(*own, "--verify", "--copy") == 2
