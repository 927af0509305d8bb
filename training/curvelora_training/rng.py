"""The state of every random number generator of a process, as tensors and numbers: Python's, NumPy's, PyTorch's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

State = tuple[dict[str, torch.Tensor], str]


def rng_state() -> State:
    """(tensors, the rest as JSON) of this process; of GPUs, the one that it uses."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"python": torch.tensor(words), "numpy": torch.from_numpy(keys.astype(np.int64))}
    tensors["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    rest = {"python": [version, gauss], "numpy": [kind, int(position), int(has_gauss), float(cached)]}
    return tensors, json.dumps(rest)


def set_rng_state(state: State) -> None:
    """Continue from `state`; a GPU's part is left out where this process or the one that wrote it has none."""
    tensors, rest = state[0], json.loads(state[1])
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def write_rng(folder: Path, states: list[State]) -> None:
    """A file each process, in order of rank."""
    folder.mkdir()
    for index, (tensors, rest) in enumerate(states):
        save_file(tensors, folder / f"rank-{index:05}.safetensors", metadata={"rest": rest})


def read_rng(folder: Path, rank: int, processes: int) -> State:
    """What the process of this rank had; of more processes than wrote the files, the first ones share theirs again.

    Args:
        processes: how many wrote them.
    """
    with safe_open(str(folder / f"rank-{rank % processes:05}.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return tensors, file.metadata()["rest"]
