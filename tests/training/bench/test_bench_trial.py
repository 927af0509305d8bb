"""Training an arm: against a loop written out by hand, and with random numbers that no other arm disturbs."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from curvelora_training.bench.adapted import arm_model, arm_tensors, set_update_std
from curvelora_training.bench.arms import named_arm
from curvelora_training.bench.devices import Device
from curvelora_training.bench.trial import PHASES, Optimisation, PhaseClock, Trial, module_types

CPU = torch.device("cpu")


@pytest.fixture
def start(base, options):
    """`start("qlora")` -> a new trial on one and the same fp32 base."""
    model = base("fp32")

    def build(arm="loran:sinter-large", seed=0, dropout=0.0, **how):
        wrapped = arm_model(model, named_arm(arm), options | {"dropout": dropout}, [], 0, random=True)
        return Trial(wrapped, Optimisation(**{"learning_rate": 0.01, "steps": 6} | how), Device(CPU), [], False, seed)

    return build


def state(trial):
    return {name: p.detach().clone() for name, p in trial.named.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("linear", 2, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("constant", 1, [1 / 2, 1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("arm", ["qlora", "loran:sinter-large", "ranlora", "aurora", "full"])
def test_steps_equal_a_loop_by_hand(start, batches, arm, schedule, warmup, factors):
    how = {"schedule": schedule, "warmup": warmup, "weight_decay": 0.1, "max_grad_norm": 1e-3}
    trial, plain = start(arm, **how), start(arm).model.train()
    records = [trial.step(batch) for batch in batches[:6]]
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    clipped = 0
    for factor, batch, record in zip(factors, batches, records, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        loss = plain(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
        optimizer.step()
        clipped += bool(norm > 1e-3)
        assert record["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        assert record["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    assert clipped >= 1 and trial.taken == 6
    for found, expected in zip(trial.named.values(), parameters, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_a_bound_nothing_is_clipped(start, batches):
    free, bounded = start(max_grad_norm=0), start(max_grad_norm=1e-4)
    for trial in (free, bounded):
        trial.step(batches[0])
    moments = [trial.optimizer.state[next(iter(trial.named.values()))]["exp_avg"] for trial in (free, bounded)]
    assert moments[0].norm() >= moments[1].norm()
    total = sum(s["exp_avg"].square().sum() for s in bounded.optimizer.state.values()).sqrt() / 0.1  # beta1 = 0.9
    assert total.item() == pytest.approx(1e-4, rel=1e-2)


def test_dropout_is_undisturbed_by_other_arms(start, batches):
    def alone(arm, seed):
        trial = start(arm, seed, dropout=0.3)
        for batch in batches[:4]:
            trial.step(batch)
        return state(trial)

    one, two = start("qlora", 1, dropout=0.3), start("loran:sinter-large", 2, dropout=0.3)
    outside = torch.get_rng_state()
    for batch in batches[:4]:
        one.step(batch)
        two.step(batch)
        assert torch.equal(torch.get_rng_state(), outside)
        torch.rand(7)  # somebody else draws
        outside = torch.get_rng_state()
    assert same(state(one), alone("qlora", 1)) and same(state(two), alone("loran:sinter-large", 2))
    assert not same(state(one), alone("qlora", 9))


def test_every_step_drops_others(start, batches):
    def losses(dropout):
        trial = start("qlora", dropout=dropout, learning_rate=1e-30)
        set_update_std(trial.model, 0.05)
        return [trial.step(batches[0])["loss"].item() for _ in range(4)]

    assert len(set(losses(0.5))) == 4 and len(set(losses(0.0))) == 1


def test_norms_and_ratios_by_module_type(start, batches):
    trial, plain = start("qlora", max_grad_norm=0), start("qlora").model.train()
    for batch in batches[:2]:  # the second step: B has left zero
        before = state(trial)
        plain.load_state_dict(trial.model.state_dict())
        record = trial.step(batch, observe=True)
        plain.zero_grad()
        plain(**batch).loss.backward()
        after = state(trial)
        for kind in ("q_proj", "down_proj"):
            names = [n for n in before if kind in n]
            assert len(names) == 4

            def norm(tensors):
                return torch.cat([t.double().flatten() for t in tensors]).norm().item()

            grads = dict(plain.named_parameters())
            assert record["grad_norms"][kind].item() == pytest.approx(norm(grads[n].grad for n in names), rel=1e-5)
            moved = norm(after[n].double() - before[n].double() for n in names)
            assert record["update_ratio"][kind].item() == pytest.approx(
                moved / norm(before[n] for n in names), rel=1e-4
            )
        assert record["grad_norms"].keys() == record["update_ratio"].keys() == {"q_proj", "down_proj"}
        total = sum(v.item() ** 2 for v in record["grad_norms"].values()) ** 0.5
        assert record["grad_norm"].item() == pytest.approx(total, rel=1e-5)


def test_observing_changes_nothing(start, batches):
    one, two = start(), start()
    for batch in batches[:3]:
        one.step(batch, observe=True)
        two.step(batch, PhaseClock(Device(CPU)))
    assert same(state(one), state(two))


@pytest.mark.parametrize("arm", ["qlora", "loran:sinter", "ranlora", "aurora", "full"])
def test_every_parameter_has_its_module_s_type(start, arm):
    trial = start(arm)
    for name, kind in zip(trial.named, trial.types, strict=True):
        assert kind in ("q_proj", "down_proj") and kind in name.split(".")


def test_heads_have_a_type_and_a_rate_of_their_own():
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=128, hidden_dropout_prob=0, **sizes))
    model.config.dtype = torch.float32
    options = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["query", "value"]}
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}
    for arm in ("loran:tanh", "full"):
        wrapped = arm_model(model, named_arm(arm), options, ["classifier"], 0, False)
        how = Optimisation(learning_rate=1e-3, head_learning_rate=0.03, steps=5)
        trial = Trial(wrapped, how, Device(CPU), ["classifier"], False)
        assert set(trial.types) == {"query", "value", "classifier"}
        before = state(trial)
        trial.step(batch)
        for kind, name in zip(trial.types, before, strict=True):
            moved = (trial.named[name] - before[name]).abs().max().item()
            # Adam's first step is the learning rate itself where the gradient is not tiny
            rate = 0.03 if kind == "classifier" else 1e-3
            assert moved == 0 or moved == pytest.approx(rate, rel=0.05), name
        assert module_types({"score.weight": 0}, ["score"]) == ["score"]


def test_held_out_loss_weighs_batches_by_their_rows(start, batches):
    trial = start("qlora")
    short = {key: value[:1] for key, value in batches[1].items()}
    with torch.no_grad():
        losses = [trial.model.eval()(**batch).loss.item() for batch in (batches[0], short)]
    found = trial.held_out([batches[0], short])
    assert found["accuracy"] is None
    assert found["loss"] == pytest.approx((2 * losses[0] + losses[1]) / 3, rel=1e-6)
    assert trial.held_out([]) == {"loss": None, "accuracy": None}


def test_phases_add_up_to_the_step(start, batches):
    trial, clock = start(), PhaseClock(Device(CPU))
    trial.step(batches[0], clock)
    seconds = clock.seconds()
    assert tuple(seconds) == (*PHASES, "step") and all(v >= 0 for v in seconds.values())
    assert seconds["step"] == pytest.approx(sum(seconds[p] for p in PHASES), rel=1e-12) and seconds["backward"] > 0
    assert clock.seconds() == {"step": 0}


def test_parking_does_nothing_on_a_cpu(start, batches):
    trial = start()
    trial.step(batches[0])
    where = {name: p.data_ptr() for name, p in trial.named.items()}
    trial.park()
    trial.unpark()
    assert {name: p.data_ptr() for name, p in trial.named.items()} == where


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("arm", ["qlora", "loran:sinter", "ranlora", "aurora", "full"])
def test_parking_takes_an_arm_off_the_gpu_and_back(config, options, arm):
    from curvelora_training.bench.random_base import random_model

    device = torch.device("cuda", 0)
    model = random_model(config(), "nf4", device)
    wrapped = arm_model(model, named_arm(arm), options, [], 0, random=True)
    trial = Trial(wrapped, Optimisation(steps=9), Device(device), [], False)
    ids = torch.arange(24).view(2, 12)
    trial.step({"input_ids": ids, "labels": ids})
    before = {name: p.detach().cpu().clone() for name, p in trial.named.items()}
    trial.park()
    assert all(t.device.type == "cpu" for t in arm_tensors(trial.model))
    assert all(p.device.type == "cuda" for p in model.parameters())
    trial.unpark()
    assert all(t.device.type == "cuda" for t in arm_tensors(trial.model))
    assert same(before, {name: p.detach().cpu() for name, p in trial.named.items()})
    trial.step({"input_ids": ids, "labels": ids})
