"""Factors on disk: found by the weight itself, whole or not at all, and never another weight's."""

from __future__ import annotations

import logging
import os
from math import inf
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from curvelora import RanloraConfig, UserError, factor_cache
from curvelora.factor_cache import VARIABLE, cache_folder, cached_triplets, entries, load, store, weight_key
from curvelora.svd import Triplets, singular_triplets

W = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
KEY = weight_key(W)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the user's cache, and none writes there: -> the default folder, which does not exist yet."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home/curvelora/factors"


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in the environment variable, which training may write to."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "named"))
    return tmp_path / "named"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks that had to be computed."""
    ranks = []

    def compute(weight, r, end):
        ranks.append(r)
        return singular_triplets(weight, r, end)

    monkeypatch.setattr(factor_cache, "singular_triplets", compute)
    return ranks


def same(one: Triplets, other: Triplets) -> bool:
    return all(torch.equal(a, b) for a, b in ((one.U, other.U), (one.S, other.S), (one.V, other.V)))


def test_where_it_is(home, monkeypatch, tmp_path):
    assert cache_folder() == home
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the XDG rule says to ignore
    assert cache_folder() == Path.home() / ".cache/curvelora/factors"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"


@pytest.mark.parametrize("end", ["first", "last"])
def test_stored_and_found_again_with_its_bounds(named, counted, end):
    first = cached_triplets(W, 3, end)
    again = cached_triplets(W, 3, end)
    assert counted == [3] and same(first, again) and same(first, singular_triplets(W, 3, end))
    assert again.bounds == first.bounds and again.bounds.proved
    assert [path.name for path in named.iterdir()] == [f"{KEY}-{end}-3.safetensors"]


def test_the_default_folder_is_read_and_never_written(home, counted):
    cached_triplets(W, 3, "last")
    assert not home.exists() and counted == [3]
    wanted = singular_triplets(W, 3, "last")
    store(home, KEY, wanted, "last")
    assert same(cached_triplets(W, 3, "last"), wanted) and counted == [3]
    cached_triplets(W, 4, "last")
    assert len(list(home.iterdir())) == 1 and counted == [3, 4]


@pytest.mark.parametrize("end", ["first", "last"])
def test_more_triplets_serve_a_smaller_rank_and_fewer_do_not_serve_a_larger(named, counted, end):
    cached_triplets(W, 5, end)
    cut = cached_triplets(W, 2, end)
    exact = singular_triplets(W, 2, end)
    torch.testing.assert_close(cut.S, exact.S, rtol=1e-12, atol=0)
    torch.testing.assert_close(cut.product(), exact.product(), rtol=0, atol=1e-12)
    assert cut.bounds.proved and cut.bounds.subspace == inf  # of two of the five nothing is known
    assert cut.U.shape == (12, 2) and counted == [5]
    cached_triplets(W, 7, end)
    assert counted == [5, 7]
    assert [path.name for path in entries(named, KEY, 4, end)] == [f"{KEY}-{end}-{r}.safetensors" for r in (5, 7)]
    other = "last" if end == "first" else "first"
    assert entries(named, KEY, 1, other) == []


@pytest.mark.parametrize(
    "other",
    [W.T, W.bfloat16(), W.double(), W.reshape(9, 12), W + 1e-6, W.flip(0)],
    ids=["turned", "bf16", "fp64", "another shape", "nearly the same", "rows swapped"],
)
def test_another_weight_never_finds_it(named, counted, other):
    cached_triplets(W, 3, "last")
    cached_triplets(other, 3, "last")
    assert counted == [3, 3] and weight_key(other) != KEY


def test_the_key_is_that_of_the_numbers_not_of_the_memory(monkeypatch):
    assert weight_key(W.T.contiguous().T) == KEY and weight_key(W.clone()) == KEY
    monkeypatch.setattr(factor_cache, "CHUNK_BYTES", 50)  # a row at a time
    assert weight_key(W) == KEY
    assert weight_key(torch.nn.Parameter(W)) == KEY


def rewritten(path: Path, **changes) -> None:
    """The entry with other tensors, header and all else as it was."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    metadata |= changes.pop("metadata", {})
    save_file(load_file(path) | changes, path, metadata=metadata)


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no such thing"),
    "NaN": lambda path: rewritten(path, S=torch.tensor([2.0, float("nan"), 1.0], dtype=torch.float64)),
    "another shape": lambda path: rewritten(path, U=torch.zeros(11, 3, dtype=torch.float64)),
    "another dtype": lambda path: rewritten(path, U=torch.zeros(12, 3)),
    "not orthonormal": lambda path: rewritten(path, U=torch.ones(12, 3, dtype=torch.float64)),
    "another weight's": lambda path: rewritten(path, metadata={"weight": "0" * 64}),
    "bounds that are none": lambda path: rewritten(path, metadata={"bounds": '{"wrong": 1}'}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_named_in_one_sentence_and_computed_again(named, counted, caplog, damage):
    wanted = cached_triplets(W, 3, "last")
    path = named / f"{KEY}-last-3.safetensors"
    DAMAGE[damage](path)
    with caplog.at_level(logging.WARNING):
        assert same(cached_triplets(W, 3, "last"), wanted)
    (record,) = caplog.records
    said = record.getMessage()
    assert str(path) in said and "is damaged" in said and "computed again" in said and "\n" not in said
    assert counted == [3, 3]
    caplog.clear()
    assert same(cached_triplets(W, 3, "last"), wanted) and counted == [3, 3] and not caplog.records  # it was replaced


def test_a_write_that_fails_leaves_nothing_behind(named, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(factor_cache, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written to .* \(No space left on device\): name another folder"):
        store(named, KEY, singular_triplets(W, 2, "first"), "first")
    assert list(named.iterdir()) == []


def test_training_goes_on_where_the_cache_cannot_be_written(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert same(cached_triplets(W, 2, "first"), singular_triplets(W, 2, "first"))
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_an_entry_where_the_umask_lets_them(named, umask):
    before = os.umask(umask)
    try:
        path = store(named, "0" * 64, singular_triplets(torch.randn(6, 5), 2, "last"), "last")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_entry_that_may_not_be_read_is_not_called_damaged(named, monkeypatch, caplog):
    weight = torch.randn(6, 5)
    key = weight_key(weight)
    store(named, key, singular_triplets(weight, 2, "last"), "last")

    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what it says to anybody but root
    assert load(named, key, weight.shape, 2, "last") is None
    assert "belongs to somebody else and cannot be read" in caplog.text and "damaged" not in caplog.text


def test_foreign_files_are_left_alone(named):
    store(named, KEY, singular_triplets(W, 2, "first"), "first")
    for name in (f"{KEY}-first-x.safetensors", f"{KEY}-first-9.safetensors.tmp", ".writing-abc.tmp", "notes.txt"):
        (named / name).write_text("")
    assert [path.name for path in entries(named, KEY, 1, "first")] == [f"{KEY}-first-2.safetensors"]
    assert load(named, KEY, W.shape, 2, "first") is not None


def test_ranlora_starts_from_the_cache(llama, named, monkeypatch):
    config = dict(target_modules=["q_proj", "v_proj"], r=2)
    filled = get_peft_model(llama(), RanloraConfig(**config))
    assert len(list(named.iterdir())) == 4
    monkeypatch.setattr(factor_cache, "singular_triplets", lambda *_: pytest.fail("it is in the cache"))
    found = get_peft_model(llama(), RanloraConfig(**config))
    for (name, one), other in zip(filled.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(pytest.fail.Exception):  # another base
        get_peft_model(llama(seed=7), RanloraConfig(**config))
    assert os.environ[VARIABLE] == str(named)
