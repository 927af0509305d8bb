"""A liger-kernel that patches as the real one does (0.8.5, `monkey_patch.py`) and counts; transformers' own code computes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SOURCE = """
from collections import Counter
from types import MethodType

from transformers.models.llama import modeling_llama

calls = Counter()
rotate = modeling_llama.apply_rotary_pos_emb


def rope(*args, **kwargs):
    calls["rope"] += 1
    return rotate(*args, **kwargs)


def bind(module, name):
    def forward(self, *args, **kwargs):
        calls[name] += 1
        return type(self).forward(self, *args, **kwargs)

    module.forward = MethodType(forward, module)


def apply_liger_kernel_to_llama(
    rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
):
    if rope:
        modeling_llama.apply_rotary_pos_emb = globals()["rope"]
    modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = None
    assert not cross_entropy
    if fused_linear_cross_entropy:
        bind(model, "loss")
    inner = getattr(model, model.base_model_prefix, model)
    bind(inner.norm, "norm")
    for layer in inner.layers:
        bind(layer.input_layernorm, "norm")
        if swiglu:
            bind(layer.mlp, "mlp")


MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_liger_kernel_to_llama}


def _apply_liger_kernel_to_instance(model, **kwargs):
    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model, **kwargs)
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it installed in `folder`, and a GPU for it; `calls` of its `monkey_patch` counts what ran."""
    package = folder / "liger_kernel/transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "monkey_patch.py").write_text(SOURCE, encoding="utf-8")
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # so that what a test imports is forgotten after it
        del sys.modules[name]
    monkeypatch.syspath_prepend(folder)
    has_gpu(monkeypatch, True)


def has_gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """What the check for liger-kernel finds; nothing else is told."""
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: there))
    monkeypatch.setattr("curvelora_training.liger.torch", torch)
