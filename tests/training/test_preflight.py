"""Preflight from beginning to end, with processes as threads that meet over a real store and reduce over gloo."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from curvelora.cli import run_guarded, run_module
from curvelora.errors import UserError
from curvelora_training.preflight import command
from curvelora_training.preflight.allreduce import Ring, check_sum, measure
from curvelora_training.preflight.check import Asked, Found, Machine, check
from curvelora_training.preflight.code import changed_code, hash_of_code
from curvelora_training.preflight.facts import describe_node
from curvelora_training.preflight.judge import Bounds
from curvelora_training.preflight.meeting import Absent, Meeting
from curvelora_training.preflight.page import lines, record_of
from curvelora_training.preflight.place import Place, open_store
from curvelora_training.preflight.rings import deadline
from preflight_world import CPU, NODE, SMALL, gloo, machine, meet, places


def found_on(who: list[Place], asked: Asked, machines: Callable[[int], Machine]) -> Found:
    """What the first process found; all have the same answer."""
    came = meet(who, lambda meeting: check(meeting, asked, machines(meeting.place.rank)))
    assert all(not isinstance(result, Exception) for result in came.values()), came
    assert len({fine for fine, _ in came.values()}) == 1
    found = came[0][1]
    assert came[0][0] is (not found.verdict.refusals)
    return found


def test_two_nodes_that_are_well(tmp_path: Path) -> None:
    folder = tmp_path / "runs/mine"
    found = found_on(places(2, 2), Asked(folder, Bounds(disk_bytes=1), **SMALL), lambda rank: machine())
    assert found.verdict.refusals == [] and not folder.exists(), "what was made is removed"
    text = lines(found)
    assert [line.split(":")[0] for line in text[:2]] == ["n1", "n2"] and "2 processes" in text[0]
    assert "GiB free" in text[0] and "MB/s" in text[1]
    record = record_of(found, places(2, 2)[0])
    rows = {(row["ring"], row["host"], row["bytes"]): row for row in record["all_reduce"]}
    assert set(rows) == {
        *(("all processes", None, size) for size in SMALL["sizes"]),
        *(("within a node", host, SMALL["sizes"][-1]) for host in ("n1", "n2")),
        ("across nodes", None, SMALL["sizes"][-1]),
    }
    whole = rows["all processes", None, 1 << 14]
    assert whole["processes"] == 4 and whole["wrong"] is None
    assert whole["algorithm_bytes_per_second"] == pytest.approx((1 << 14) / whole["seconds"])
    assert whole["bus_bytes_per_second"] == pytest.approx(1.5 * whole["algorithm_bytes_per_second"])  # 2 x 3 / 4
    assert rows["within a node", "n2", 1 << 14]["processes"] == 2
    assert (
        record["status"] == "fine"
        and record["kind"] == "preflight"
        and {"versions", "hardware", "commit"} <= set(record)
    )
    json.dumps(record, allow_nan=False)


def test_all_reasons_come_at_once(tmp_path: Path) -> None:
    """Another folder of the same name, other versions, other code and a wrong clock on the second node."""

    def other(rank: int) -> Machine:
        if rank == 0:
            return machine()
        node = copy.deepcopy(NODE) | {"code": "d" * 64}
        node["versions"]["torch"] = "2.12.1"
        return machine(describe=lambda place: node, clock=lambda: time.time() + 60)

    def act(meeting: Meeting) -> Any:
        own = tmp_path / meeting.place.host  # as a local disk that is mounted under the same name everywhere
        return check(meeting, Asked(own, Bounds(disk_bytes=1 << 60), **SMALL), other(meeting.place.rank))

    came = meet(places(2, 1), act)
    assert [fine for fine, _ in came.values()] == [False, False]
    refusals = came[0][1].verdict.refusals
    for part in (
        "the code differs between nodes",
        "torch 2.13.0 on n1, 2.12.1 on n2",
        "n2 does not see what n1 writes into the run folder",
        "--min-disk asks for",
        "the clock of n2 is 60.0 s ahead of that of n1",
    ):
        assert sum(part in text for text in refusals) == 1, (part, refusals)
    assert len(refusals) == 5
    assert came[0][1].reduced == {} and "not tried, for the reasons below" in "\n".join(lines(came[0][1]))
    assert not list(tmp_path.rglob(".preflight*"))


def test_processes_that_do_not_come_are_named() -> None:
    came = meet(places(2, 2), lambda meeting: meeting.call_the_roll(), seconds=0.3, absent=(2, 3))
    assert set(came) == {0, 1} and str(came[0]) == str(came[1]) and isinstance(came[1], Absent)
    assert "n2 (process 2, 3) did not come within 0.3 s; n1 did" in str(came[0])


def test_a_first_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvelora_training.preflight.meeting.GRACE", 0.1)
    came = meet(places(2, 1), lambda meeting: meeting.call_the_roll(), seconds=0.3, absent=(0,))
    assert set(came) == {1} and not isinstance(came[1], Absent), "nobody else would say it"
    assert "n2 (process 1) waited 0.4 s in vain for the first process at 127.0.0.1" in str(came[1])


def test_an_all_reduce_that_does_not_end_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ended = threading.Event()
    codes: list[int] = []
    monkeypatch.setattr("os._exit", lambda code: (codes.append(code), ended.set()))
    with deadline(0.05, lambda: "process 3 (n2) did not begin it"):
        assert ended.wait(20)
    assert codes == [2] and capsys.readouterr().err == "error: process 3 (n2) did not begin it\n"
    with deadline(0.05, lambda: "never"):
        pass
    time.sleep(0.2)
    assert codes == [2]


def test_a_process_that_falls_silent_is_named() -> None:
    def act(meeting: Meeting) -> None:
        meeting.call_the_roll()
        if meeting.place.rank != 1:
            meeting.gather("record", {})

    came = meet(places(2, 1), act, seconds=0.3)
    assert "n2 (process 1) came, and then said nothing more (record)" in str(came[0])


def test_an_error_on_one_node_is_told_and_nobody_waits() -> None:
    def broken(place: Place) -> dict[str, Any]:
        raise RuntimeError("no CUDA driver here")

    found = found_on(places(2, 1), Asked(**SMALL), lambda rank: machine(describe=broken) if rank else machine())
    assert found.verdict.refusals == ["n2 (process 1) cannot say what it has: RuntimeError: no CUDA driver here"]
    assert found.reduced == {}


def test_a_wrong_sum_is_refused() -> None:
    """One process whose all-reduce loses an element."""

    def faulty(place: Place, *rest: Any) -> dict[str, Ring]:
        rings = gloo(place, *rest)
        if place.rank == 1:
            whole = rings["all"]

            def reduce(tensor: torch.Tensor, operation: str) -> None:
                whole.reduce(tensor, operation)
                tensor[-1] *= 1 if operation == "max" else 0

            rings["all"] = replace(whole, reduce=reduce)
        return rings

    found = found_on(places(2, 1), Asked(**SMALL), lambda rank: machine(rings=faulty))
    assert len(found.verdict.refusals) == 1
    assert (
        "is wrong on process 1 (n2): 1 of 256 sums are wrong, the first at 255: 0 instead of 12"
        in found.verdict.refusals[0]
    )
    assert "sum WRONG" in "\n".join(lines(found))


def test_the_known_sum_is_that_of_all_processes() -> None:
    """Against a sum by hand: the second of 3 processes gives 2 times the pattern, the others 1 and 3 times."""
    pattern = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 1, 2])

    def reduce(tensor: torch.Tensor, operation: str) -> None:
        assert torch.equal(tensor, 2 * pattern)
        tensor += 1 * pattern + 3 * pattern

    ring = Ring(reduce, 1, 3, (0, 1, 2))
    assert check_sum(ring, 9, CPU) is None
    alone = replace(ring, reduce=lambda tensor, operation: None)
    assert check_sum(alone, 9, CPU) == "9 of 9 sums are wrong, the first at 0: 2 instead of 6"
    [row] = measure(alone, (36,), CPU, timed=2)
    assert row["bytes"] == 36 and row["wrong"] == check_sum(alone, 9, CPU)


def test_a_first_process_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(UserError, match=r"n2 \(process 1\) cannot reach the first process at 127.0.0.1:1 within 0.2 s"):
        open_store(replace(places(2, 1)[1], port=1), 0.2)


def test_the_hash_of_the_code_follows_every_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("curvelora", "curvelora_eval", "curvelora_training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py"))
    )
    before = hash_of_code()
    (tmp_path / "curvelora/__pycache__").mkdir()
    (tmp_path / "curvelora/__pycache__/x.pyc").write_bytes(b"1")
    assert hash_of_code() == before, "compiled files are no code"
    (tmp_path / "curvelora_eval/__init__.py").write_text("a = 2\n")
    assert hash_of_code() != before


def test_the_command_on_one_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    record = tmp_path / "results/preflight.json"

    def preflight(*arguments: str) -> int:
        return run_guarded(lambda: run_module(command, "curvelora preflight", list(arguments)))

    assert preflight("--run-folder", str(tmp_path / "run"), "--min-disk", "0", "--json", str(record)) == 0
    shown = capsys.readouterr().out
    kept = json.loads(record.read_text(encoding="utf-8"))
    assert f"code {hash_of_code()[:12]}" in shown and "there is one process" in shown
    assert kept["nodes"][0]["code"] == describe_node(Place())["code"] == hash_of_code()
    assert kept["nodes"][0]["run_folder"]["free_bytes"] > 0

    submitted = tmp_path / "run/launch/code.json"
    submitted.parent.mkdir(parents=True)
    for code, commit, changed in ((hash_of_code(), "c0ffee", False), ("0" * 64, "c0ffee", True), ("0" * 64, None, True)):
        submitted.write_text(json.dumps({"commit": commit, "sha256": code}))
        assert preflight("--run-folder", str(tmp_path / "run"), "--min-disk", "0") == 0
        shown = capsys.readouterr().out
        assert ("the code has changed since the job was submitted" in shown) == changed
        assert not changed or f"000000000000 then (commit {commit or 'unknown'}" in shown
    for unknown in ("{}", "[]", "no json"):
        submitted.write_text(unknown)
        assert changed_code(tmp_path / "run", hash_of_code()) is None

    (tmp_path / "file").write_text("")
    refused = ("--run-folder", str(tmp_path / "file/run"), "--expect-gpus", "99", "--json", str(record))
    assert preflight(*refused) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: preflight refuses, for 2 reasons:\n  - ") and "99 were asked for" in error
    assert "cannot write the run folder" in error and "Traceback" not in error
    assert json.loads(record.read_text(encoding="utf-8"))["status"] == "refused"

    assert preflight("--sizes", "1Q,2", "--timeout", "0", "--expect-gpus", "-1") == 2
    error = capsys.readouterr().err
    for part in ("'1Q' is no size", "'2' is no size", "--timeout is 0", "--expect-gpus is -1"):
        assert part in error
