"""The whole real files, where CURVELORA_DATA_DIR names the folder that holds them (layout: docs/tasks.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.benchmarks.training import training_protocol

SPLITS = [(name, split) for name in benchmarks.BENCHMARKS for split in benchmarks.get(name).splits]


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_file_that_is_there_can_be_read(name: str, split: str, real_data: Path) -> None:
    """Every row of every file: ids, answers, and what each protocol needs; prompts can be made of all of them."""
    benchmark = benchmarks.get(name)
    try:
        benchmarks.find_file(benchmark, split, real_data)
    except UserError:
        pytest.skip(f"{name} {split} is not there")
    loaded = benchmarks.load(benchmark, real_data, split)
    assert 0 < loaded.n <= loaded.published
    described = benchmark.splits[split]
    for protocol in benchmark.protocols.values() if described.labelled else ():
        protocol.check(loaded.rows)
    if hasattr(protocol := training_protocol(benchmark, None), "prompt"):
        for template in protocol.templates:
            assert all(protocol.prompt(row, template).count("### Response:") <= 1 for row in loaded.rows)
