"""Batches: the same for all arms, shared out between processes without loss, and never a held-out one in training."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from curvelora.errors import UserError
from curvelora_training.bench.sources import RandomTokens, TaskRows, TextBlocks, read_text


class Letters:
    """A tokenizer of letters: the i-th letter of the text is the id i, so that every block is known."""

    def __call__(self, text, verbose=False):
        return {"input_ids": list(range(len(text)))}


def collate(rows):
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}


def ids(batches):
    return [batch["input_ids"].tolist() for batch in batches]


def blocks(count, batch_size=2, length=3):
    return TextBlocks("x" * (count * length), Letters(), batch_size, length)


@pytest.fixture(params=["random", "text", "rows"])
def source(request):
    """Each kind, with batches of two."""
    if request.param == "random":
        return RandomTokens(1000, 2, 6)
    if request.param == "text":
        return blocks(30)
    return TaskRows([[i] for i in range(20)], [[i] for i in range(100, 105)], 2, collate)


def test_batches_are_functions_of_seed_and_step(source):
    straight = ids(source.batch(7, step) for step in range(30))
    mixed = {step: source.batch(7, step)["input_ids"].tolist() for step in (29, 3, 17, 0)}
    source.batch(8, 2)  # another arm's seed in between
    assert ids(source.batch(7, step) for step in range(30)) == straight
    assert all(straight[step] == found for step, found in mixed.items())
    assert ids(source.batch(8, step) for step in range(30)) != straight
    assert len({str(batch) for batch in straight[:5]}) == 5


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_that_one_process_would_take(processes):
    shared, alone = blocks(41, 2), blocks(41, 2 * processes)
    alone.items = list(shared.items)  # a larger batch holds out more
    for step in range(12):
        parts = [shared.batch(5, step, rank, processes)["input_ids"] for rank in range(processes)]
        assert torch.equal(torch.cat(parts), alone.batch(5, step)["input_ids"])
        assert len({tuple(row) for part in parts for row in part.tolist()}) == 2 * processes


def test_random_tokens_differ_between_processes():
    source = RandomTokens(1000, 2, 6)
    assert source.tokens == 12 and source.held_out(3) == []
    assert len({str(source.batch(1, 2, rank, 4)["input_ids"].tolist()) for rank in range(4)}) == 4
    drawn = RandomTokens(50, 64, 64).batch(0, 0)
    assert drawn["input_ids"].unique().tolist() == list(range(50)) and torch.equal(drawn["labels"], drawn["input_ids"])


def test_random_tokens_do_not_depend_on_the_process():
    code = (
        "from curvelora_training.bench.sources import RandomTokens\n"
        "print(RandomTokens(1000, 2, 6).batch(42, 3, 1, 2)['input_ids'].tolist())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(RandomTokens(1000, 2, 6).batch(42, 3, 1, 2)["input_ids"].tolist())


def test_an_epoch_is_every_item_once_and_the_next_one_another_order():
    source = TaskRows([[i] for i in range(10)], [[99]], 2, collate)
    epochs = [[row[0] for b in ids(source.batch(3, 5 * e + s) for s in range(5)) for row in b] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_what_is_held_out_is_never_trained_on():
    source = blocks(40, batch_size=3)
    held = {tuple(row) for batch in source.held_out(99) for row in batch["input_ids"].tolist()}
    trained = {tuple(r) for step in range(60) for r in source.batch(1, step)["input_ids"].tolist()}
    assert len(held) == 3 and len(trained) == 37 and not held & trained
    assert held == {(i, i + 1, i + 2) for i in (111, 114, 117)}  # the end of the text
    rows = TaskRows([[i] for i in range(9)], [[i] for i in range(100, 105)], 2, collate)
    assert ids(rows.held_out(99)) == [[[100], [101]], [[102], [103]], [[104]]]
    assert ids(rows.held_out(1)) == [[[100], [101]]]
    assert max(r[0] for s in range(40) for r in rows.batch(0, s)["input_ids"].tolist()) == 8
    assert TaskRows([[1], [2]], None, 2, collate).held_out(4) == []


def test_a_share_of_a_long_text_is_held_out():
    assert len([r for b in blocks(400).held_out(99) for r in b["input_ids"]]) == 20


def test_blocks_are_the_text_in_order_and_the_rest_is_left_out():
    source = TextBlocks("x" * 32, Letters(), 2, 3)
    everything = sorted(r for s in range(4) for r in source.batch(0, s)["input_ids"].tolist())
    assert everything == [[i, i + 1, i + 2] for i in range(0, 24, 3)] and source.tokens == 6


def test_fewer_rows_than_a_batch_are_repeated():
    source = TaskRows([[1], [2], [3]], None, 4, collate)
    assert sorted(r[0] for r in source.batch(0, 0)["input_ids"].tolist()) in ([1, 1, 2, 3], [1, 2, 2, 3], [1, 2, 3, 3])


def test_a_text_that_is_too_short_is_refused():
    assert len(blocks(4).batch(0, 0)["input_ids"]) == 2
    with pytest.raises(UserError, match="9 tokens, which is less than two batches of 2 x 3"):
        blocks(3)


def test_the_packaged_text_and_files(tmp_path):
    text, name = read_text(None)
    assert len(text) > 100_000 and "Shakespeare" in name and "\r" not in text
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text("héllo", encoding="utf-8")
    packed.write_bytes(gzip.compress("héllo".encode()))
    assert read_text(str(plain)) == ("héllo", str(plain)) and read_text(str(packed))[0] == "héllo"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "No such file"),
        ("latin.txt", "é".encode("latin-1"), "no UTF-8 text"),
        ("broken.txt.gz", b"no gzip", "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"a" * 5000, mtime=0)[:-20], "cannot be read"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_text(str(tmp_path / name))


def test_a_real_tokenizer(tiny_models):
    source = TextBlocks(read_text(None)[0][:6000], AutoTokenizer.from_pretrained(tiny_models["llama"]), 2, 16)
    batch = source.batch(0, 0)
    assert batch["input_ids"].shape == (2, 16) and torch.equal(batch["labels"], batch["input_ids"])
