"""What `curvelora compare` refuses although ids, references and hashes of the protocol agree; no models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_files import labelled, write_evaluation

from curvelora.cli import run_guarded, run_module
from curvelora_eval import compare_command
from curvelora_eval.scoring import Score

pytestmark = pytest.mark.usefixtures("offline")

LABEL = [Score("label_accuracy")]
A = np.arange(20) % 3 > 0


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, and returns what it said: to the terminal, or the refusal."""

    def run(*arguments: object) -> str:
        argv = [str(argument) for argument in ("--resamples", 100, *arguments)]
        code = run_guarded(lambda: run_module(compare_command, "curvelora compare", argv), debug=False)
        captured = capsys.readouterr()
        assert (code, bool(captured.out), bool(captured.err)) in ((0, True, False), (2, False, True))
        return " ".join((captured.out or captured.err).split())  # lines are broken at 100 columns

    return run


def test_other_windows_are_another_perplexity(tmp_path: Path, said: Callable[..., str]) -> None:
    """Also where every window counts as many tokens, and where the numbers of windows differ."""
    sizes = {"a": (512, 256, 8), "same": (512, 256, 8), "window": (1024, 256, 8), "stride": (512, 128, 16)}
    for name, (window, stride, n) in sizes.items():
        records = [{"row": 0, "window": i, "id": f"t/{i}", "nll": 100.0 + i, "tokens": 256} for i in range(n)]
        folder, counts = tmp_path / name, {"rows": 1, "windows": n}
        decoding = {"window": window, "stride": stride}
        write_evaluation(folder, records, [Score("perplexity")], "wikitext2", counts=counts, decoding=decoding)
    assert "not distinguishable" in said(tmp_path / "a", tmp_path / "same")
    error = said(tmp_path / "a", tmp_path / "window", tmp_path / "stride")
    assert "A has 512 tokens, 256 apart, B has 1024 tokens, 256 apart" in error
    assert "C has 512 tokens, 128 apart" in error and error.count(" - wikitext2 ") == 2


def test_other_questions_under_the_same_ids(tmp_path: Path, said: Callable[..., str]) -> None:
    for name, rows in {"a": "aaa", "same": "aaa", "other": "bbb", "unknown": None}.items():
        decided_by = {"decided_by": {"rows": rows}} if rows else {}
        dataset = {"path": name, "sha256": name, "rows": len(A)}
        write_evaluation(tmp_path / name, labelled(A), LABEL, "hellaswag", dataset=dataset, **decided_by)
    error = said(tmp_path / "a", tmp_path / "other")
    assert "hellaswag (llm-adapters): the questions differ" in error and "A was asked other texts than B" in error
    assert "and so are the texts" in said(tmp_path / "a", tmp_path / "same")
    assert "cannot be told" in said(tmp_path / "a", tmp_path / "unknown")  # rows of the user's own have no such hash


def test_names_of_tasks_that_nothing_holds(tmp_path: Path, said: Callable[..., str]) -> None:
    for arm in "ab":
        for task in ("boolq", "piqa", "siqa"):
            write_evaluation(tmp_path / arm / task, labelled(A), LABEL, task)
    arms = (tmp_path / "a", tmp_path / "b")
    out = said(*arms, "--task", "boolq, siqa ,")
    assert "boolq," in out and "siqa," in out and "piqa" not in out
    error = said(*arms, "--task", "boolq,piqqa,nothing")
    assert "no folder holds an evaluation of 'piqqa', which --task names; did you mean 'piqa'?" in error
    assert "an evaluation of 'nothing', which" in error
    for empty in (",", ""):
        assert "--task names no task" in said(*arms, "--task", empty)


def test_scoring_that_this_version_cannot_read(tmp_path: Path, said: Callable[..., str]) -> None:
    write_evaluation(tmp_path / "a", labelled(A), LABEL)
    (good,) = json.loads((tmp_path / "a/evaluation.json").read_text())["scoring"]
    broken = {
        "newer": {"scoring": [good | {"weights": "tokens"}]},
        "text": {"scoring": "label_accuracy"},
        "item": {"scoring": ["label_accuracy"]},
        "none": {"scoring": [{}]},
        "metric": {"scoring": [good | {"metric": "acuracy"}]},
        "type": {"scoring": [good | {"metric": ["a"]}]},
        "options": {"scoring": [good | {"options": [1]}]},
    }
    for name, changes in broken.items():
        write_evaluation(tmp_path / name, labelled(A), LABEL, **changes)
    error = said(tmp_path / "a", *(tmp_path / name for name in broken))
    assert error.count("another version of curvelora-eval wrote it, or it was changed by hand") == len(broken)
    assert "'weights'" in error and "acuracy" in error
    for name, metrics in {"list": [1], "number": {"accuracy": 0.5}}.items():
        write_evaluation(tmp_path / name, labelled(A), LABEL, metrics=metrics)
        assert "evaluation.json has metrics" in said(tmp_path / "a", tmp_path / name)
