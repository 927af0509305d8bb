"""The rows of a step: the same however many processes share it, and shared equally or not at all."""

from __future__ import annotations

from itertools import chain

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from curvelora.errors import UserError
from curvelora_training.row_order import RowOrder, share_step


# 26 rows, 8 a step: any way to share a step
@pytest.mark.parametrize("grouped", [False, True])
def test_a_steps_rows_are_the_same_however_they_are_shared(grouped: bool) -> None:
    lengths = [(7 * i) % 13 + 1 for i in range(26)] if grouped else None

    def steps(batch: int, accumulation: int, processes: int, epoch: int) -> list[list[int]]:
        shards = []
        for index in range(processes):
            order = RowOrder(26, batch * accumulation * processes, 3, lengths)
            order.set_epoch(epoch)
            shards.append(list(BatchSamplerShard(BatchSampler(order, batch, False), processes, index)))
        dealt = [rows for together in zip(*shards, strict=True) for rows in together]
        size = accumulation * processes
        return [list(chain(*dealt[i : i + size])) for i in range(0, len(dealt), size)]

    for epoch in (0, 1):
        wanted = steps(8, 1, 1, epoch)
        assert [len(step) for step in wanted] == [8, 8, 8, 8]
        assert sorted(list(chain(*wanted))[:26]) == list(range(26)) and wanted[3][2:] == wanted[0][:6]
        for shared in ((4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8)):
            assert steps(*shared, epoch) == wanted
    assert steps(8, 1, 1, 0) != steps(8, 1, 1, 1)


def test_rows_that_are_fewer_than_a_step_are_taken_again() -> None:
    order = list(RowOrder(3, 8, 0))
    assert order == (order[:3] * 3)[:8] and set(order) == {0, 1, 2}


@pytest.mark.parametrize(
    ("rows", "batch", "processes", "shared"),
    [
        (16, 4, 2, (4, 2)),
        (16, 4, 1, (4, 4)),
        (16, 4, 8, (2, 1)),
        (24, 16, 2, (12, 1)),
        (20, 4, 2, (2, 5)),
        (7, 4, 1, (1, 7)),
    ],
)
def test_a_step_is_shared(rows: int, batch: int, processes: int, shared: tuple[int, int]) -> None:
    assert share_step(rows, batch, processes) == shared


@pytest.mark.parametrize(("processes", "said"), [(3, "start 2 or 4"), (16, "start 8"), (5, "start 4 or 8")])
def test_a_step_that_cannot_be_shared_is_refused(processes: int, said: str) -> None:
    with pytest.raises(
        UserError, match=f"has 8 rows, which {processes} processes cannot share in equal parts: {said}$"
    ):
        share_step(8, 4, processes)
