"""A loss or gradient that is not finite: which rows it came from, and what the run does about it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from curvelora_training import run as run_module
from curvelora_training.config import RecipeError
from curvelora_training.finetune import main
from curvelora_training.nonfinite import IN_A_ROW, ROW, Numbered, WithRows, poisoned
from curvelora_training.prepare import load_and_prepare
from run_files import metrics, result

# 96 rows, 8 a step in two batches: 12 steps an epoch
SMALL = {"training.batch_size": 4, "training.accumulation": 2, "training.log_every": 1, "training.save_every": 3}


class Watch(TrainerCallback):
    """Adapter and moments after every step, by step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.moments: dict[int, list[torch.Tensor]] = {}
        self.rates: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        step = state.global_step
        self.weights[step] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.moments[step] = [s["exp_avg"].clone() for s in optimizer.state.values()]
        self.rates[step] = optimizer.param_groups[0]["lr"]


class Broken:
    """Makes the losses of some steps NaN or infinite, or their gradients, and keeps which rows were in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int], kind: str = "nan") -> None:
        self.rows: dict[int, list[int]] = {}
        self.watch = Watch()
        broken = self
        loss_of, step_of, trainer = (
            Trainer.compute_loss,
            run_module.AdapterTrainer.training_step,
            run_module.AdapterTrainer,
        )
        once: set[int] = set()

        def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = loss_of(self, model, inputs, return_outputs, **kwargs)
            step = self.state.global_step + 1
            if step not in steps or return_outputs or step in once:
                return loss
            once.add(step)  # the first batch of the step, not the second
            if kind == "gradient":
                loss.register_hook(lambda gradient: gradient * math.inf)
                return loss
            # an infinite loss whose own gradient is finite
            return loss * math.nan if kind == "nan" else loss + math.inf

        def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            broken.rows.setdefault(self.state.global_step + 1, []).extend(inputs[ROW].tolist())
            return step_of(self, model, inputs, *args, **kwargs)

        def make(*args: Any, callbacks: list[Any], **kwargs: Any) -> Any:
            return trainer(*args, callbacks=[*callbacks, broken.watch], **kwargs)

        monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
        monkeypatch.setattr(trainer, "training_step", training_step)
        monkeypatch.setattr(run_module, "AdapterTrainer", make)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_by_default_the_run_ends_and_says_where(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, kind: str
) -> None:
    """The rows are those of both batches of the step, the checkpoint before it stays, and with skip the run goes on from it."""
    with monkeypatch.context() as patched:
        broken = Broken(patched, {5}, kind)
        path = write(recipe, **SMALL)
        assert main(["--config", str(path)]) == 2
    folder, said = Path(recipe["output"]), capsys.readouterr().err
    rows = broken.rows[5]
    assert len(rows) == 8 and len(set(rows)) == 8
    assert f"step 5 is not finite (loss {'nan' if kind == 'nan' else 'inf' if kind == 'inf' else '0.'}" in said
    assert f"on the training rows {', '.join(map(str, rows))}:" in said
    assert "checkpoint-3 is whole and from before it" in said
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["checkpoint-3"] and not (
        folder / "adapter"
    ).exists()
    logged = metrics(folder)[-1]
    assert logged["step"] == 5 and logged["nonfinite"]["action"] == "stop" and logged["nonfinite"]["rows"] == rows
    assert max(broken.watch.weights) == 4
    assert main(["--config", str(path), "--resume", "training.on_nonfinite=skip"]) == 0
    assert result(folder)["steps"] == 12 and result(folder)["nonfinite"] == {"skipped_steps": 0, "rollbacks": 0}


def test_without_a_checkpoint_it_says_so(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Broken(monkeypatch, {1})
    assert main(["--config", str(write(recipe, **SMALL))]) == 2
    said = capsys.readouterr().err
    assert "there is no checkpoint to go back to yet" in said and "--resume" not in said


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_skip_leaves_the_step_out_and_counts_it(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    broken = Broken(monkeypatch, {5, 6})
    changes = {"training.on_nonfinite": "skip", "training.max_grad_norm": clip, "training.weight_decay": 0.1}
    assert main(["--config", str(write(recipe, **SMALL, **changes))]) == 0
    folder, watch = Path(recipe["output"]), broken.watch
    for skipped in (5, 6):
        assert same(watch.weights[skipped - 1], watch.weights[skipped])
        assert all(map(torch.equal, watch.moments[skipped - 1], watch.moments[skipped]))
    assert not same(watch.weights[6], watch.weights[7]) and not same(watch.weights[3], watch.weights[4])
    rates = [watch.rates[step] for step in sorted(watch.rates)]
    assert all(a - b == pytest.approx(1e-3 / 12) for a, b in pairwise(rates))
    records = [line for line in metrics(folder) if "nonfinite" in line]
    assert [(line["step"], line["nonfinite"]["action"]) for line in records] == [(5, "skip"), (6, "skip")]
    assert [line["nonfinite"]["rows"] for line in records] == [broken.rows[5], broken.rows[6]]
    assert result(folder)["nonfinite"] == {"skipped_steps": 2, "rollbacks": 0} and result(folder)["steps"] == 12
    losses = {line["step"]: line["loss"] for line in metrics(folder) if "loss" in line}
    assert list(losses) == [*range(1, 5), *range(7, 13)] and None not in losses.values()
    assert sorted(row for rows in broken.rows.values() for row in rows) == list(range(96))


def test_a_skipped_step_has_no_part_in_the_mean_loss(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 12 in means over four: without step 6, the second mean is over three."""
    changes = SMALL | {"training.on_nonfinite": "skip", "training.save_every": 100}
    losses = []
    for every in (1, 4):
        with monkeypatch.context() as patched:
            Broken(patched, {6})
            path = write(recipe, **changes | {"training.log_every": every, "output": f"{recipe['output']}{every}"})
            assert main(["--config", str(path)]) == 0
        losses.append(
            {line["step"]: line["loss"] for line in metrics(Path(f"{recipe['output']}{every}")) if "loss" in line}
        )
    single, means = losses
    assert list(means) == [1, 4, 8, 12] and 6 not in single
    assert means[8] == pytest.approx((single[5] + single[7] + single[8]) / 3, rel=1e-5)


