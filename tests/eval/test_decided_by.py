"""What decides predictions besides the question: results of other kernels or libraries are not taken for one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from curvelora.errors import UserError
from curvelora_eval import benchmarks, models
from curvelora_eval.environment import installed_version
from curvelora_eval.evaluation import jobs
from curvelora_eval.evaluation.arms import Arm
from curvelora_eval.evaluation.ask import Plan
from curvelora_eval.evaluation.question import Question
from curvelora_eval.spec import ModelSpec


@pytest.fixture
def decided(llama_folder: Path, task_data: Path, tmp_path: Path) -> Any:
    """`decided(quantization="nf4")` -> decided_by of one job on the bare model."""
    boolq = benchmarks.get("boolq")
    question = Question(boolq, boolq.protocol(), "legacy", benchmarks.load(boolq, task_data))

    def made(**model: Any) -> dict[str, Any]:
        plan = Plan(ModelSpec(path=str(llama_folder), **model), [Arm("baseline")], [question], [])
        (job,) = jobs.make_jobs(plan, tmp_path, 4, "hash")
        return dict(job.decided_by)

    return made


def test_the_attention_is_the_one_that_computes(decided: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is another one on another machine, and flash-attn a library whose version counts where it is used."""
    monkeypatch.setattr(jobs, "default_device", lambda: torch.device("cpu"))
    assert decided()["attention"] == decided(attention="eager")["attention"] == "eager"
    monkeypatch.setattr(jobs, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(jobs, "installed_version", lambda name: f"{name} 1.2")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    plain = decided(dtype="bfloat16")
    assert plain["attention"].startswith("sdpa") and "flash-attn" not in plain["versions"]
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: name == "flash_attn" or None)
    flash = decided(dtype="bfloat16")
    assert flash["attention"] == "flash_attention_2" and flash["versions"]["flash-attn"] == "flash-attn 1.2"


def test_bitsandbytes_counts_where_it_computes(decided: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bitsandbytes" not in decided()["versions"]
    for storage in ("nf4", "int8"):
        assert decided(quantization=storage)["versions"]["bitsandbytes"] == installed_version("bitsandbytes")
    before = json.loads(json.dumps(decided(quantization="nf4")))
    monkeypatch.setattr(
        jobs, "installed_version", lambda name: "0.1" if name == "bitsandbytes" else installed_version(name)
    )
    with pytest.raises(UserError, match=r"versions was .* and is now"):
        jobs.journal.check_same(tmp_path, before, decided(quantization="nf4"))
