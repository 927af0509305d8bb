"""One training step with fused kernels equals one without, in every mode of training: engines, checkpointing, dropout, compiled.

On a CPU the kernels run in Triton's interpreter. The two ways round to bf16 in other places, and their updates were 1 % apart in
all cells there (of A and of B, as a whole), their losses 4e-4; leaving Sinter out moves the updates by 80 %.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from curvelora.activations import Activation
from curvelora.kernels import choice, use_kernels, workspace
from curvelora.layers.dense_delta import DeltaMap
from curvelora_training.bench.adapted import arm_model, set_update_std
from curvelora_training.bench.arms import parse_arms
from curvelora_training.bench.random_base import nf4_byte_table, random_model, random_nf4_linear
from kernel_modes import ARMS, COUNTED, ENGINES, FEW, SINGLE, SMALL, cell, counted, step

APART, LOSS = 0.03, 2e-3
BLOCKS = 4  # of a base in shares, which has two buffers
HOOKED = "the base layer has hooks, perhaps one that brings its weight"
CPU = torch.device("cpu")
GPUS = torch.cuda.device_count()
LAUNCHED = tuple(f"{mode}:{arm}" for mode in ENGINES for arm in ARMS)
QUICK = (
    "nonreentrant:features",
    "reentrant:qlora",
    "kept:exact",
    "offloaded:merged",
    "autocast:dense",
    "reentrant:thin",
    "nonreentrant:fp8",
    "nonreentrant:dropped",
)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a CUDA GPU")]
needs_two = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason=f"needs 2 CUDA GPUs, and there are {GPUS}")]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, kernels run in Triton's interpreter."""
    monkeypatch.setenv("CURVELORA_KERNELS", "interpret")
    if (reason := choice.why_no_triton("interpret")) is not None:
        pytest.skip(reason)


def check(found: dict[str, Any]) -> None:
    """Losses and updates are those without kernels, and kernels made every weight that they should have, once."""
    none, calls, wanted = found["calls"]
    assert found["fused"] > 0 and not found["unfused"] and (none, calls) == (0, wanted)
    assert found["fp8"][0] == found["fp8"][1]
    plain, fused = found["losses"]  # of each batch before the step, and of the last one after it
    assert abs(plain[-2] - plain[-1]) > 5 * LOSS  # the step did something
    assert all(abs(one - other) <= LOSS for one, other in zip(plain, fused, strict=True))
    assert max(found["apart"].values()) <= APART


# compiled, the layer without kernels cannot be had with the kernels' own masks
MASKED = [("compiled", "exact"), ("compiled", "dropped")]
SINGLES = [f"{mode}:{arm}" for mode in SINGLE for arm in ARMS if (mode, arm) not in MASKED]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SINGLES])
def test_a_step_is_that_without_kernels(interpreted: None, name: str) -> None:
    mode, _, arm = name.partition(":")
    check(cell(arm, mode, CPU))


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_gpu) for n in SINGLES])
def test_a_step_is_that_without_kernels_on_a_gpu(name: str) -> None:
    mode, _, arm = name.partition(":")
    check(cell(arm, mode, torch.device("cuda", 0)))


def test_without_sinter_the_step_is_another() -> None:
    """What the bounds are far below of."""
    moved = {}
    for name in ("loran:sinter-large", "loran:identity"):
        model = adapted(random_model(llama(), "nf4", CPU), name)
        use_kernels(model, "off")
        moved[name] = step(model, "plain", CPU)[1]
    with_it, without = moved.values()
    for kind, update in with_it.items():
        assert (update - without[kind]).norm() > 10 * APART * update.norm()


def launched(folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """All cells, from two processes."""
    out = folder / "cells.json"
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("kernel_modes.py")), str(out), *LAUNCHED],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_engines_train_as_without_kernels(tmp_path: Path, interpreted: None) -> None:
    """Two processes. What is not bf16 is bit for bit the same: kernels that read a share's stale codes would show here."""
    environment = {"TRITON_INTERPRET": "1", "CURVELORA_KERNELS": "interpret", "DS_ACCELERATOR": "cpu"}
    found = launched(tmp_path, environment)
    for name in LAUNCHED:
        check(found[name])
    assert found["zero3:merged"]["losses"] == found["ddp:merged"]["losses"]
    assert found["zero3:exact"]["losses"] == found["zero2:exact"]["losses"]