def test_steps_that_are_all_lost_are_not_skipped_for_ever(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Broken(monkeypatch, set(range(2, 13)))
    assert main(["--config", str(write(recipe, **SMALL, **{"training.on_nonfinite": "skip"}))]) == 2
    assert f"step {IN_A_ROW + 1} is not finite" in (said := capsys.readouterr().err) and "it is not the rows" in said


@pytest.mark.parametrize("method", ["loran", "full"])
def test_rollback_takes_weights_and_moments_of_the_checkpoint(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Step 8 fails and the newest checkpoint is of step 6; rows and learning rate go on."""
    if method == "full":
        recipe["adapter"] = {"method": "full"}
    broken = Broken(monkeypatch, {8}, "gradient")
    assert main(["--config", str(write(recipe, **SMALL, **{"training.on_nonfinite": "rollback"}))]) == 0
    folder, watch = Path(recipe["output"]), broken.watch
    assert same(watch.weights[8], watch.weights[6]) and not same(watch.weights[7], watch.weights[6])
    assert all(map(torch.equal, watch.moments[8], watch.moments[6]))
    assert not same(watch.weights[9], watch.weights[8])
    rates = [watch.rates[step] for step in sorted(watch.rates)]
    assert all(a - b == pytest.approx(1e-3 / 12) for a, b in pairwise(rates))
    (record,) = [line for line in metrics(folder) if "nonfinite" in line]
    assert record["step"] == 8 and record["nonfinite"]["rows"] == broken.rows[8]
    assert record["nonfinite"]["back_to"].endswith("checkpoint-6")
    assert result(folder)["nonfinite"] == {"skipped_steps": 0, "rollbacks": 1}
    assert sorted(row for rows in broken.rows.values() for row in rows) == list(range(96))


def test_a_run_that_went_back_resumes_exactly(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, **SMALL, **{"training.on_nonfinite": "rollback"})
    Broken(monkeypatch, {5})
    assert main(["--config", str(path)]) == 0
    folder = Path(recipe["output"])
    straight = load_file(folder / "adapter/adapter_model.safetensors")
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints/checkpoint-12")
    assert main(["--config", str(path), "--resume"]) == 0  # from step 9
    assert same(straight, load_file(folder / "adapter/adapter_model.safetensors"))


def test_rollback_has_an_end(
    recipe: dict, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    changes = {"training.on_nonfinite": "rollback", "training.max_rollbacks": 2}
    with monkeypatch.context() as patched:
        Broken(patched, {5, 7, 8})
        assert main(["--config", str(write(recipe, **SMALL, **changes))]) == 2
    assert "went back 2 times already" in (said := capsys.readouterr().err) and "step 8 is not finite" in said
    Broken(monkeypatch, {2})
    assert main(["--config", str(write(recipe, **SMALL, **changes)), "--overwrite"]) == 2
    assert "there is no checkpoint to go back to yet" in capsys.readouterr().err


def test_rows_are_numbered_without_changing_what_the_model_gets() -> None:
    rows = [{"labels": label} for label in "abc"]

    class Rows(list):
        def __getitem__(self, index: int | str) -> Any:
            return [row[index] for row in self] if isinstance(index, str) else super().__getitem__(index)

        def __getitems__(self, indices: list[int]) -> list[dict]:
            return [dict(self[i]) for i in indices]

    data = Numbered(Rows(rows))
    collate = WithRows(
        lambda features: {"labels": [feature["labels"] for feature in features], "keys": set(features[0])}
    )
    batch = collate(data.__getitems__([2, 0]))
    assert batch.pop(ROW).tolist() == [2, 0] and batch == {"labels": ["c", "a"], "keys": {"labels"}}
    assert data[1] == {"labels": "b", ROW: 1} and len(data) == 3 and data["labels"] == ["a", "b", "c"]
    assert ROW not in collate([{"labels": "a"}])


@pytest.mark.parametrize("more", [0.0, math.inf, math.nan])
def test_a_loss_shows_in_its_gradient_whether_it_is_finite(more: float) -> None:
    """A finite one has the gradient that it had, bit for bit."""
    weight = torch.tensor([0.3, 0.7], requires_grad=True)
    loss = (weight**3).sum() + more
    (plain,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert poisoned(loss) is loss and plain.isfinite().all()
    (gradient,) = torch.autograd.grad(loss / 2, weight)
    assert torch.equal(gradient, plain / 2) if more == 0 else gradient.isnan().all()


def test_adalora_does_not_leave_steps_out(recipe: dict, write: Callable[..., Path]) -> None:
    recipe["adapter"] = {"method": "adalora", "init_r": 4, "target_r": 2, "target_modules": ["query", "value"]}
    with pytest.raises(RecipeError, match=r"leave\s+training.on_nonfinite at stop"):
        load_and_prepare(write(recipe, **{"training.on_nonfinite": "skip"}), [])
