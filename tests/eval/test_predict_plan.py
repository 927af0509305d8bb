"""The plan of batches and the journal: what makes a run that was killed end in the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from curvelora.errors import UserError
from curvelora_eval.predict import journal
from curvelora_eval.predict.batches import plan, share, spread
from curvelora_eval.predict.journal import Journal

DECIDED = {"task": "boolq", "batch_size": 4}


def test_the_plan_is_decided_by_lengths_and_batch_size() -> None:
    lengths = random.Random(0).choices(range(5, 40), k=50)
    batches = plan(lengths, 8)
    assert sorted(unit for batch in batches for unit in batch) == list(range(50))
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    flat = [lengths[unit] for batch in batches for unit in batch]
    assert flat == sorted(lengths, reverse=True)
    assert plan([7, 7, 7], 2) == [[0, 1], [2]] and plan([], 4) == []


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_share_all_batches(world: int) -> None:
    taken = [list(share(20, rank, world)) for rank in range(world)]
    assert sorted(number for part in taken for number in part) == list(range(20))
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_units_to_check_are_spread_over_the_lengths() -> None:
    batches = plan(list(range(100)), 10)
    assert spread(batches, 5) == [99, 75, 50, 25, 0]
    assert spread(batches, 1) == [99] and spread(batches, 0) == [] and spread([], 3) == []
    assert sorted(spread(batches, 500)) == list(range(100))


def entry(number: int) -> dict:
    return {"batch": number, "seconds": 0.5, "tokens": 3, "outputs": [{"text": f"é {number}\n"}]}


def write(folder: Path, rank: int, numbers: list[int]) -> Path:
    with Journal(folder, rank, DECIDED) as mine:
        for number in numbers:
            mine.add(entry(number))
    return mine.path


def test_what_is_written_is_read_whatever_the_number_of_processes(tmp_path: Path) -> None:
    write(tmp_path, 0, [0, 3])
    write(tmp_path, 1, [1])
    write(tmp_path, 0, [2])  # opened again
    assert journal.read(tmp_path) == {number: entry(number) for number in range(4)}
    assert journal.seconds(tmp_path) == 1.5
    assert journal.repair(tmp_path, DECIDED) == []
    journal.clear(tmp_path)
    assert journal.read(tmp_path) == {} and journal.seconds(tmp_path) == 0


def test_a_journal_cut_at_any_byte_is_repaired(tmp_path: Path) -> None:
    """Every possible end of the header and of the last two lines: whole lines stay, the rest is cut off and said."""
    whole = write(tmp_path, 0, [0, 1, 2]).read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 4
    path = tmp_path / "predictions.part-0.jsonl"
    for cut in [*range(ends[0]), *range(ends[1], len(whole) + 1)]:
        path.write_bytes(whole[:cut])
        kept = max([0, *(end for end in ends if end <= cut)])
        said = journal.repair(tmp_path, DECIDED)
        assert path.read_bytes() == whole[:kept], cut
        assert len(said) == (kept < cut) and all("half-written" in sentence for sentence in said)
        done = ends.index(kept) if kept else 0
        assert list(journal.read(tmp_path)) == list(range(done))
        write(tmp_path, 0, [n for n in range(3) if n not in journal.read(tmp_path)])
        assert path.read_bytes() == whole, cut


def test_a_tail_of_zeros_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path, 0, [0])
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 4096)  # what a file system may leave after a power cut
    assert len(journal.repair(tmp_path, DECIDED)) == 1 and path.read_bytes() == whole


def test_damage_elsewhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 0, [0, 1, 2])
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    with pytest.raises(UserError, match=r"line 2, is damaged.*--overwrite"):
        journal.repair(tmp_path, DECIDED)


def test_another_evaluation_is_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path, 0, [0])
    with pytest.raises(UserError, match=r"batch size was 4 and is now 8.*--overwrite"):
        journal.repair(tmp_path, {"task": "boolq", "batch_size": 8})
    # one that died before its first batch, for want of memory say, stands in nobody's way
    other = tmp_path / "other"
    other.mkdir()
    path = write(other, 0, [])
    assert journal.repair(other, DECIDED) == [] and path.exists()
    assert journal.repair(other, {"task": "boolq", "batch_size": 8}) == [] and not path.exists()
    assert journal.differences({"a": 1}, {"a": 1, "b_c": None}) == []
    assert journal.differences({"a": 1}, {"b_c": 2}) == ["a was 1 and is now null", "b c was null and is now 2"]


def test_two_writers_of_one_journal_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, DECIDED), pytest.raises(UserError, match="another process is writing"):
        Journal(tmp_path, 0, DECIDED)
    write(tmp_path, 0, [0])
