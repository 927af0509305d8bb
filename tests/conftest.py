"""Shared by all tests: no network, tiny models with real text, and the demo's real model."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it; inherited by subprocesses
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only get in each other's way

import csv
from pathlib import Path

import pytest
import torch
from slices import parse_slice, taken

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels then run on this CPU

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
# what takes longest: with several workers these files are begun first, so that none is left to one worker at the end
LONG = {"zero", "faults", "resume_processes", "training", "launch", "docs", "demo", "bench_compare"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/matrix, which pytest reads from this file only, and of parts of a run."""
    parser.addoption("--slice", type=parse_slice, metavar="K/N", help="of the chosen tests every N-th, from the K-th on")
    group = parser.getgroup("matrix")
    group.addoption("--matrix-device", default="cpu", help="device on which tests/matrix runs")
    group.addoption("--record-matrix", type=Path, metavar="PATH", help="write the matrix page (Markdown) after the run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-matrix") and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--record-matrix needs all cells in one process: leave out -n")


@pytest.hookimpl(trylast=True)  # after markers have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (part := config.getoption("--slice")) is not None:
        chosen = taken(items, part)
        left = set(map(id, chosen))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in left])
        items[:] = chosen
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Real sentences, to train tiny tokenizers on."""
    with (DATA / "sst2_sentences_train.tsv").open(encoding="utf-8") as stream:
        return [row["sentence"] for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)]


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, the real pretrained model of the demo."""
    from curvelora_training.demo import export_minilm

    folder = tmp_path_factory.mktemp("models") / "minilm"
    export_minilm(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> dict[str, Path]:
    """Checkpoints of every architecture that the task kinds need, with random weights and a tokenizer of real text."""
    from tiny import build_tiny_models

    return build_tiny_models(tmp_path_factory.mktemp("tiny"), sentences)
