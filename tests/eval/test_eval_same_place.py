"""What `curvelora eval` does with what is in --out already: keep, go on, refuse or replace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvelora_eval.evaluation.arms import labels
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


def test_another_model_under_the_same_label_is_refused(
    evaluate: Callable[..., Path],
    adapters: dict[str, Path],
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One row of the summary is one model, whichever tasks are asked in whichever command."""
    from curvelora_eval.evaluation import work

    y = Path(shutil.copytree(adapters["ranlora"], tmp_path / "y/lora"))
    out = evaluate("--task", "boolq", *FEW, "--adapter", adapters["lora"], "--baseline")
    other = Path(shutil.copytree(llama_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    monkeypatch.setattr(work, "load_base", lambda *a, **k: pytest.fail("loaded"))
    capsys.readouterr()
    for given, label, part in (
        (["--model", other], "baseline", "model was"),
        (["--dtype", "bfloat16"], "baseline", 'dtype was "float32" and is now "bfloat16"'),
        (["--quantization", "nf4"], "baseline", 'quantization was "none" and is now "nf4"'),
        (["--adapter", y], "lora", "adapter was"),
    ):
        for more in ([], ["--overwrite"]):
            evaluate("--task", "piqa", *FEW, *given, *more, code=2)
            error = capsys.readouterr().err
            assert f"{out / label / BOOLQ} holds the score of another model, which is also called {label}" in error
            assert part in error
    assert {p.parent.name for p in out.rglob("evaluation.json")} == {BOOLQ}


def test_an_adapter_keeps_its_label_when_another_of_the_same_name_comes(
    evaluate: Callable[..., Path], adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = (
        Path(shutil.copytree(adapters[name], tmp_path / place / "a"))
        for name, place in (("lora", "x"), ("ranlora", "y"))
    )
    out = evaluate("--task", "boolq", *FEW, "--adapter", x)
    before = (out / "a" / BOOLQ / "evaluation.json").read_bytes()
    evaluate("--task", "boolq", *FEW, "--adapter", y, "--adapter", x)
    assert "a (2 of 2): finished before" in capsys.readouterr().out
    assert result(out, "summary.json")["models"] == ["y-a", "a"]
    assert (out / "a" / BOOLQ / "evaluation.json").read_bytes() == before
    evaluate("--task", "boolq", *FEW, "--adapter", y)
    assert "y-a (1 of 1): finished before" in capsys.readouterr().out


def test_a_run_killed_in_its_second_adapter_goes_on_under_the_same_labels(
    evaluate: Callable[..., Path], adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first adapter has a result by then and keeps its label; the second has a journal only, which is gone on with."""
    both: list[Any] = []
    for name, place in (("lora", "x"), ("ranlora", "y")):
        both += ["--adapter", shutil.copytree(adapters[name], tmp_path / place / "a")]
    command = ["--task", "boolq", *FEW, "--batch-size", 1, *both]
    ask, asked = Choices.predict, []

    def until_the_second_adapter(self: Choices, model: Any, units: list[int]) -> Any:
        if len(asked) == 7:  # six choices of the first, one of the second
            raise KeyboardInterrupt
        asked.append(units)
        return ask(self, model, units)

    with monkeypatch.context() as patch:
        patch.setattr(Choices, "predict", until_the_second_adapter)
        out = evaluate(*command, code=130)
    assert [path.parent.parent.name for path in out.rglob("evaluation.json")] == ["x-a"]
    evaluate(*command)
    assert {folder.name for folder in out.iterdir() if folder.is_dir()} == {"x-a", "y-a"}
    assert result(out / "y-a" / BOOLQ, "evaluation.json")["resumed_batches"] == 1


def test_labels_that_were_given_before() -> None:
    paths = [Path("x/a"), Path("y/a"), Path("c")]
    assert labels(paths[:2], [["x-a"], []]) == ["x-a", "y-a"]
    assert labels([Path("x/a"), Path("z/x-a")], [["x-a"], []]) == ["x-a", "z-x-a"]  # not free any more
    assert labels(paths, [["a"], [], []]) == ["a", "y-a", "c"]
    assert labels(paths, [[], ["y-a"], ["a"]]) == ["x-a", "y-a", "c"]  # an equal adapter's is none of this folder
    assert labels(paths[:2], [["a"], ["a"]]) == ["a", "y-a"]
    assert labels(paths[:1], [["x-a", "a"]]) == ["a"] and labels(paths[:1], [["x-a"]]) == ["x-a"]


def test_a_mean_is_over_one_model(tmp_path: Path) -> None:
    """Results that were mixed by hand, or by an earlier version, have none."""
    from curvelora_eval.evaluation.summary import GROUPS, write_summary

    model = {"model": "1", "dtype": "float32", "quantization": "none", "double_quantization": False, "adapter": None}
    for label, last in (("one", "1"), ("two", "2")):
        for i, task in enumerate(GROUPS["arithmetic"]):
            record = {
                "task": task,
                "metrics": {"accuracy": {"value": i / 10, "low": 0.0, "high": 1.0}},
                "primary_metric": "accuracy",
                "benchmark": {"subset": None},
                "protocol": {"name": "llm-adapters", "template": "clean", "hash": "0", "quirks": []},
                "counts": {"rows": 10},
                "batch_independence": None,
                "rows_per_second": 1.0,
                "repaired": [],
                "decided_by": model | {"model": last if i == 5 else "1"},
            }
            (tmp_path / label / task).mkdir(parents=True)
            (tmp_path / label / task / "evaluation.json").write_text(json.dumps(record))
    means = write_summary(tmp_path)["averages"]
    assert [mean["value"] for mean in means["one"].values()] == pytest.approx([0.25]) and means["two"] == {}
