"""What `curvelora eval` does with what is in --out already: keep, go on, refuse or replace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvelora_eval.predict.choices import Choices
from run_files import result

pytestmark = pytest.mark.usefixtures("offline")
BOOLQ, PIQA = "boolq-loglikelihood", "piqa-loglikelihood"
FEW = ["--protocol", "loglikelihood", "--batch-check", 0, "--limit", 3]


def test_a_smaller_batch_size_goes_on_with_the_tasks_that_are_left(
    evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished result stays; only a journal is bound to its batch size, and --overwrite starts that task alone anew."""
    out = evaluate("--task", "boolq", *FEW)
    finished = out / "baseline" / BOOLQ / "evaluation.json"
    before = finished.read_bytes()
    ask, asked = Choices.predict, []

    def once(self: Choices, model: Any, units: list[int]) -> Any:
        if asked:
            raise KeyboardInterrupt
        asked.append(units)
        return ask(self, model, units)

    both = ["--task", "boolq,piqa", *FEW]
    with monkeypatch.context() as patch:
        patch.setattr(Choices, "predict", once)
        evaluate(*both, code=130)
    capsys.readouterr()
    evaluate(*both, "--batch-size", 2, code=2)
    error = capsys.readouterr().err
    assert error.count("batch size was 3 and is now 2") == 1 and f"baseline/{PIQA} holds" in error
    evaluate(*both, "--batch-size", 2, "--overwrite")
    assert finished.read_bytes() == before
    found = result(out / "baseline" / PIQA, "evaluation.json")
    assert found["batch_size"] == 2 and found["resumed_batches"] == 0


def test_overwrite_resumes_what_is_the_same(
    evaluate: Callable[..., Path], adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that always says --overwrite goes on after a kill; a damaged result and a foreign merged journal are replaced."""
    task = ["--task", "boolq,piqa", *FEW, "--adapter", adapters["loran"], "--overwrite"]
    out = evaluate(*task)
    damaged, kept = (out / "loran" / name / "evaluation.json" for name in (BOOLQ, PIQA))
    before = damaged.read_bytes(), kept.read_bytes()
    damaged.write_text("{")
    journal = kept.parent / "merged/predictions.part-0.jsonl"
    journal.parent.mkdir()
    journal.write_text('{"schema": 1, "decided_by": {"task": "other"}}\n{"batch": 0, "outputs": []}\n')
    asked: list[Any] = []
    ask = Choices.predict
    monkeypatch.setattr(Choices, "predict", lambda s, m, u: asked.append([s.rows[0].id]) or ask(s, m, u))
    evaluate(*task)
    assert kept.read_bytes() == before[1] and not journal.exists()
    assert asked and all("piqa" not in name for (name,) in asked)
    assert result(damaged.parent, "evaluation.json")["metrics"]