@pytest.fixture(scope="module")
def on_two_gpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launched(tmp_path_factory.mktemp("modes"), {})


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_two) for n in LAUNCHED])
def test_engines_train_as_without_kernels_on_gpus(on_two_gpus: dict[str, Any], name: str) -> None:
    check(on_two_gpus[name])


def llama(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **SMALL | sizes)


def adapted(base: Any, arm: str, targets: tuple[str, ...] = FEW) -> Any:
    options = {"r": 4, "alpha": 16, "dropout": 0.0, "target_modules": list(targets)}
    model = arm_model(base, parse_arms(arm)[0], options, [], 0, True).train()
    set_update_std(model, 1e-2)
    return model


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of one batch, without checkpointing."""
    model.get_base_model().enable_input_require_grads()
    tokens = torch.arange(6)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("arm", ["merged", *(pytest.param(arm, marks=pytest.mark.slow) for arm in ("dense", "qlora", "thin"))])
def test_a_base_in_shares_is_read_again_in_the_backward_pass(group: None, interpreted: None, arm: str) -> None:
    """More blocks than buffers: by then the buffer of a layer has been another one's, and was gathered again in its place."""
    base, name, _ = ARMS[arm]
    found = []
    for shared in (False, True):
        sizes = llama(num_hidden_layers=BLOCKS)
        model = adapted(random_model(sizes, base, CPU, shared=shared), name, ("down_proj",))
        assert use_kernels(model, "auto")[0] == BLOCKS
        with counted(COUNTED.get(arm, "merged_weight")) as calls:
            found.append(gradients(model))
        assert calls[0] == 2 * BLOCKS
    whole, shares = found
    for key, gradient in whole.items():
        assert gradient.abs().sum() > 0 and torch.equal(shares[key], gradient), key


def test_a_base_layer_that_its_own_hook_gathers_takes_no_kernels(group: None, interpreted: None) -> None:
    """The output layer is outside of the blocks, and a fused pass would not call it."""
    found = []
    for shared in (False, True):
        model = adapted(random_model(llama(), "bf16", CPU, shared=shared), "loran:sinter-large", ("lm_head", "q_proj"))
        fused, reasons = use_kernels(model, "auto")
        with counted():
            found.append(gradients(model))
        assert (fused, list(reasons)) == ((3, [HOOKED]) if shared else (4, []))
    whole, shares = found
    for key, gradient in whole.items():
        if "lm_head" not in key:
            assert (shares[key] - gradient).norm() <= APART * gradient.norm(), key


@pytest.mark.parametrize("arm", ["merged", "dense", "qlora", "thin"])
def test_a_base_that_deepspeed_partitions_takes_no_kernels(interpreted: None, arm: str) -> None:
    """Also while its weight is there: prefetched, it may not have arrived, and it is gone before the backward pass."""
    base, name, _ = ARMS[arm]
    model = adapted(random_model(llama(), base, CPU), name)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.ds_id = 1
    fused, reasons = use_kernels(model, "auto")
    assert (fused, reasons) == (0, {"the base is partitioned by DeepSpeed's ZeRO-3": 6})
    with counted(COUNTED.get(arm, "merged_weight")) as calls:
        gradients(model)
    assert calls[0] == 0


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 1, reason="needs a CUDA GPU")
def test_a_recorded_graph_keeps_its_workspace() -> None:
    """Another graph with a larger layer, and what the memory is given to meanwhile, change nothing of the first one."""
    from curvelora.kernels.merged_linear import merged_linear
    from curvelora.kernels.nf4 import codes_of

    device, delta = torch.device("cuda", 0), DeltaMap(Activation("sinter", 2e-2, 1e4), 1.0)
    draw = torch.Generator(device).manual_seed(0)

    def recorded(width: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor, tuple]:
        layer = random_nf4_linear(width, width, torch.bfloat16, nf4_byte_table(device), draw)
        A, B = (torch.randn(*shape, device=device, generator=draw) / 40 for shape in ((8, width), (width, 8)))
        x = torch.randn(32, width, device=device, generator=draw).bfloat16()
        wanted = merged_linear(x, A, B, None, codes_of(layer), delta)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = merged_linear(x, A, B, None, codes_of(layer), delta)
        return graph, y, wanted, (layer, A, B, x)  # whose memory the graph reads

    held = [recorded(256), recorded(1024), recorded(2048)]
    workspace.release()
    torch.cuda.empty_cache()
    filled = [torch.full((1 << 20,), float("nan"), device=device) for _ in range(64)]
    for graph, y, wanted, _ in held:
        y.zero_()
        graph.replay()
        assert torch.equal(y, wanted)
    del filled
