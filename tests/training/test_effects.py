"""What a run says of its start, of merging, and of where splines were asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from curvelora_eval.wording import percent
from curvelora_training import effects
from curvelora_training import run as run_module
from run_files import metrics, result, start

SMALL = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["query", "value"]}


@pytest.fixture
def train(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], tmp_path: Path
) -> Callable:
    """-> train(method, name, *arguments, **changes): the folder of a short run."""

    def run(method: str, name: str = "run", *arguments: str, **changes: Any) -> Path:
        adapter = {"method": method, **SMALL}
        short = {"training.max_steps": 3, "output": str(tmp_path / name), "adapter": adapter}
        return finetune(write(recipe, **(short | changes)), *arguments)

    return run


def test_ranlora_starts_away_from_the_base_and_says_so(train: Callable, capsys: pytest.CaptureFixture) -> None:
    folder = train("ranlora")
    shift = result(folder)["start_shift"]
    assert 1e-6 < shift["relative"] < 1 and shift["positions"] == 32
    assert shift["largest"] > 0 and shift["reference_loss"] > 0
    (line,) = start(folder)
    assert line["start_shift"] == shift
    said = f"before training the adapter changes the outputs by {percent(shift['relative'])} (loss"
    assert said in capsys.readouterr().out
    assert result(folder)["merge_gap"] is None and result(folder)["spline"] is None
    assert "merged_form" not in result(folder, "evaluation.json")
    card = (folder / "adapter/README.md").read_text(encoding="utf-8")
    assert "merging | impossible" in card and "before training | outputs" in card


@pytest.mark.parametrize("method", ["lora", "loran", "aurora"])
def test_a_method_that_starts_as_the_base_says_exactly_that(train: Callable, method: str, capsys) -> None:
    shift = result(train(method))["start_shift"]
    assert shift["relative"] == 0 and shift["agreement"] == 1 and shift["reference_loss"] == shift["changed_loss"]
    assert "the model with its adapter is the base model" in capsys.readouterr().out


def test_an_untrained_run_has_its_start_too(train: Callable) -> None:
    folder = train("ranlora", **{"training.max_steps": 0})
    assert result(folder)["start_shift"]["relative"] > 1e-6
    assert not (folder / "metrics.jsonl").exists()


def test_the_start_is_measured_in_batches_of_training(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those fit on the device; evaluation's default of 32 rows of a large language model may not."""
    seen = []
    original = effects.batches

    def watch(*arguments: Any) -> Any:
        for batch in original(*arguments):
            seen.append(len(batch["labels"]))
            yield batch

    monkeypatch.setattr(effects, "batches", watch)
    train("ranlora", **{"training.batch_size": 12, "training.eval_batch_size": 32})
    assert seen == [12, 12, 8]


def test_measuring_changes_no_weight(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a random number is drawn nor a row taken."""
    measured = train("ranlora", "measured")
    monkeypatch.setattr(run_module, "measure_start", lambda *_: effects.OutputChange(0.0, 0.0, None, None, None, 1))
    bare = train("ranlora", "bare")
    wanted, found = (load_file(f / "adapter/adapter_model.safetensors") for f in (measured, bare))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    keep = ("step", "loss", "grad_norm")
    assert [[x[k] for k in keep] for x in metrics(measured)] == [[x[k] for k in keep] for x in metrics(bare)]


def test_a_resumed_run_keeps_the_start_of_the_first(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"adapter": {"method": "ranlora", **SMALL}, "training.max_steps": 6, "training.save_every": 2}
    path = write(recipe, **changes)
    folder = finetune(path)
    first = result(folder)["start_shift"]
    (folder / "result.json").unlink()  # as if it had been stopped before the end
    monkeypatch.setattr(run_module, "measure_start", lambda *_: pytest.fail("the start is over"))
    finetune(path, "--resume")
    assert result(folder)["start_shift"] == first and len(start(folder)) == 1


def test_starting_anew_without_a_checkpoint_leaves_one_start(train: Callable) -> None:
    folder = train("ranlora")
    (folder / "result.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "trainer_state.json").unlink()
    train("ranlora", "run", "--resume")
    assert len(start(folder)) == 1


def test_aurora_keeps_its_two_forms_apart(train: Callable) -> None:
    folder = train("aurora", **{"training.max_steps": 12, "training.learning_rate": 2e-2})
    gap, evaluation = result(folder)["merge_gap"], result(folder, "evaluation.json")
    assert gap["relative"] > 1e-3 and gap["positions"] == 40 and gap["reference_loss"] != gap["changed_loss"]
    assert evaluation["merged_form"]["metrics"].keys() == evaluation["metrics"].keys()
    shares = [(line["spline_beyond_grid"], line["spline_beyond_support"]) for line in metrics(folder)]
    assert all(0 <= support <= grid < 1 for grid, support in shares) and shares[-1][0] > 0
    assert result(folder)["spline"] == {"beyond_grid": shares[-1][0], "beyond_support": shares[-1][1]}
    card = (folder / "adapter/README.md").read_text(encoding="utf-8")
    assert "merging | approximate" in card and "merged form | outputs" in card and "beyond the grid" in card
    # resumed with no step left to make, the run says the same
    before = result(folder)
    (folder / "result.json").unlink()
    train("aurora", "run", "--resume", **{"training.max_steps": 12, "training.learning_rate": 2e-2})
    assert {k: result(folder)[k] for k in ("spline", "merge_gap")} == {k: before[k] for k in ("spline", "merge_gap")}


def test_a_run_that_diverges_still_leaves_its_results(train: Callable) -> None:
    # the one step that it makes is finite, and what it makes is not
    folder = train("aurora", **{"training.learning_rate": 1e30, "training.max_steps": 1})
    assert result(folder)["merge_gap"]["relative"] is None
    assert result(folder)["start_shift"]["relative"] == 0


def test_aurora_that_trains_what_it_merges_has_no_gap(train: Callable) -> None:
    folder = train("aurora", adapter={"method": "aurora", **SMALL, "mode": "static"})
    assert result(folder)["merge_gap"] is None and "merged_form" not in result(folder, "evaluation.json")
